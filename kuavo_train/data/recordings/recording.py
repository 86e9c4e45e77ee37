"""A LeRobot v3 dataset as its files hold it, read where it lies.

`LeRobotDataset` turns to the hub as soon as one file of a folder is missing, wants the videos of cameras that nobody
uses, and copies tables and pictures as Arrow into the home folder before the first row. Here the files that are used
are read by pyarrow, each of them named when it is missing or damaged; nothing is fetched and nothing copied.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TypedDict

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from lerobot.datasets.dataset_metadata import CODEBASE_VERSION
from lerobot.datasets.utils import DEFAULT_DATA_PATH, DEFAULT_TASKS_PATH, DEFAULT_VIDEO_PATH, EPISODES_DIR, INFO_PATH

from kuavo_train.errors import ConfigError, said
from kuavo_train.reading import Json

PLACE = ("episode_index", "frame_index", "index", "timestamp", "task_index")
"""Columns beside the features that every row has."""
NAMED = 5
"""Files or episodes that a message names."""
GROUPS_AT_ONCE = 4
"""Row groups of pictures that are kept, where a camera is stored as images."""


@dataclass(frozen=True)
class Recording:
    """What a dataset says of itself.

    Attributes:
        fps: frames per second of all episodes.
        features: key → its dtype, shape and names.
        episodes: column of meta/episodes → [E], without the statistics; episode e at place e.
        sentences: task_index → what the dataset says was to be done, as it is written there.
    """

    root: Path
    fps: float
    features: dict[str, Json]
    data_path: str
    video_path: str
    episodes: dict[str, np.ndarray]
    sentences: dict[int, str]

    @property
    def camera_keys(self) -> list[str]:
        return [key for key, about in self.features.items() if about.get("dtype") in ("video", "image")]

    @property
    def video_keys(self) -> list[str]:
        return [key for key, about in self.features.items() if about.get("dtype") == "video"]

    @property
    def depth_keys(self) -> list[str]:
        """Those that LeRobot marks as depth maps."""
        marks = ("is_depth_map", "video.is_depth_map")
        return [key for key in self.features if any(self.about_video(key).get(mark) for mark in marks)]

    def about_video(self, key: str) -> Json:
        """What a converter has written down of the video or the pictures of a feature: pixels, rate, codec."""
        feature = self.features[key]
        return {**(feature.get("video_info") or {}), **(feature.get("info") or {})}

    @property
    def lengths(self) -> np.ndarray:
        """[E] frames of each episode."""
        return self.episodes["length"]

    @property
    def bounds(self) -> np.ndarray:
        """[E, 2] first row and one past the last row of each episode."""
        return np.stack([self.episodes["dataset_from_index"], self.episodes["dataset_to_index"]], axis=1)

    def segments(self, key: str) -> np.ndarray:
        """[E, 2] where each episode begins and ends in its file of the video `key`, in s."""
        columns = [self._column(f"videos/{key}/{end}_timestamp", np.number) for end in ("from", "to")]
        return np.stack(columns, axis=1).astype(np.float64)

    def video_files(self, key: str, episodes: Sequence[int]) -> list[str]:
        """Of each episode, its file of the video `key`, relative to `root`."""
        chunks, files = (self._column(f"videos/{key}/{which}_index") for which in ("chunk", "file"))
        return [
            self.video_path.format(video_key=key, chunk_index=int(chunks[e]), file_index=int(files[e]))
            for e in episodes
        ]

    @cached_property
    def data_files(self) -> list[str]:
        """Files of the tables, relative to `root`, in the order of their rows."""
        places = zip(self._column("data/chunk_index").tolist(), self._column("data/file_index").tolist(), strict=True)
        return [self.data_path.format(chunk_index=chunk, file_index=file) for chunk, file in sorted(set(places))]

    def missing(self, cameras: Iterable[str], episodes: Sequence[int]) -> list[str]:
        """Files that are used and not there: the tables, and the episodes' videos of `cameras`."""
        videos = [file for key in cameras if key in self.video_keys for file in self.video_files(key, episodes)]
        return [file for file in dict.fromkeys([*self.data_files, *videos]) if not (self.root / file).is_file()]

    def read(self, keys: Sequence[str]) -> dict[str, np.ndarray]:
        """Columns of all rows: [N] of numbers, [N, D] of vectors. One that the tables lack is left out.

        Raises:
            ConfigError: a file that cannot be read, a column that is in some files only, or rows of different widths.
        """
        found: dict[str, list[np.ndarray]] = {}
        for file in self.data_files:
            table = _read_parquet(self.root / file, keys)
            for key in table.column_names:
                values = _values(table[key], f"{key} in {self.root / file}")
                found.setdefault(key, []).append(values.copy())  # a view would keep all of Arrow's memory until the end
        pa.default_memory_pool().release_unused()
        for key, parts in found.items():
            widths = {part.shape[1:] for part in parts}
            if len(parts) != len(self.data_files) or len(widths) > 1:
                raise ConfigError(
                    f"{key} must be in all {len(self.data_files)} tables of {self.root} with one width, got "
                    f"{len(parts)} of them, of widths {sorted(widths)}; convert the recording again"
                )
        return {key: np.concatenate(found.pop(key)) for key in list(found)}  # a key's parts go before the next is whole

    def numbers(self, key: str) -> np.ndarray:
        """[N] a column of one number per row. Raises `ConfigError` where the tables lack it."""
        found = self.read([key])
        if key not in found:
            raise ConfigError(self._lacks(key))
        return found[key].reshape(-1)

    def texts(self, key: str) -> np.ndarray:
        """[N] a column of strings; empty where a row has none. Raises `ConfigError` where the tables lack it."""
        found: list[str] = []
        for file in self.data_files:
            table = _read_parquet(self.root / file, [key])
            if key not in table.column_names:
                raise ConfigError(self._lacks(key))
            found += ["" if text is None else str(text) for text in table[key].to_pylist()]
        return np.array(found, dtype=str)

    def _lacks(self, key: str) -> str:
        return (
            f"{self.root}: tables must have the column {key}, which {INFO_PATH} lists; copy the files of data/ again, "
            "or record or convert it again"
        )

    def pictures(self, key: str, rows: Iterable[int]) -> list[bytes]:
        """The pictures of a camera that is stored as images, as files hold them (PNG), in the order of `rows`.

        Raises:
            ConfigError: a file that cannot be read, or a picture that is neither in the table nor where it says.
        """
        return [self._picture(key, row) for row in rows]

    def _picture(self, key: str, row: int) -> bytes:
        ends = self._group_ends
        group = int(np.searchsorted(ends, row, side="right"))
        first = int(ends[group - 1]) if group else 0
        file, number = self._groups[group]
        held = _read_group(self.root / file, number, key)[row - first]
        encoded = None if held is None else held.get("bytes")
        if encoded is not None:
            return encoded
        path = self.root / str(held and held.get("path"))
        if not path.is_file():
            raise ConfigError(f"{key} of row {row} must be a picture in {self.root / file} or a file, got {path}")
        return path.read_bytes()

    @cached_property
    def _groups(self) -> list[tuple[str, int]]:
        """(file, place in it) of every group of rows that parquet reads at once."""
        return [(file, n) for file in self.data_files for n in range(pq.read_metadata(self.root / file).num_row_groups)]

    @cached_property
    def _group_ends(self) -> np.ndarray:
        """[G] one past the last row of each group."""
        metadata = {file: pq.read_metadata(self.root / file) for file in self.data_files}
        return np.cumsum([metadata[file].row_group(number).num_rows for file, number in self._groups])

    def _column(self, name: str, kind: type = np.integer) -> np.ndarray:
        values = self.episodes.get(name)
        if values is None or not np.issubdtype(values.dtype, kind):
            got = "no such column" if values is None else f"values like {values[0]}"
            raise ConfigError(
                f"{self.root / EPISODES_DIR} must hold where each episode lies, in {name}, got {got}; convert the "
                "recording again"
            )
        return values


def open_recording(root: Path, where: str) -> Recording:
    """Raises `ConfigError` that names the file: missing, damaged, of an older format, or at odds with another."""
    if not (root / INFO_PATH).is_file():
        raise MissingFiles(where, [INFO_PATH])
    info = _read_info(root, where)
    missing = [] if (root / DEFAULT_TASKS_PATH).is_file() else [DEFAULT_TASKS_PATH]
    files = sorted((root / EPISODES_DIR).glob("*/*.parquet"))
    missing += [] if files else [f"{EPISODES_DIR}/chunk-000/file-000.parquet"]
    if missing:
        raise MissingFiles(where, missing)
    return Recording(
        root=root,
        fps=info["fps"],
        features=info["features"],
        data_path=info.get("data_path") or DEFAULT_DATA_PATH,
        video_path=info.get("video_path") or DEFAULT_VIDEO_PATH,
        episodes=_read_episodes(files, info, where),
        sentences=_read_sentences(root / DEFAULT_TASKS_PATH),
    )


class MissingFiles(ConfigError):
    """Files that must be there for a dataset to be read.

    Attributes:
        files: relative to the dataset's folder.
    """

    def __init__(self, where: str, files: Sequence[str]):
        more = f" and {len(files) - NAMED} more" if len(files) > NAMED else ""
        super().__init__(
            f"{where} lacks {', '.join(files[:NAMED])}{more}; copy what is missing from where the dataset comes from, "
            "or record or convert it again"
        )
        self.files = list(files)


def recorded_fps(root: Path) -> float | None:
    """Of a dataset, whatever else is wrong with it; None where it does not say."""
    try:
        return json.loads((root / INFO_PATH).read_text()).get("fps")
    except (OSError, ValueError, AttributeError):
        return None


def _read_info(root: Path, where: str) -> Json:
    path = root / INFO_PATH
    try:
        info = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{where} must have a {INFO_PATH} that can be read, got {said(error)}; copy the file again"
        ) from error
    features = info.get("features") if isinstance(info, dict) else None
    if not isinstance(features, dict) or not all(isinstance(about, dict) for about in features.values()):
        raise ConfigError(f"{path} must hold the dataset's features, got {str(features or info)[:80]}")
    version = info.get("codebase_version")
    if str(version).split(".")[0] != CODEBASE_VERSION.split(".")[0]:
        raise ConfigError(
            f"{where} must be of LeRobot's format {CODEBASE_VERSION}, got {version}; convert it where it lies: "
            f"python -m lerobot.scripts.convert_dataset_v21_to_v30 --repo-id=local/{root.name} --root={root} "
            f"--push-to-hub=false (the old one is kept as {root}_old)"
        )
    fps = info.get("fps")
    if isinstance(fps, bool) or not isinstance(fps, int | float) or not fps > 0:
        raise ConfigError(f"{path} must give fps, the frames per second, as a number above 0, got {fps!r}")
    for key in ("data_path", "video_path"):
        try:
            str(info.get(key) or "").format(chunk_index=0, file_index=0, video_key="")
        except (KeyError, IndexError, ValueError) as error:
            raise ConfigError(
                f"{path} must give {key} with chunk_index, file_index and video_key, got {info[key]!r}; convert the "
                "recording again"
            ) from error
    return info


def _read_episodes(files: Sequence[Path], info: Json, where: str) -> dict[str, np.ndarray]:
    """Columns of meta/episodes with numbers in them, by episode."""
    tables = []
    for file in files:
        names = [name for name in _columns(file) if not name.startswith(("stats/", "meta/"))]
        table = _read_parquet(file, names)
        scalars = [name for name in names if pa.types.is_primitive(table.schema.field(name).type)]
        tables.append(table.select(scalars))
    table = pa.concat_tables(tables, promote_options="permissive")
    columns = {name: table[name].to_numpy() for name in table.column_names}
    for name in ("episode_index", "length", "dataset_from_index", "dataset_to_index"):
        if name not in columns or not np.issubdtype(columns[name].dtype, np.integer):
            raise ConfigError(f"{where}: {EPISODES_DIR} must have whole numbers in {name}; convert the recording again")
    found = columns["episode_index"]
    there, counts = np.unique(found, return_counts=True)
    counted = info.get("total_episodes", len(found))
    twice, absent = there[counts > 1], np.setdiff1d(np.arange(counted), there)
    beyond = np.setdiff1d(there, np.arange(counted))
    wrong = {"twice": twice, "not at all": absent, f"beyond the {counted} of {INFO_PATH}": beyond}
    if any(map(len, wrong.values())):
        got = "; ".join(f"{episode_list(episodes)} {how}" for how, episodes in wrong.items() if len(episodes))
        raise ConfigError(
            f"{where}: {EPISODES_DIR} must describe each of the {counted} episodes that {INFO_PATH} counts once, got "
            f"{got}; a recording that was cut off lacks its last ones: record or convert it again"
        )
    order = np.argsort(found)
    return {name: values[order] for name, values in columns.items()}


def _read_sentences(path: Path) -> dict[int, str]:
    try:
        table = pd.read_parquet(path)
        sentences = table.get("task", table.index)
        return {int(number): str(text) for number, text in zip(table["task_index"], sentences, strict=True)}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} must give every task_index its sentence, got {said(error)}; {_COPY_AGAIN}"
        ) from error


_COPY_AGAIN = "copy the file again from where the dataset comes from, or record or convert it again"


def _columns(path: Path) -> list[str]:
    try:
        return pq.read_schema(path).names
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(f"{path} must be a whole parquet file, got {said(error)}; {_COPY_AGAIN}") from error


def _read_parquet(path: Path, keys: Sequence[str]) -> pa.Table:
    """The columns of `keys` that are there."""
    there = [key for key in _columns(path) if key in keys]
    try:
        with pq.ParquetFile(path) as file:
            return file.read(columns=there).select(there)  # pyarrow takes "a" for "a.b" as well
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(f"{path} must be a whole parquet file, got {said(error)}; {_COPY_AGAIN}") from error


class StoredPicture(TypedDict, total=False):
    bytes: bytes | None
    path: str | None


"""As `datasets` stores it: encoded, or in a file of its own, or both."""


@lru_cache(maxsize=GROUPS_AT_ONCE)
def _read_group(path: Path, number: int, key: str) -> list[StoredPicture | None]:
    try:
        with pq.ParquetFile(path) as file:
            return file.read_row_group(number, columns=[key])[key].to_pylist()
    except (OSError, KeyError, pa.ArrowException) as error:
        raise ConfigError(f"{path} must hold the pictures of {key}, got {said(error)}; {_COPY_AGAIN}") from error


def _values(column: pa.ChunkedArray, what: str) -> np.ndarray:
    """[N], or [N, D] where rows are vectors of one width, also when they are nested ([1, D])."""
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):  # of pyarrow's versions, some give one chunk as chunks
        array = pa.concat_arrays(array.chunks)
    rows = len(array)
    nested = False
    while True:
        if isinstance(array, pa.ExtensionArray):
            array = array.storage
        if not (pa.types.is_list(array.type) or pa.types.is_large_list(array.type) or _is_fixed(array.type)):
            break
        lengths = np.unique(np.diff(array.offsets.to_numpy())) if not _is_fixed(array.type) else [array.type.list_size]
        if array.null_count or len(lengths) > 1:
            raise ConfigError(f"{what} must have as many values in every row, got rows of {list(map(int, lengths))}")
        array, nested = array.flatten(), True
    try:
        values = array.to_numpy(zero_copy_only=False)
    except (NotImplementedError, pa.ArrowException) as error:
        raise ConfigError(f"{what} must be numbers, got {array.type}") from error
    if values.dtype == object:
        raise ConfigError(f"{what} must be numbers, got {array.type}")
    return values.reshape(rows, -1) if nested else values


def _is_fixed(kind: pa.DataType) -> bool:
    return pa.types.is_fixed_size_list(kind)


def episode_list(episodes: Iterable[int]) -> str:
    """Some episodes for a message: "episode 1", "episodes 1, 2, 3, 4, 5 and 12 more"."""
    numbers = [int(episode) for episode in episodes]
    more = f" and {len(numbers) - NAMED} more" if len(numbers) > NAMED else ""
    return f"episode{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers[:NAMED]))}{more}"
