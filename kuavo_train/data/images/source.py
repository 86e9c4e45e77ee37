"""What gives the pictures of a task's rows, or what stands for them."""

from typing import Protocol

import numpy as np
import torch


class ImageSource(Protocol):
    def __call__(self, camera: str, rows: np.ndarray) -> torch.Tensor:
        """[len(rows), …] what a camera, by its name in the policy, gives for rows of a task."""


class RowSource(Protocol):
    def __call__(self, rows: np.ndarray) -> torch.Tensor:
        """[len(rows), …] what there is for rows of a task, all cameras and the instruction together."""
