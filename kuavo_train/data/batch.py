"""What a batch is, and how it comes to the policy."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from lerobot.processor import PolicyProcessorPipeline
from torch import Tensor

# Keys that a policy may read beside LeRobot's observations and actions.
ACTION_IS_PAD = "action_is_pad"
ACTION_DIM_IS_PAD = "action_dim_is_pad"
QUERY_IS_PAD = "query_is_pad"  # such a row leaves the memory as it is
MEMORY_RESET = "observation.memory_reset"

Prepared = dict[str, Any]
"""What LeRobot's preprocessor gives and a policy takes: tensors, and texts that the policy does not read."""


class Origin(NamedTuple):
    """Where the samples of a batch come from, [B] each.

    Attributes:
        task: its place in the dataset's tasks.
        stream: of walks, that the memory is carried along.
    """

    task: Tensor
    episode: Tensor
    frame: Tensor
    stream: Tensor


class Lacking(NamedTuple):
    """Frames of a batch whose embeddings were not there when it was fetched, L of them; see data/images/along.py.

    Attributes:
        places: [L] among the frames of the batch: B, or B × T of policies that see past ones.
        tasks, rows: [L] the task, as in `Origin`, and the frame's row in it.
        pictures: camera → [L, 3, H, W] uint8.
    """

    places: Tensor
    tasks: Tensor
    rows: Tensor
    pictures: dict[str, Tensor]


class Batch(NamedTuple):
    """B samples. A tuple and no dataclass, since PyTorch's loader pins the tensors of a tuple.

    Attributes:
        inputs: what the policy reads, under LeRobot's keys, and what it learns to answer.
        instructions: B texts.
        clip: K, so many consecutive samples are the consecutive queries of one episode.
        lacking: what `inputs` has still to be given.
    """

    inputs: dict[str, Tensor]
    instructions: Sequence[str]
    origin: Origin
    clip: int = 1
    lacking: Lacking | None = None

    @property
    def size(self) -> int:
        return len(self.instructions)

    @property
    def streams(self) -> list[int]:
        """The stream of each clip."""
        return self.origin.stream[:: self.clip].tolist()


def preprocess(
    batch: Batch,
    preprocessor: PolicyProcessorPipeline,
    device: torch.device,
    change: Callable[[Batch], Batch] = lambda batch: batch,
) -> Prepared:
    """The inputs through LeRobot's preprocessor: tokens, device, normalization.

    Args:
        device: where pictures become floats in [0, 1]; as bytes they are a quarter on the way there.
        change: what is done to the batch then, before pictures are normalized.
    """
    with_floats = {
        key: value.to(device, non_blocking=True).float() / 255 if value.dtype == torch.uint8 else value
        for key, value in batch.inputs.items()
    }
    changed = change(batch._replace(inputs=with_floats))
    return preprocessor({**changed.inputs, "task": list(changed.instructions)})
