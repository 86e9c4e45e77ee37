"""Random changes of colour and place of training pictures, fixed within a clip.

A memory is learnt over consecutive queries: were each changed in its own way, light and camera would jump within
an episode as they never do on a robot. So all K queries of a lane share their parameters; the cameras of a lane
have their own. Parameters are a pure function of (seed, stage, process, step, batch, lane, camera).
"""

import math
import zlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F

from kuavo_train.config import AugmentationConfig
from kuavo_train.data.mixture import Batch

STREAM = zlib.crc32(b"augmentation")  # apart from the other randomness of a step
# Rows: luma (ITU-R BT.601) and the two axes of colour of YIQ, in which hue is an angle.
YIQ = ((0.299, 0.587, 0.114), (0.595716, -0.274453, -0.321263), (0.211456, -0.522591, 0.311135))


class Augmentation(Protocol):
    def __call__(self, batch: Batch, step: int, number: int) -> Batch:
        """The `number`-th batch of an optimizer step, preprocessed, with other pictures."""


def no_augmentation(batch: Batch, step: int, number: int) -> Batch:
    return batch


class ClipAugmentation:
    """Jitter of brightness, contrast, saturation and hue, a small shift and crop, on the pictures' device.

    Args:
        cameras: keys of the pictures in a batch, [B, 3, H, W] float in [0, 1].
        queries: K, the consecutive rows of a batch that are one lane's clip.
    """

    def __init__(
        self, config: AugmentationConfig, *, cameras: Sequence[str], queries: int, seed: int, stage: int, process: int
    ):
        self.config, self.cameras, self.queries = config, list(cameras), queries
        self.key = [STREAM, seed, stage, process]

    def __call__(self, batch: Batch, step: int, number: int) -> Batch:
        lanes = len(batch[self.cameras[0]]) // self.queries
        random = np.random.default_rng([*self.key, step, number])
        # Lane by lane, so that a lane's parameters do not depend on how many follow it.
        drawn = torch.from_numpy(random.uniform(-1, 1, (lanes, len(self.cameras), 7)).astype(np.float32))
        by_row = drawn.repeat_interleave(self.queries, dim=0)
        changed = {
            camera: augment(batch[camera], by_row[:, place], self.config) for place, camera in enumerate(self.cameras)
        }
        return {**batch, **changed}


def augment(pictures: torch.Tensor, drawn: torch.Tensor, config: AugmentationConfig) -> torch.Tensor:
    """Pictures [B, 3, H, W] in [0, 1], each changed in its own way.

    Args:
        drawn: [B, 7] in [-1, 1], how much of what `config` allows: brightness, contrast, saturation, hue, shift
            to the right, shift down, crop.
    """
    allowed = (
        config.brightness,
        config.contrast,
        config.saturation,
        config.hue,
        config.shift,
        config.shift,
        config.crop,
    )
    brightness, contrast, saturation, hue, right, down, crop = (drawn * torch.tensor(allowed)).to(pictures.device).T
    if config.shift or config.crop:
        pictures = _moved(pictures, right, down, 1 - crop.abs())
    return _recoloured(pictures, 1 + brightness, 1 + contrast, 1 + saturation, hue)


def _moved(pictures: torch.Tensor, right: torch.Tensor, down: torch.Tensor, side: torch.Tensor) -> torch.Tensor:
    """Shifted by fractions of the picture, and cut to a window of `side` of it; its edges go on where it ends."""
    none = torch.zeros_like(side)
    window = torch.stack([side, none, -2 * right, none, side, -2 * down], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(window, list(pictures.shape), align_corners=False)
    return F.grid_sample(pictures, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _recoloured(
    pictures: torch.Tensor,
    brightness: torch.Tensor,
    contrast: torch.Tensor,
    saturation: torch.Tensor,
    hue: torch.Tensor,
) -> torch.Tensor:
    """Factors, and hue in turns: torchvision's adjustments, which take one factor for all pictures of a call.

    All four are linear in colour, so they are one matrix and one offset per picture. Hue turns the colour in
    YIQ, where torchvision goes through HSV.
    """
    to_yiq = torch.tensor(YIQ, device=pictures.device)
    turn, none, one = 2 * math.pi * hue, torch.zeros_like(hue), torch.ones_like(hue)
    cos, sin = saturation * turn.cos(), saturation * turn.sin()
    in_yiq = torch.stack([one, none, none, none, cos, -sin, none, sin, cos], dim=1).view(-1, 3, 3)
    matrix = brightness[:, None, None] * (to_yiq.inverse() @ in_yiq @ to_yiq)
    mean_luma = brightness * torch.einsum("c,bchw->b", to_yiq[0], pictures) / pictures[0, 0].numel()
    coloured = torch.einsum("bdc,bchw->bdhw", contrast[:, None, None] * matrix, pictures)
    return (coloured + ((1 - contrast) * mean_luma)[:, None, None, None]).clamp(0, 1)
