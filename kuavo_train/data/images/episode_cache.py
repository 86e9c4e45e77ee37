"""A memory map per camera, filled episode by episode: what is computed from pictures once and read many times.

Files are those of part.py. Processes may fill one cache at the same time, each its own episodes, and machines parts of
their own, which are read as they lie. After a kill the episodes done are kept and the others are filled by the next who
needs them. Single rows may be stored too (along.py). Reading rows that were never filled is an error.
"""

import hashlib
import json
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
from tqdm import tqdm

from kuavo_sim.cpus import usable_cpus
from kuavo_train.data.images.part import WHOLE, Part, Shard
from kuavo_train.data.images.source import ImageSource
from kuavo_train.data.task import Task
from kuavo_train.reading import Json

PIECE = 64  # frames held in memory at once, per thread that decodes
DIGITS = 16  # of the key's hash, in the name of a cache


def digest_of(key: Json) -> str:
    """What names the cache of a key."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:DIGITS]


class EpisodeCache:
    """One task's arrays.

    Args:
        folder: holds the caches of this kind, of all tasks and keys.
        key: everything that decides the content, beside which frames of an episode are kept. A cache with another key
            is another cache.
        shapes: camera → shape of a row.
        dtype: of the arrays.
    """

    def __init__(self, folder: Path, task: Task, key: Json, shapes: Mapping[str, tuple[int, ...]], dtype: type):
        thinned = {} if task.feature_stride == 1 else {"feature_stride": task.feature_stride}
        self.task, self.key, self.shapes, self.dtype = task, {**key, **thinned}, dict(shapes), np.dtype(dtype)
        self.path = folder / f"{task.name}-{digest_of(self.key)}"
        self._opened: list[Part] = []

    @property
    def name(self) -> str:
        """Below `data.cache_root`."""
        return f"{self.path.parent.name}/{self.path.name}"

    def size(self, episodes: Iterable[int]) -> int:
        """Bytes that these episodes take."""
        return len(self.task.queries_of([*episodes])) * self.row_bytes

    @property
    def row_bytes(self) -> int:
        """Of one frame, all cameras together."""
        return sum(math.prod(shape) for shape in self.shapes.values()) * self.dtype.itemsize

    def part(self, shard: Shard = WHOLE) -> Part:
        """That of a machine, or what is computed without `shard`; it need not be there."""
        return Part(self.path.with_name(self.path.name + shard.suffix), self.task, self.shapes, self.dtype)

    def parts(self) -> list[Part]:
        """Those that are there. Raises `ConfigError` for one that is not whole."""
        paths = [self.path, *sorted(self.path.parent.glob(f"{self.path.name}.*-of-*"))]
        found = [Part(path, self.task, self.shapes, self.dtype) for path in paths if path.is_dir()]
        for part in found:
            part.check_whole()
        return found

    def missing(self, episodes: Iterable[int]) -> list[int]:
        """Those of which no part holds some row. Raises `ConfigError` as `parts`."""
        episodes = list(episodes)
        lacking = set(self.task.episode[self._missing_rows(episodes)].tolist())
        return [episode for episode in episodes if episode in lacking]

    def missing_bytes(self, episodes: Iterable[int]) -> int:
        """That the rows of these episodes will take which no part holds."""
        return len(self._missing_rows([*episodes])) * self.row_bytes

    def _missing_rows(self, episodes: Sequence[int]) -> np.ndarray:
        rows = self.task.queries_of(episodes)
        held = np.zeros(len(rows), bool)
        for part in self.parts():
            held |= part.holds(rows)
        return rows[~held]

    def take_rows(self) -> None:
        """From now on single rows may be stored, and are seen by all who read."""
        self.part().take_rows(self.key)
        self._opened = self.parts()

    def holds(self, rows: np.ndarray) -> np.ndarray:
        """[n] whether rows are there, after `take_rows`; others may come at any time."""
        assert self._opened, f"{self.path}: take_rows comes first"
        return np.any([part.holds(rows) for part in self._opened], axis=0)

    def store_rows(self, rows: np.ndarray, values: Mapping[str, np.ndarray]) -> None:
        """Camera → [n, …] of single rows, after `take_rows`. Raises `ConfigError` when the disk is full."""
        self._opened[0].store_rows(rows, values)  # the whole one, which no shard is

    def others(self) -> dict[Path, int]:
        """Caches of the same task with another key, and the bytes of disk that each takes."""
        found = self.path.parent.glob(f"{self.task.name}-{'?' * DIGITS}*")
        return {path: disk_bytes(path) for path in sorted(found) if not path.name.startswith(self.path.name)}

    def read(self, camera: str, rows: np.ndarray) -> np.ndarray:
        """[len(rows), …] Raises `RuntimeError` for rows that are not filled."""
        holders = self._holders(rows)
        found = np.unique(holders)
        if len(found) == 1:
            return self._opened[found[0]].read(camera, rows)
        values = np.empty((len(rows), *self.shapes[camera]), self.dtype)
        for holder in found:
            here = holders == holder
            values[here] = self._opened[holder].read(camera, rows[here])
        return values

    def _holders(self, rows: np.ndarray) -> np.ndarray:
        """[n] the opened part that holds each row; they are opened, and again where others have come since."""
        for look_again in (False, True):
            if look_again or not self._opened:
                self._opened = self.parts()
            held = np.array([part.holds(rows) for part in self._opened]).reshape(len(self._opened), len(rows))
            absent = self.task.episode[rows[~held.any(axis=0)]]
            if not len(absent):
                return held.argmax(axis=0)
        raise RuntimeError(f"{self.path} must hold episode {absent[0]} before it is read; it was not filled")


def disk_bytes(path: Path) -> int:
    """That a cache's folder takes, where files have holes."""
    return sum(file.stat().st_blocks * 512 for file in path.iterdir())


class How(TypedDict, total=False):
    """Which share of the episodes is filled, and whether a bar shows it: as `fill` takes them."""

    process: int
    processes: int
    progress: bool


def fill(
    cache: EpisodeCache,
    episodes: Sequence[int],
    source: ImageSource,
    *,
    convert: Callable[[torch.Tensor], np.ndarray],
    description: str,
    shard: Shard = WHOLE,
    process: int = 0,
    processes: int = 1,
    progress: bool = True,
) -> None:
    """Fill what is missing of this process's share of `episodes`.

    Args:
        shard: of the machine, which has a part of its own.
        source: read at most `PIECE` rows at a time, by several threads.
        convert: from what the source gives to what is stored; called by this thread alone.

    Raises:
        ConfigError: a video does not decode, or the disk does not take what is written.
    """
    # Of all, not of what is missing: others are filling theirs meanwhile.
    share = shard.of(episodes)[process::processes]
    missing = cache.missing(share)
    if not missing:
        return
    part = cache.part(shard)
    part.create(cache.key)
    pieces = {episode: list(_pieces(cache, episode)) for episode in missing}
    cores = usable_cpus()
    with (
        ThreadPoolExecutor(cores) as pool,
        tqdm(
            total=len(share),
            initial=len(share) - len(missing),
            desc=description,
            unit="episode",
            disable=not progress,
            leave=False,
        ) as bar,
    ):
        read = _ahead(pool, source, (piece for of_episode in pieces.values() for piece in of_episode), cores)
        for episode, of_episode in pieces.items():
            for camera, rows in of_episode:
                part.write(camera, int(rows[0]), convert(next(read)))
            part.mark_filled(episode)
            bar.update()


def _pieces(cache: EpisodeCache, episode: int) -> Iterator[tuple[str, np.ndarray]]:
    """Camera by camera, the rows in pieces."""
    rows = cache.task.queries_of([episode])
    for camera in cache.shapes:
        for first in range(0, len(rows), PIECE):
            yield camera, rows[first : first + PIECE]


def _ahead(
    pool: ThreadPoolExecutor, function: Callable[..., torch.Tensor], arguments: Iterable[tuple], count: int
) -> Iterator[torch.Tensor]:
    """Results in order, with `count` more under way: `pool.map` would hold all that nobody has taken yet."""
    waiting: deque = deque()
    for each in arguments:
        waiting.append(pool.submit(function, *each))
        if len(waiting) > count:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
