"""What a frozen vision-language model makes of a frame and its instruction, computed once and read from then on.

While all of that model is frozen, every epoch would compute the same keys and values again, a third of a step of a
small model. They take far more room than embeddings, so only small models have them. Stored as bfloat16, as the
embeddings that they are computed from.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Unpack

import numpy as np
import torch
from lerobot.utils.constants import OBS_STATE

from kuavo_train.config import DataConfig
from kuavo_train.data.batch import Batch, Origin
from kuavo_train.data.dataset import MixedDataset
from kuavo_train.data.images.episode_cache import EpisodeCache, How, fill
from kuavo_train.data.images.forms import FORMS
from kuavo_train.data.images.part import WHOLE, Shard
from kuavo_train.data.images.plan import GIB, Images, cached_bytes, disk_problems, filling, size_text
from kuavo_train.data.sampler import Draw
from kuavo_train.data.task import Task
from kuavo_train.reading import Json

FILE = "context"


@dataclass(frozen=True)
class ContextEncoder:
    """A frozen vision-language model.

    Args:
        encode: a batch of B samples → keys and values [B, layers, 2, P, width], float; P is that of the longest
            instruction among them.
        settings: everything beside embeddings and instruction that decides them: the weights' hash, the precision.
        key: their name in a batch.
    """

    encode: Callable[[Batch], torch.Tensor]
    settings: Json
    key: str


class CachedContexts:
    """Keys and values [n, layers, 2, P, width] bfloat16 of a task's rows, read from a memory map."""

    def __init__(self, cache: EpisodeCache):
        self.cache = cache

    def __call__(self, rows: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(self.cache.read(FILE, rows)).view(torch.bfloat16)


def with_contexts(
    images: Images,
    config: DataConfig,
    tasks: Sequence[Task],
    episodes: Mapping[str, Sequence[int]],
    encoder: ContextEncoder | None,
    dataset: Callable[[Sequence[Task]], MixedDataset],
    shard: Shard = WHOLE,
) -> Images:
    """`images`, and beside them what the model makes of them, where that takes no more room than it may.

    Args:
        tasks: of the stage; episodes: task → those that it reads.
        encoder: None where the model learns, or what it makes of a frame is not all that the frame decides.
        dataset: tasks → their samples, with `images`.
        shard: as of `images`.
    """
    if encoder is None or not images.embeddings:
        return images
    if images.in_part:
        why = f"not kept, of {', '.join(images.in_part)} single frames alone have embeddings"
        return replace(images, description=f"{images.description}\n  keys and values: {why}")
    if images.along:
        why = "not kept, data.feature_fill=along embeds frame by frame"
        return replace(images, description=f"{images.description}\n  keys and values: {why}")
    caches = {task.name: _cache(task, images, config, encoder, dataset([task])) for task in tasks}
    size, limit = cached_bytes(caches, episodes), config.context_cache_limit_gib
    if size > limit * GIB:
        over = f"{size_text(size)}, over data.context_cache_limit_gib={limit:g}"
        return replace(images, description=f"{images.description}\n  keys and values: not kept, they would take {over}")

    def fill_both(**how: Unpack[How]) -> None:
        images.fill(**how)
        for task in tasks:
            _fill(caches[task.name], encoder, dataset([task]), episodes[task.name], shard, **how)

    return replace(
        images,
        contexts={name: CachedContexts(cache) for name, cache in caches.items()},
        context_key=encoder.key,
        fill=fill_both,
        description=f"{images.description}\n  keys and values of the frozen model: {filling(caches, episodes, shard)}",
        look=images.look + max(cache.row_bytes for cache in caches.values()),
        problems=[*images.problems, *disk_problems(config, "data.context_cache_limit_gib=0", caches, episodes, shard)],
        caches=[*images.caches, *caches.values()],
    )


def _cache(
    task: Task, images: Images, config: DataConfig, encoder: ContextEncoder, dataset: MixedDataset
) -> EpisodeCache:
    embeddings, texts = images.embeddings[task.name], task.instructions.texts
    width = FORMS[config.feature_dtype].width
    said = hashlib.sha256("\n".join(texts).encode() + task.instructions.of_row.tobytes()).hexdigest()
    key = {**embeddings.key, "context": {**encoder.settings, "instructions": said}}
    blank = {
        **{
            images.image_key(camera): torch.zeros((len(texts), tokens, width(stored)), dtype=torch.bfloat16)
            for camera, (tokens, stored) in embeddings.shapes.items()
        },
        OBS_STATE: torch.from_numpy(np.tile(dataset.fill_state, (len(texts), 1))),
    }
    nowhere = Origin(*torch.zeros((4, len(texts)), dtype=torch.long))
    shape = encoder.encode(Batch(blank, texts, nowhere)).shape[1:]
    return EpisodeCache(config.cache_folder / "contexts", task, key, {FILE: tuple(shape)}, np.uint16)


def _fill(
    cache: EpisodeCache,
    encoder: ContextEncoder,
    dataset: MixedDataset,
    episodes: Sequence[int],
    shard: Shard,
    **how: Unpack[How],
) -> None:
    length = cache.shapes[FILE][2]

    def bits(rows: torch.Tensor) -> np.ndarray:
        encoded = encoder.encode(dataset.fetch([Draw(0, row) for row in rows.tolist()]))
        padded = torch.nn.functional.pad(encoded, (0, 0, 0, length - encoded.shape[3]))
        return padded.to(torch.bfloat16).cpu().view(torch.uint16).numpy()

    def same(camera: str, rows: np.ndarray) -> torch.Tensor:
        assert camera == FILE
        return torch.from_numpy(rows)

    fill(cache, episodes, same, convert=bits, description=f"encode {cache.task.name}", shard=shard, **how)
