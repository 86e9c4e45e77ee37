"""A policy and its processors from a `pretrained_model` folder, as any LeRobot tool opens them."""

from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

from lerobot.configs import PreTrainedConfig
from lerobot.policies.factory import get_policy_class, make_pre_post_processors
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.processor import PolicyProcessorPipeline

import lerobot_policy_smolvla_memory  # noqa: F401 - registers the policy


def stored_config(folder: Path | str, device: str) -> PreTrainedConfig:
    """The policy's config, to be computed on `device`."""
    config = PreTrainedConfig.from_pretrained(str(folder))
    config.device = device
    return config


def open_policy(
    folder: Path | str, config: PreTrainedConfig
) -> tuple[PreTrainedPolicy, tuple[PolicyProcessorPipeline, PolicyProcessorPipeline]]:
    """The policy of `config` with the folder's weights, and its pre- and post-processor, on the config's device.

    Raises:
        OSError, ValueError, RuntimeError: the weights cannot be loaded, or do not fit.
    """
    with redirect_stdout(StringIO()):  # LeRobot prints that it loads
        policy = get_policy_class(config.type).from_pretrained(str(folder), config=config, strict=True)
    processors = make_pre_post_processors(
        config, pretrained_path=str(folder), preprocessor_overrides={"device_processor": {"device": config.device}}
    )
    return policy, processors
