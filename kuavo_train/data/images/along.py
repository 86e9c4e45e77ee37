"""Embeddings that are computed while training goes on (`data.feature_fill=along`), in the step that first needs them.

a loader     gives the embeddings of a batch that are there, and of its other frames the pictures: `Lacking`
the trainer  has the encoder: it embeds those before its step, and goes on with them as they will be read later
a thread     stores them meanwhile; they are marked once they are on the disk, so that a kill leaves nothing wrong
"""

from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import numpy as np

from kuavo_train.data.batch import Batch
from kuavo_train.data.images.episode_cache import EpisodeCache
from kuavo_train.data.images.features import CachedFeatures, Encoder
from kuavo_train.data.images.forms import Form
from kuavo_train.data.images.source import ImageSource

WAITING = 4  # batches whose embeddings are held in memory until the disk has taken them


class FeaturesAlong(CachedFeatures):
    """Embeddings of which some may not be there yet.

    Args:
        pictures: camera and rows → [n, 3, H, W] uint8 of those.
    """

    def __init__(self, cache: EpisodeCache, form: Form, pictures: ImageSource):
        super().__init__(cache, form)
        self.pictures = pictures


class Complete(Protocol):
    def __call__(self, batch: Batch, sources: Sequence[ImageSource]) -> Batch:
        """The batch with all that it lacks; `sources` of the tasks that `Origin.task` counts."""


def nothing_lacks(batch: Batch, sources: Sequence[ImageSource]) -> Batch:
    return batch


class Along:
    """Embeds and stores what batches lack."""

    def __init__(self, encoder: Encoder, form: Form):
        self.encoder, self.form = encoder, form
        self._storing, self._waiting = ThreadPoolExecutor(1), deque[Future[None]]()

    def complete(self, batch: Batch, sources: Sequence[ImageSource]) -> Batch:
        """As `Complete`. Raises `ConfigError` where the disk did not take what was computed before."""
        lacking = batch.lacking
        if lacking is None:
            return batch
        stored = {camera: self.encoder.stored(frames, self.form) for camera, frames in lacking.pictures.items()}
        for camera, values in stored.items():
            features = batch.inputs[self.encoder.image_key(camera)]
            # As it will be read: training must not know whether a frame is seen for the first time.
            features.view(-1, *features.shape[-2:])[lacking.places] = self.form.load(values)
        while len(self._waiting) >= WAITING:
            self._waiting.popleft().result()
        about = (lacking.tasks.numpy(), lacking.rows.numpy())  # and no pictures, which would wait in memory
        self._waiting.append(self._storing.submit(_store, sources, *about, stored))
        return batch._replace(lacking=None)

    def wait(self) -> None:
        """Until all is on the disk. Raises `ConfigError` as `complete`."""
        while self._waiting:
            self._waiting.popleft().result()


def _store(
    sources: Sequence[ImageSource], tasks: np.ndarray, rows: np.ndarray, stored: Mapping[str, np.ndarray]
) -> None:
    for place in np.unique(tasks):
        source, mine = sources[place], tasks == place
        assert isinstance(source, FeaturesAlong)
        source.cache.store_rows(rows[mine], {camera: values[mine] for camera, values in stored.items()})


def lacking_of(source: ImageSource, rows: np.ndarray) -> np.ndarray:
    """[n] true where a source has not yet what it gives of a row."""
    return ~source.cache.holds(rows) if isinstance(source, FeaturesAlong) else np.zeros(len(rows), bool)
