"""What a stage's images come from: embeddings by a frozen encoder, frames in a memory map, or decoding.

The rule, applied in this order and shown in the stage's table:

    embeddings   the image encoder is frozen, data.augmentation is null, data.feature_cache is true, and they
                 take no more than data.feature_cache_limit_gib
    frames       data.frame_cache is true
    decoding     anew for every batch
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Unpack

from kuavo_train.config import DataConfig
from kuavo_train.data.images.episode_cache import EpisodeCache, How
from kuavo_train.data.images.features import CachedFeatures, Encoder, feature_cache, fill_features
from kuavo_train.data.images.forms import FORMS
from kuavo_train.data.images.frames import CachedFrames, DecodedFrames, fill_frames, frame_cache
from kuavo_train.data.images.part import WHOLE, Shard
from kuavo_train.data.images.source import ImageSource, RowSource

GIB = 2**30
BYTES_OF_BFLOAT16 = 2


@dataclass(frozen=True)
class Images:
    """The images of a stage's tasks.

    Attributes:
        sources: task → what gives its images, once they are filled.
        image_key: name of a camera → name in a batch of what it gives.
        fill: `fill(process=0, processes=1, progress=True)` computes this process's share of what is missing.
        description: what was chosen and why, what it takes on the disk and how much of that is there.
        look: bytes of what all cameras together give for one frame.
        problems: why it cannot be filled.
        caches: all that is read from the disk; none where frames are decoded anew.
        embeddings: task → the cache of its embeddings, where it is embeddings that are given.
        contexts, context_key: task → what the vision-language model makes of its rows, and the name of that in a batch;
            see contexts.py.
    """

    sources: Mapping[str, ImageSource]
    image_key: Callable[[str], str]
    fill: Callable[..., None]
    description: str
    look: int
    problems: Sequence[str] = ()
    caches: Sequence[EpisodeCache] = ()
    embeddings: Mapping[str, EpisodeCache] = field(default_factory=dict)
    contexts: Mapping[str, RowSource] = field(default_factory=dict)
    context_key: str = ""


def plan_images(
    config: DataConfig,
    decoded: Mapping[str, DecodedFrames],
    episodes: Mapping[str, Sequence[int]],
    encoder: Encoder | None,
    shard: Shard = WHOLE,
) -> Images:
    """Choose, and measure what it takes. Nothing is computed yet and nothing written.

    Args:
        decoded: task → its frames.
        episodes: task → the episodes that the stage reads.
        encoder: of the policy, frozen in this stage; None where it learns.
        shard: of the episodes that are to be computed here; what is chosen does not depend on it.
    """
    if encoder is None:
        return _frames(config, decoded, episodes, shard, "the image encoder is trained")
    if config.augmentation is not None:
        return _frames(config, decoded, episodes, shard, "data.augmentation changes the pictures")
    if not config.feature_cache:
        return _frames(config, decoded, episodes, shard, "data.feature_cache=false")
    form = FORMS[config.feature_dtype]
    caches = {name: feature_cache(frames, encoder, config.cache_folder, form) for name, frames in decoded.items()}
    size = cached_bytes(caches, episodes)
    if size > config.feature_cache_limit_gib * GIB:
        over = (
            f"they would take {size_text(size)}, over data.feature_cache_limit_gib={config.feature_cache_limit_gib:g}"
        )
        return _frames(config, decoded, episodes, shard, over)

    def fill(**how: Unpack[How]) -> None:
        for name, cache in caches.items():
            frames = frame_cache(decoded[name], config.cache_folder)
            there = not frames.missing(cache.missing(shard.of(episodes[name])))
            source = CachedFrames(frames) if there else decoded[name]
            fill_features(cache, encoder, source, episodes[name], form, shard, **how)

    tokens, stored = next(shape for cache in caches.values() for shape in cache.shapes.values())
    width = form.width(stored)
    what = f"embeddings by the frozen encoder, {tokens} × {width} {form.text} per camera"
    return Images(
        {name: CachedFeatures(cache, form) for name, cache in caches.items()},
        encoder.image_key,
        fill,
        _description(what, caches, episodes, shard),
        max(len(frames.shapes) for frames in decoded.values()) * tokens * width * BYTES_OF_BFLOAT16,
        disk_problems(config, "data.feature_cache=false", caches, episodes, shard),
        list(caches.values()),
        caches,
    )


def _frames(
    config: DataConfig,
    decoded: Mapping[str, DecodedFrames],
    episodes: Mapping[str, Sequence[int]],
    shard: Shard,
    why_not_embeddings: str,
) -> Images:
    because = f"(no embeddings: {why_not_embeddings})"
    caches = {name: frame_cache(frames, config.cache_folder) for name, frames in decoded.items()}
    if not config.frame_cache:
        description = f"  images: decoded anew for every batch, data.frame_cache=false {because}"
        return Images(decoded, str, lambda **_: None, description, _look(caches))

    def fill(**how: Unpack[How]) -> None:
        for name, cache in caches.items():
            fill_frames(cache, decoded[name], episodes[name], shard, **how)

    return Images(
        {name: CachedFrames(cache) for name, cache in caches.items()},
        str,
        fill,
        _description(f"frames {because}", caches, episodes, shard),
        _look(caches),
        disk_problems(config, "data.frame_cache=false", caches, episodes, shard),
        list(caches.values()),
    )


def _description(
    what: str, caches: Mapping[str, EpisodeCache], episodes: Mapping[str, Sequence[int]], shard: Shard
) -> str:
    lines = [f"  images: {what}; {filling(caches, episodes, shard)}"]
    others = {path: size for cache in caches.values() for path, size in cache.others().items()}
    if others:
        names = ", ".join(path.name for path in others)
        lines.append(
            f"  beside them {size_text(sum(others.values()))} of other weights or settings, to be deleted if no other "
            f"run needs them (python -m kuavo_train.cache prune=list): {names}"
        )
    return "\n".join(lines)


def filling(caches: Mapping[str, EpisodeCache], episodes: Mapping[str, Sequence[int]], shard: Shard = WHOLE) -> str:
    """What they take on the disk, and how much of that, or of the shard's part of it, is there."""
    missing = _missing_bytes(caches, episodes, shard)
    folder = next(iter(caches.values())).path.parent
    it = "it" if shard == WHOLE else f"shard {shard}"
    there = f"{size_text(missing)} of {it} to be computed now" if missing else f"all of {it} there"
    return f"{size_text(cached_bytes(caches, episodes))} in {folder}, {there}"


def disk_problems(
    config: DataConfig,
    off: str,
    caches: Mapping[str, EpisodeCache],
    episodes: Mapping[str, Sequence[int]],
    shard: Shard = WHOLE,
) -> list[str]:
    """What the disk lacks for them.

    Args:
        off: the setting that does without.
    """
    needed = _missing_bytes(caches, episodes, shard)
    folder = config.cache_folder.absolute()
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.is_dir())).free
    if needed <= free:
        return []
    return [
        f"{off.partition('=')[0]} needs {size_text(needed)} below {config.cache_folder}, {size_text(free)} are free; "
        f"free some, set data.cache_root to another disk, or {off}"
    ]


def _look(caches: Mapping[str, EpisodeCache]) -> int:
    return max(cache.row_bytes for cache in caches.values())


def cached_bytes(caches: Mapping[str, EpisodeCache], episodes: Mapping[str, Sequence[int]]) -> int:
    """Of these episodes, whether they are filled or not."""
    return sum(cache.size(episodes[name]) for name, cache in caches.items())


def _missing_bytes(caches: Mapping[str, EpisodeCache], episodes: Mapping[str, Sequence[int]], shard: Shard) -> int:
    return sum(cache.size(cache.missing(shard.of(episodes[name]))) for name, cache in caches.items())


def size_text(count: int) -> str:
    """Bytes, to be read."""
    for unit, size in (("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size / 10:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"
