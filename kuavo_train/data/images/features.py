"""Image embeddings of a task, computed once by an encoder that does not learn, and read from then on.

While vision encoder and connector are frozen and pictures are not augmented, every epoch would compute the same
embeddings again, at most of the cost of a step. They are stored as bfloat16 (numpy has none: as its 16 bits).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

import numpy as np
import torch

from kuavo_train.data.images.episode_cache import EpisodeCache, How, fill
from kuavo_train.data.images.frames import DecodedFrames
from kuavo_train.data.images.source import ImageSource
from kuavo_train.reading import Json


@dataclass(frozen=True)
class Encoder:
    """A frozen image encoder.

    Args:
        embed: pictures [B, 3, H, W], float in [0, 1] → embeddings [B, N, H].
        settings: everything beside the picture that decides an embedding: the weights' hash, the preprocessing.
        image_key: name of a camera's pictures → name of its embeddings in a batch.
        device: where `embed` wants its pictures.
    """

    embed: Callable[[torch.Tensor], torch.Tensor]
    settings: Json
    image_key: Callable[[str], str]
    device: torch.device

    def bits(self, frames: torch.Tensor) -> np.ndarray:
        """Frames [B, 3, H, W] uint8 → embeddings [B, N, H] as the bits of bfloat16."""
        embeddings = self.embed(frames.to(self.device).float() / 255)
        return embeddings.to(torch.bfloat16).cpu().view(torch.uint16).numpy()


class CachedFeatures:
    """Embeddings [n, N, H] bfloat16, read from a memory map."""

    def __init__(self, cache: EpisodeCache):
        self.cache = cache

    def __call__(self, camera: str, rows: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(self.cache.read(camera, rows)).view(torch.bfloat16)


def feature_cache(decoded: DecodedFrames, encoder: Encoder, folder: Path) -> EpisodeCache:
    """The cache of a task's embeddings below `folder`; nothing is written yet."""
    shapes = {
        camera: encoder.bits(torch.zeros((1, *shape), dtype=torch.uint8)).shape[1:]
        for camera, shape in decoded.shapes.items()
    }
    key = {**decoded.key, "encoder": dict(encoder.settings)}
    return EpisodeCache(folder / "features", decoded.task, key, shapes, np.uint16)


def fill_features(
    cache: EpisodeCache, encoder: Encoder, frames: ImageSource, episodes: Sequence[int], **how: Unpack[How]
) -> None:
    """Embed the episodes that are missing; `how` as `How` says."""
    fill(cache, episodes, frames, convert=encoder.bits, description=f"embed {cache.task.name}", **how)
