"""Image embeddings of a task, computed once by an encoder that does not learn, and read from then on.

While vision encoder and connector are frozen and pictures are not augmented, every epoch would compute the same
embeddings again, at most of the cost of a step. How they are stored, forms.py says.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

import numpy as np
import torch

from kuavo_train.data.images.episode_cache import EpisodeCache, How, fill
from kuavo_train.data.images.forms import FORMS, Form
from kuavo_train.data.images.frames import DecodedFrames
from kuavo_train.data.images.part import WHOLE, Shard
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
        together: pictures that `embed` is shown at once, always as many: how it rounds depends on that.
    """

    embed: Callable[[torch.Tensor], torch.Tensor]
    settings: Json
    image_key: Callable[[str], str]
    device: torch.device
    together: int

    def stored(self, frames: torch.Tensor, form: Form) -> np.ndarray:
        """Frames [B, 3, H, W] uint8 → embeddings [B, N, …] in that form, the same whichever others they are among."""
        padded = torch.cat([frames, frames.new_zeros((-len(frames) % self.together, *frames.shape[1:]))])
        pieces = padded.to(self.device).split(self.together)
        return form.store(torch.cat([self.embed(piece.float() / 255) for piece in pieces])[: len(frames)])


class CachedFeatures:
    """Embeddings [n, N, H] bfloat16, read from a memory map. Raises `RuntimeError` for rows that are not there."""

    def __init__(self, cache: EpisodeCache, form: Form = FORMS["bfloat16"]):
        self.cache, self.form = cache, form

    def __call__(self, camera: str, rows: np.ndarray) -> torch.Tensor:
        return self.form.load(self.cache.read(camera, rows))


def feature_cache(
    decoded: DecodedFrames, encoder: Encoder, folder: Path, form: Form = FORMS["bfloat16"]
) -> EpisodeCache:
    """The cache of a task's embeddings below `folder`; nothing is written yet."""
    shapes = {
        camera: encoder.stored(torch.zeros((1, *shape), dtype=torch.uint8), form).shape[1:]
        for camera, shape in decoded.shapes.items()
    }
    key = {**decoded.key, "encoder": dict(encoder.settings), **form.key}
    return EpisodeCache(folder / "features", decoded.task, key, shapes, form.dtype)


def fill_features(
    cache: EpisodeCache,
    encoder: Encoder,
    frames: ImageSource,
    episodes: Sequence[int],
    form: Form = FORMS["bfloat16"],
    shard: Shard = WHOLE,
    **how: Unpack[How],
) -> None:
    """Embed the episodes that are missing; `form` as of the cache, `shard` as `fill` takes it, `how` as `How` says."""

    def stored(pictures: torch.Tensor) -> np.ndarray:
        return encoder.stored(pictures, form)

    fill(cache, episodes, frames, convert=stored, description=f"embed {cache.task.name}", shard=shard, **how)
