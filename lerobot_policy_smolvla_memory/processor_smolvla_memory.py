"""Pre- and post-processing of SmolVLA with memory: SmolVLA's own, with a tokenizer that travels.

LeRobot's pipelines carry a key through when its name contains `_is_pad` or begins with `observation.`, and
drop every other without a word. A converter of our own would not help: a pipeline opened again from a
checkpoint has LeRobot's. So the names of this policy's own batch keys (see `configuration_smolvla_memory`) are
chosen to arrive.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.policies.smolvla.processor_smolvla import make_smolvla_pre_post_processors
from lerobot.processor import (
    PolicyAction,
    PolicyProcessorPipeline,
    ProcessorStepRegistry,
    TokenizerProcessorStep,
)
from transformers import AutoTokenizer

from lerobot_policy_smolvla_memory.configuration_smolvla_memory import SmolVLAMemoryConfig


@dataclass
@ProcessorStepRegistry.register(name="smolvla_memory_tokenizer")
class TravellingTokenizerStep(TokenizerProcessorStep):
    """LeRobot's tokenizer step, which keeps the tokenizer itself instead of the name of the place it came from.

    A pipeline opens its steps without its own path, so the tokenizer's files are the step's state:
    file name → [bytes] uint8.
    """

    def __post_init__(self) -> None:
        if self.tokenizer is not None or self.tokenizer_name is not None:
            super().__post_init__()

    def get_config(self) -> dict[str, Any]:  # JSON
        return {key: value for key, value in super().get_config().items() if key != "tokenizer_name"}

    def state_dict(self) -> dict[str, torch.Tensor]:
        with tempfile.TemporaryDirectory() as folder:
            self.input_tokenizer.save_pretrained(folder)
            files = sorted(path for path in Path(folder).iterdir() if path.is_file())
            return {file.name: torch.from_numpy(np.fromfile(file, np.uint8)) for file in files}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            for name, content in state.items():
                content.cpu().numpy().tofile(Path(folder) / Path(name).name)
            self.input_tokenizer = AutoTokenizer.from_pretrained(folder)


def make_smolvla_memory_pre_post_processors(
    config: SmolVLAMemoryConfig,
    dataset_stats: dict[str, dict[str, torch.Tensor]] | None = None,
) -> tuple[
    PolicyProcessorPipeline[dict[str, Any], dict[str, Any]],  # LeRobot's batches: tensors, text, indices
    PolicyProcessorPipeline[PolicyAction, PolicyAction],
]:
    """The two pipelines, under the name by which LeRobot's factory looks for them."""
    preprocessor, postprocessor = make_smolvla_pre_post_processors(config, dataset_stats)
    preprocessor.steps = [
        TravellingTokenizerStep(tokenizer=step.input_tokenizer, **step.get_config() | {"tokenizer_name": None})
        if isinstance(step, TokenizerProcessorStep)
        else step
        for step in preprocessor.steps
    ]
    return preprocessor, postprocessor
