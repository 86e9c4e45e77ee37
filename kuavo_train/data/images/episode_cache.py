"""A memory map per camera, filled episode by episode: what is computed from pictures once and read many times.

    <folder>/<task>-<hash of the key>/
        key.json         everything that decides the content
        <camera>.npy     [N, …], a row per frame of the dataset; takes no disk where episodes are missing
        filled           a byte per episode, 1 once all its rows are on the disk

Processes may fill one cache at the same time, each its own episodes. After a kill the episodes done are kept and
the others are filled by the next who needs them. Reading rows of an episode that was never filled is an error.
"""

import hashlib
import json
import math
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TypedDict
from uuid import uuid4

import numpy as np
import torch
from tqdm import tqdm

from kuavo_sim.cpus import usable_cpus
from kuavo_train.data.images.source import ImageSource
from kuavo_train.data.task import Task
from kuavo_train.errors import ConfigError
from kuavo_train.reading import Json

PIECE = 64  # frames held in memory at once, per thread that decodes


class EpisodeCache:
    """One task's arrays.

    Args:
        folder: holds the caches of this kind, of all tasks and keys.
        key: everything that decides the content. A cache with another key is another cache.
        shapes: camera → shape of a row.
        dtype: of the arrays.
    """

    def __init__(self, folder: Path, task: Task, key: Json, shapes: Mapping[str, tuple[int, ...]], dtype: type):
        self.task, self.key, self.shapes, self.dtype = task, dict(key), dict(shapes), np.dtype(dtype)
        digest = hashlib.sha256(json.dumps(self.key, sort_keys=True).encode()).hexdigest()
        self.path = folder / f"{task.name}-{digest[:16]}"

    def size(self, episodes: Iterable[int]) -> int:
        """Bytes that these episodes take."""
        frames = sum(int(np.diff(self.task.bounds[episode]).item()) for episode in episodes)
        return frames * self.row_bytes

    @property
    def row_bytes(self) -> int:
        """Of one frame, all cameras together."""
        return sum(math.prod(shape) for shape in self.shapes.values()) * self.dtype.itemsize

    def missing(self, episodes: Iterable[int]) -> list[int]:
        if not self.path.is_dir():
            return list(episodes)
        filled = np.fromfile(self.path / "filled", np.uint8)
        return [episode for episode in episodes if not filled[episode]]

    def others(self) -> dict[Path, int]:
        """Caches of the same task with another key, and the bytes of disk that each takes."""
        found = (path for path in self.path.parent.glob(f"{self.task.name}-{'?' * 16}") if path != self.path)
        return {path: sum(file.stat().st_blocks * 512 for file in path.iterdir()) for path in sorted(found)}

    def read(self, camera: str, rows: np.ndarray) -> np.ndarray:
        """[len(rows), …] Raises `RuntimeError` for rows whose episode is not filled."""
        episodes = self.task.episode[rows]
        absent = episodes[self._filled[episodes] == 0]
        if len(absent):
            raise RuntimeError(f"{self.path} must hold episode {absent[0]} before it is read; it was not filled")
        return self._maps[camera][rows]

    def create(self) -> None:
        """Lay the files out, unless they are there; who comes first wins.

        Raises:
            ConfigError: the folder cannot be written.
        """
        if self.path.is_dir():
            return
        partial = self.path.with_name(f".{self.path.name}-{uuid4().hex}")
        try:
            partial.mkdir(parents=True)
            (partial / "key.json").write_text(json.dumps(self.key, indent=1))
            for camera, shape in self.shapes.items():
                np.lib.format.open_memmap(partial / f"{camera}.npy", "w+", self.dtype, (len(self.task.state), *shape))
            (partial / "filled").write_bytes(bytes(len(self.task.bounds)))
            partial.rename(self.path)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            if not self.path.is_dir():
                raise self._unwritable(error) from error

    def write(self, camera: str, first_row: int, values: np.ndarray) -> None:
        """Store values [n, …] of consecutive rows. Raises `ConfigError` when the disk is full."""
        values = np.ascontiguousarray(values, dtype=self.dtype)
        array = self._maps[camera]
        assert values.shape[1:] == array.shape[1:], f"{camera}: rows of {array.shape[1:]}, got {values.shape[1:]}"
        # Through the file: on a full disk, writing to a memory map would kill the process.
        self._write_at(f"{camera}.npy", array.offset + first_row * array[:1].nbytes, values.data)

    def mark_filled(self, episode: int) -> None:
        self._write_at("filled", episode, b"\1")

    def _write_at(self, name: str, offset: int, content: bytes | memoryview) -> None:
        """On the disk when it returns, so that an episode is never marked before its rows are there."""
        try:
            with open(self.path / name, "r+b") as file:
                file.seek(offset)
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> ConfigError:
        return ConfigError(f"data.cache_root must be a folder that can be written, got {self.path}: {error}")

    @cached_property
    def _maps(self) -> dict[str, np.memmap]:
        return {camera: np.load(self.path / f"{camera}.npy", mmap_mode="r") for camera in self.shapes}

    @cached_property
    def _filled(self) -> np.memmap:
        return np.memmap(self.path / "filled", np.uint8, "r")


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
    process: int = 0,
    processes: int = 1,
    progress: bool = True,
) -> None:
    """Fill what is missing of this process's share of `episodes`.

    Args:
        source: read at most `PIECE` rows at a time, by several threads.
        convert: from what the source gives to what is stored; called by this thread alone.

    Raises:
        ConfigError: a video does not decode, or the disk does not take what is written.
    """
    share = episodes[process::processes]  # of all, not of what is missing: others are filling theirs meanwhile
    missing = cache.missing(share)
    if not missing:
        return
    cache.create()
    pieces = {episode: list(_pieces(cache, *cache.task.bounds[episode].tolist())) for episode in missing}
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
                cache.write(camera, int(rows[0]), convert(next(read)))
            cache.mark_filled(episode)
            bar.update()


def _pieces(cache: EpisodeCache, first_row: int, end: int) -> Iterator[tuple[str, np.ndarray]]:
    """Camera by camera, the rows in pieces."""
    for camera in cache.shapes:
        for first in range(first_row, end, PIECE):
            yield camera, np.arange(first, min(first + PIECE, end))


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
