"""Pre- and post-processing of SmolVLA with memory: SmolVLA's own.

LeRobot's pipelines carry a key through when its name contains `_is_pad` or begins with `observation.`, and
drop every other without a word. A converter of our own would not help: a pipeline opened again from a
checkpoint has LeRobot's. So the names of this policy's own batch keys (see `configuration_smolvla_memory`) are
chosen to arrive.
"""

from typing import Any

import torch
from lerobot.policies.smolvla.processor_smolvla import make_smolvla_pre_post_processors
from lerobot.processor import PolicyAction, PolicyProcessorPipeline

from lerobot_policy_smolvla_memory.configuration_smolvla_memory import SmolVLAMemoryConfig


def make_smolvla_memory_pre_post_processors(
    config: SmolVLAMemoryConfig,
    dataset_stats: dict[str, dict[str, torch.Tensor]] | None = None,
) -> tuple[
    PolicyProcessorPipeline[dict[str, Any], dict[str, Any]],
    PolicyProcessorPipeline[PolicyAction, PolicyAction],
]:
    """The two pipelines, under the name by which LeRobot's factory looks for them."""
    return make_smolvla_pre_post_processors(config, dataset_stats)
