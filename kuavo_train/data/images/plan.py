"""What a stage's images come from: embeddings by a frozen encoder, frames in a memory map, or decoding.

The rule, applied in this order and shown in the stage's table:

    embeddings   the image encoder is frozen, data.augmentation is null, data.feature_cache is true, and they
                 take no more than data.feature_cache_limit_gib
    frames       data.frame_cache is true
    decoding     anew for every batch

Of a task that is read from an exported file there are embeddings and no pictures, so that the first must be chosen.

They are filled before training. With data.feature_fill=along, embeddings of what is trained on are computed on the way.
"""

import json
import math
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Protocol, Unpack

from kuavo_train.config import DataConfig
from kuavo_train.data.images.along import Along, Complete, FeaturesAlong, nothing_lacks
from kuavo_train.data.images.episode_cache import EpisodeCache, How
from kuavo_train.data.images.features import CachedFeatures, Encoder, feature_cache, fill_features
from kuavo_train.data.images.forms import FORMS
from kuavo_train.data.images.frames import CachedFrames, DecodedFrames, fill_frames, frame_cache
from kuavo_train.data.images.part import WHOLE, Shard
from kuavo_train.data.images.source import ImageSource, RowSource
from kuavo_train.data.replay.exported_file import KEY, ExportedTask
from kuavo_train.errors import ConfigError
from kuavo_train.reading import Json

GIB = 2**30
BYTES_OF_BFLOAT16 = 2
FOR_EMBEDDINGS = (
    "hold vision and connector fixed (training.freeze), and leave data.augmentation, data.feature_cache and "
    "data.feature_cache_limit_gib as they are"
)
"""What a user is to do."""


class Embedded(Protocol):
    """A task's embeddings: everything that decides them, and camera → shape of a frame's."""

    @property
    def key(self) -> Json: ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...


@dataclass(frozen=True)
class Images:
    """The images of a stage's tasks.

    Attributes:
        sources: task → what gives its images, once they are filled; of embeddings `along`, those that are there.
        image_key: name of a camera → name in a batch of what it gives.
        fill: `fill(process=0, processes=1, progress=True)` computes this process's share of what is missing, and leaves
            what is computed along.
        description: what was chosen and why, what it takes on the disk and how much of that is there.
        look: bytes of what all cameras together give for one frame.
        problems: why it cannot be filled.
        caches: all that is read from the disk; none where frames are decoded anew.
        embeddings: task → what there is of its embeddings, where it is embeddings that are given.
        why_not_embeddings: where it is not.
        embed: `embed(task, episodes, **how)` computes what is missing of one task's embeddings; `how` as of `fill`.
        in_part: tasks of which some rows alone have embeddings.
        contexts, context_key: task → what the vision-language model makes of its rows, and the name of that in a batch;
            see contexts.py.
        along: whether embeddings are computed while training goes on. complete: gives them to a batch, and stores them;
            wait: until they are stored; see along.py.
    """

    sources: Mapping[str, ImageSource]
    image_key: Callable[[str], str]
    fill: Callable[..., None]
    description: str
    look: int
    problems: Sequence[str] = ()
    caches: Sequence[EpisodeCache] = ()
    embeddings: Mapping[str, Embedded] = field(default_factory=dict)
    why_not_embeddings: str = ""
    embed: Callable[..., None] = lambda *_, **__: None
    in_part: Sequence[str] = ()
    contexts: Mapping[str, RowSource] = field(default_factory=dict)
    context_key: str = ""
    along: bool = False
    complete: Complete = nothing_lacks
    wait: Callable[[], None] = lambda: None


def plan_images(
    config: DataConfig,
    decoded: Mapping[str, DecodedFrames],
    episodes: Mapping[str, Sequence[int]],
    encoder: Encoder | None,
    exported: Mapping[str, ExportedTask] = MappingProxyType({}),
    shard: Shard = WHOLE,
    trained: Mapping[str, Sequence[int]] = MappingProxyType({}),
) -> Images:
    """Choose, and measure what it takes. Nothing is computed yet and nothing written.

    Args:
        decoded: task → its frames.
        episodes: task → the episodes that the stage reads.
        encoder: of the policy, frozen in this stage; None where it learns.
        exported: task → what a file holds of it, of tasks that have no frames.
        shard: of the episodes that are to be computed here; what is chosen does not depend on it.
        trained: task → those of `episodes` that the stage trains on.

    Raises:
        ConfigError: a task is exported, and the stage would take pictures, or embeddings by another encoder.
    """
    if encoder is None:
        return _frames(config, decoded, episodes, exported, shard, "the image encoder is trained")
    if config.augmentation is not None:
        return _frames(config, decoded, episodes, exported, shard, "data.augmentation changes the pictures")
    if not config.feature_cache:
        return _frames(config, decoded, episodes, exported, shard, "data.feature_cache=false")
    form, along = FORMS[config.feature_dtype], config.feature_fill == "along"
    caches = {name: feature_cache(frames, encoder, config.cache_folder, form) for name, frames in decoded.items()}
    size = cached_bytes(caches, episodes)
    if size > config.feature_cache_limit_gib * GIB:
        over = (
            f"they would take {size_text(size)}, over data.feature_cache_limit_gib={config.feature_cache_limit_gib:g}"
        )
        return _frames(config, decoded, episodes, exported, shard, over)
    for task in exported.values():
        _check_encoder(task, encoder)

    def embed(name: str, of_task: Sequence[int], **how: Unpack[How]) -> None:
        if name in caches:
            source = pictures(name, shard.of(of_task))
            fill_features(caches[name], encoder, source, of_task, form, shard, **how)

    def pictures(name: str, of_task: Sequence[int]) -> ImageSource:
        frames = frame_cache(decoded[name], config.cache_folder)
        return decoded[name] if frames.missing(caches[name].missing(of_task)) else CachedFrames(frames)

    def fill(**how: Unpack[How]) -> None:
        for name, cache in caches.items():
            if along:
                cache.take_rows()
            embed(name, [episode for episode in episodes[name] if episode not in later[name]], **how)

    later = {name: set(trained.get(name, ())) if along else set() for name in caches}
    sources = {
        name: FeaturesAlong(cache, form, pictures(name, sorted(later[name]))) if along else CachedFeatures(cache, form)
        for name, cache in caches.items()
    }
    on_the_way = Along(encoder, form)
    tokens, stored = next(shape for cache in caches.values() for shape in cache.shapes.values())
    width = form.width(stored)
    what = f"embeddings by the frozen encoder, {tokens} × {width} {form.text} per camera"
    read = {name: task.embeddings for name, task in exported.items()}
    lines = [_exported_text(task, encoder) for task in exported.values()]
    looks = [
        len(frames.shapes) * tokens * width * BYTES_OF_BFLOAT16
        + along * sum(math.prod(shape) for shape in frames.shapes.values())
        for frames in decoded.values()
    ]
    return Images(
        {**sources, **read},
        encoder.image_key,
        fill,
        "\n".join([_description(what, caches, episodes, shard, later), *lines]),
        max([*looks, *(each.row_bytes for each in read.values())]),
        disk_problems(config, "data.feature_cache=false", caches, episodes, shard),
        list(caches.values()),
        {**caches, **read},
        embed=embed,
        in_part=[name for name, each in read.items() if not each.whole],
        along=along,
        complete=on_the_way.complete,
        wait=on_the_way.wait,
    )


def _check_encoder(task: ExportedTask, encoder: Encoder) -> None:
    """Libraries of other versions are none: the demonstrations may be gone, and these would be a dead end."""
    for key, value in json.loads(json.dumps(encoder.settings)).items():  # as the file has them
        was = task.header.encoder.get(key)
        if key != "versions" and was != value:
            raise ConfigError(
                f"{KEY}={task.file}: {key} of the image encoder must be {_short(was)}, by which {task.name} was "
                f"embedded, got {_short(value)}; take the policy that the file was exported from, or export "
                f"{task.name} again from its demonstrations"
            )


def _exported_text(task: ExportedTask, encoder: Encoder) -> str:
    versions = task.header.encoder["versions"]
    with_others = versions != encoder.settings["versions"]
    how = f", made with {', '.join(map(' '.join, versions.items()))}" if with_others else ""
    return f"  images of {task.name}: embeddings of {len(task.embeddings.pictured):,} frames in {task.file}{how}"


def _short(value: object) -> str:
    return f"{str(value)[:12]}…" if len(str(value)) > 40 else str(value)


def _frames(
    config: DataConfig,
    decoded: Mapping[str, DecodedFrames],
    episodes: Mapping[str, Sequence[int]],
    exported: Mapping[str, ExportedTask],
    shard: Shard,
    why_not_embeddings: str,
) -> Images:
    for task in exported.values():
        raise ConfigError(
            f"{KEY}={task.file} must go with a stage that takes embeddings, since the file has no pictures of "
            f"{', '.join(exported)}, got pictures: {why_not_embeddings}; {FOR_EMBEDDINGS}"
        )
    for_nothing = "; so data.feature_fill=along has nothing to do" if config.feature_fill == "along" else ""
    because = f"(no embeddings: {why_not_embeddings}{for_nothing})"
    caches = {name: frame_cache(frames, config.cache_folder) for name, frames in decoded.items()}
    if not config.frame_cache:
        description = f"  images: decoded anew for every batch, data.frame_cache=false {because}"
        return Images(decoded, str, lambda **_: None, description, _look(caches), why_not_embeddings=why_not_embeddings)

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
        why_not_embeddings=why_not_embeddings,
    )


def _description(
    what: str,
    caches: Mapping[str, EpisodeCache],
    episodes: Mapping[str, Sequence[int]],
    shard: Shard,
    later: Mapping[str, Collection[int]] = MappingProxyType({}),
) -> str:
    strides = {cache.task.feature_stride for cache in caches.values()}
    thinned = [f", of one frame in {stride} (data.feature_stride)" for stride in strides if stride > 1]
    lines = [f"  images: {what}{''.join(thinned)}; {filling(caches, episodes, shard, later)}"]
    others = {path: size for cache in caches.values() for path, size in cache.others().items()}
    if others:
        names = ", ".join(path.name for path in others)
        lines.append(
            f"  beside them {size_text(sum(others.values()))} of other weights or settings, to be deleted if no other "
            f"run needs them (python -m kuavo_train.cache prune=list): {names}"
        )
    return "\n".join(lines)


def filling(
    caches: Mapping[str, EpisodeCache],
    episodes: Mapping[str, Sequence[int]],
    shard: Shard = WHOLE,
    later: Mapping[str, Collection[int]] = MappingProxyType({}),
) -> str:
    """What they take on the disk, and how much of that, or of the shard's part of it, is there.

    Args:
        later: task → those of its episodes that are computed along.
    """
    missing = _missing_bytes(caches, episodes, shard)
    along = sum(caches[name].missing_bytes(sorted(of_task)) for name, of_task in later.items())
    folder = next(iter(caches.values())).path.parent
    it = "it" if shard == WHOLE else f"shard {shard}"
    there = f"{size_text(missing - along)} of {it} to be computed now" if missing else f"all of {it} there"
    there += f", {size_text(along)} in the steps that first need it (data.feature_fill=along)" if along else ""
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
    return sum(cache.missing_bytes(shard.of(episodes[name])) for name, cache in caches.items())


def size_text(count: int) -> str:
    """Bytes, to be read."""
    for unit, size in (("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size / 10:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"
