"""What a batch is, and how it comes to the policy."""

from collections.abc import Callable
from typing import Any

import torch

Batch = dict[str, Any]


BOOKKEEPING = ("task_position", "episode_index", "frame_index", "stream")


MEMORY_RESET = "observation.memory_reset"


def preprocess(
    batch: Batch, preprocessor: Any, device: torch.device, change: Callable[[Batch], Batch] = lambda batch: batch
) -> Batch:
    """What is not bookkeeping through LeRobot's preprocessor: tokens, device, normalization.

    Args:
        device: where pictures become floats in [0, 1]; as bytes they are a quarter on the way there.
        change: what is done to the batch then, before pictures are normalized.
    """
    with_floats = {
        key: value.to(device, non_blocking=True).float() / 255
        if isinstance(value, torch.Tensor) and value.dtype == torch.uint8
        else value
        for key, value in batch.items()
        if key not in BOOKKEEPING
    }
    return preprocessor(change(with_floats))
