"""A policy and its processors from a `pretrained_model` folder, as any LeRobot tool opens them."""

import re
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from lerobot.configs import PreTrainedConfig
from lerobot.policies.factory import get_policy_class, make_pre_post_processors
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.processor import PolicyProcessorPipeline

import lerobot_policy_smolvla_memory  # noqa: F401 - registers the policy
from kuavo_train.errors import said


def folder_of(path: str | Path) -> Path:
    """The folder with config.json: of a checkpoint, of its pretrained_model, or downloaded from the hub.

    Of a stage it is the best checkpoint's, of a run that of the last stage that has one.
    """
    place, best = Path(path), Path("checkpoints", "best", "pretrained_model")
    stages = sorted(place.glob("stage*_*"), key=lambda stage: int(re.findall(r"\d+", stage.name + " 0")[0]))
    for folder in (place, place / "pretrained_model", place / best, *(stage / best for stage in reversed(stages))):
        if (folder / "config.json").is_file():
            return folder
    rule = f"{path} must be a checkpoint's folder, with config.json in it or in pretrained_model, or a run with one"
    if len(place.parts) != 2 or place.exists() or str(path).startswith((".", "/", "~")):
        raise FileNotFoundError(rule)
    try:
        return Path(snapshot_download(str(path)))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError) as error:
        raise FileNotFoundError(f"{rule}, or a repository of the hub: {said(error)}") from error


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
