"""The files of a cache, or of the part of it that one machine computes ahead of time.

<task>-<hash of the key>/             the cache itself
<task>-<hash of the key>.2-of-8/      the second of eight parts, to be copied beside it
    key.json         everything that decides the content
    dataset.json     where the dataset lay
    <camera>.npy     [N, …], a row per frame of its episodes, or per n-th frame (data.feature_stride); takes no disk
                     where episodes are missing
    filled           a byte per episode of the dataset, 1 once all its rows are on the disk
    filled_rows      where single frames were stored: a byte per row of the arrays, 1 once that row is on the disk
"""

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from uuid import uuid4

import numpy as np

from kuavo_train.data.task import Task
from kuavo_train.errors import ConfigError, require
from kuavo_train.reading import Json

KEY, DATASET, FILLED, FILLED_ROWS = "key.json", "dataset.json", "filled", "filled_rows"


@dataclass(frozen=True)
class Shard:
    """One of `count` machines: it computes every `count`-th episode of a dataset, from the `number`-th on."""

    number: int = 1
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """`2/8`. Raises `ConfigError`."""
        found = re.fullmatch(r"(\d+)/(\d+)", text)
        valid = found is not None and 1 <= int(found[1]) <= int(found[2])
        require(valid, "shard", "be i/n with 1 <= i <= n, such as 2/8 on the second of eight machines", text)
        assert found is not None
        return cls(int(found[1]), int(found[2]))

    def of(self, episodes: Sequence[int]) -> list[int]:
        """Those that are this machine's, whichever others a stage reads."""
        return [episode for episode in episodes if episode % self.count == self.number - 1]

    @property
    def suffix(self) -> str:
        return "" if self.count == 1 else f".{self.number}-of-{self.count}"

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


WHOLE = Shard()


class Part:
    """Rows of a task's episodes, all of them or a shard's.

    Args:
        path: of its folder; the shard is read off its name.
        shapes: camera → shape of a row.
        dtype: of the arrays.
    """

    def __init__(self, path: Path, task: Task, shapes: Mapping[str, tuple[int, ...]], dtype: np.dtype):
        self.path, self.task, self.shapes, self.dtype = path, task, shapes, dtype
        numbers = path.suffix.removeprefix(".").split("-of-")
        shard = Shard(*map(int, numbers)) if path.suffix else WHOLE
        lengths = -(-np.diff(task.bounds, axis=1)[:, 0] // task.feature_stride)
        here = np.isin(np.arange(len(lengths)), shard.of(range(len(lengths))))
        ends = np.cumsum(np.where(here, lengths, 0))
        self.rows = int(ends[-1])
        self._firsts = ends - lengths

    @property
    def is_there(self) -> bool:
        return self.path.is_dir()

    @cached_property
    def filled(self) -> np.memmap:
        """[E] 1 for each episode whose rows are there."""
        return np.memmap(self.path / FILLED, np.uint8, "r")

    @cached_property
    def filled_rows(self) -> np.memmap | None:
        """1 for each row of the arrays that was stored alone; None where all were stored with their episode."""
        file = self.path / FILLED_ROWS
        return np.memmap(file, np.uint8, "r") if file.is_file() else None

    def holds(self, rows: np.ndarray) -> np.ndarray:
        """[n] whether rows of the task are there. Raises `RuntimeError` as `read`."""
        held = self.filled[self.task.episode[rows]] == 1
        return held if self.filled_rows is None else held | (self.filled_rows[self._places(rows)] == 1)

    def read(self, camera: str, rows: np.ndarray) -> np.ndarray:
        """[len(rows), …] of rows of the task. Raises `RuntimeError` for those that no sample may be of."""
        return self._maps[camera][self._places(rows)]

    def _places(self, rows: np.ndarray) -> np.ndarray:
        """[n] of rows of the task in the arrays."""
        episodes, stride = self.task.episode[rows], self.task.feature_stride
        frames = rows - self.task.bounds[episodes, 0]
        if between := frames[frames % stride != 0].tolist():
            raise RuntimeError(f"{self.path} holds one frame in {stride} of an episode, got frame {between[0]}")
        return self._firsts[episodes] + frames // stride

    def check_whole(self) -> None:
        """Raises `ConfigError` for one that was not copied to its end."""
        try:
            assert (self.path / KEY).is_file(), f"no {KEY}"
            assert len(self.filled) == len(self.task.bounds), f"{FILLED} of {len(self.filled)} episodes"
            if self.filled_rows is not None:
                assert len(self.filled_rows) == self.rows, f"{FILLED_ROWS} of {len(self.filled_rows)} rows"
            for camera, array in self._maps.items():
                assert array.shape == (self.rows, *self.shapes[camera]), f"{camera}.npy of shape {array.shape}"
        except (OSError, ValueError, AssertionError) as error:
            raise ConfigError(
                f"{self.path} must be whole, got {error}; copy it again from where it was computed, or delete it"
            ) from error

    def create(self, key: Json) -> None:
        """Lay the files out, unless they are there; who comes first wins.

        Raises:
            ConfigError: the folder cannot be written.
        """
        if self.is_there:
            return
        partial = self.path.with_name(f".{self.path.name}-{uuid4().hex}")
        try:
            partial.mkdir(parents=True)
            (partial / KEY).write_text(json.dumps(key, indent=1))
            (partial / DATASET).write_text(json.dumps({"root": str(self.task.root.absolute())}))
            for camera, shape in self.shapes.items():
                np.lib.format.open_memmap(partial / f"{camera}.npy", "w+", self.dtype, (self.rows, *shape))
            (partial / FILLED).write_bytes(bytes(len(self.task.bounds)))
            partial.rename(self.path)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            if not self.is_there:
                raise self._unwritable(error) from error

    def take_rows(self, key: Json) -> None:
        """Lay the files out, as `create`, also for rows that are stored alone. Processes may do so at the same time."""
        self.create(key)
        try:
            with open(self.path / FILLED_ROWS, "ab") as file:
                file.truncate(self.rows)
        except OSError as error:
            raise self._unwritable(error) from error

    def write(self, camera: str, first_row: int, values: np.ndarray) -> None:
        """Store values [n, …] of rows that are stored one after another. Raises `ConfigError` when the disk is full."""
        (place,) = self._places(np.array([first_row])).tolist()
        self._write_at(f"{camera}.npy", [(self._offset(camera, place), self._checked(camera, values).data)])

    def mark_filled(self, episode: int) -> None:
        self._write_at(FILLED, [(episode, b"\1")])

    def store_rows(self, rows: np.ndarray, values: Mapping[str, np.ndarray]) -> None:
        """Store camera → [n, …] of any rows of the task, then mark them. Other processes may store others meanwhile.

        Raises:
            ConfigError: when the disk is full.
        """
        places = self._places(rows).tolist()
        for camera, of_camera in values.items():
            pieces = zip(places, self._checked(camera, of_camera), strict=True)
            self._write_at(f"{camera}.npy", ((self._offset(camera, place), each.data) for place, each in pieces))
        self._write_at(FILLED_ROWS, ((place, b"\1") for place in places))

    def _checked(self, camera: str, values: np.ndarray) -> np.ndarray:
        values, shape = np.ascontiguousarray(values, dtype=self.dtype), self.shapes[camera]
        assert values.shape[1:] == shape, f"{camera}: rows of {shape}, got {values.shape[1:]}"
        return values

    def _offset(self, camera: str, place: int) -> int:
        array = self._maps[camera]
        return array.offset + place * array[:1].nbytes

    def _write_at(self, name: str, pieces: Iterable[tuple[int, bytes | memoryview]]) -> None:
        """On the disk when it returns, so that nothing is ever marked before it is there.

        Through the file: on a full disk, writing to a memory map would kill the process.

        Args:
            pieces: offset in the file and content of each.
        """
        try:
            with open(self.path / name, "r+b") as file:
                for offset, content in pieces:
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
