"""Tasks read from an exported file in place of their datasets: what of them is kept for replay, and what is held out.

`python -m kuavo_train.export_replay` writes one file of safetensors, `data.replay_file` reads it. Its metadata holds
FORMAT and VERSION, and under `content` as JSON a `TaskHeader` of each task. Its tensors, by `<task>/<name>`:

    state, action      [N, S] and [N, A] float32, in robot units
    instruction        [N] place in the task's instructions
    pictured           [P] the rows that have embeddings, ascending
    images/<camera>    [P, tokens, width] bfloat16, by the encoder that the header names
    mean_action        [A] over all training frames, also those that are not in the file; so is
    action_limits      [A, 3] least, greatest, greatest change

Rows are of the episodes in the file alone, one after another. Episodes keep the numbers that they have in the dataset.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np
import torch
from lerobot.utils.constants import ACTION, OBS_STATE
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from kuavo_train.config import DataConfig, StageConfig
from kuavo_train.data.recordings.hub import HubOrigin
from kuavo_train.data.recordings.instructions import Instructions
from kuavo_train.data.recordings.recording import Recording
from kuavo_train.data.replay.buffer import Kept
from kuavo_train.data.task import Task
from kuavo_train.errors import ConfigError, require, said
from kuavo_train.reading import Json

FORMAT, VERSION = "kuavo_train.replay", "1"
KEY = "data.replay_file"
BEFORE_THERE_WAS = {"data.feature_stride": 1}
"""What holds of files that do not say."""


@dataclass(frozen=True)
class TaskHeader:
    """What the file says of a task beside its tensors.

    Attributes:
        texts: its instructions. recorded, own: as of `Instructions`.
        features: of its dataset, those that are in the file; lengths: frames of each of the dataset's episodes.
        root, origin, hash: of the dataset.
        train_episodes, held_out_episodes, choosing_episodes: as of `Task`, by their numbers in the dataset.
        episodes: those in the file, ascending.
        kept: what may be replayed, as in replay_buffer.json; None: all training episodes.
        image_shapes: camera → (3, H, W) of the pictures that were embedded.
        encoder: everything beside the picture that decides an embedding, the hash of the weights among them.
        settings: key → value, of the settings that decide which data these are.
    """

    name: str
    texts: list[str]
    recorded: dict[str, int]
    own: bool
    state_names: list[str]
    action_names: list[str]
    cameras: dict[str, str]
    fps: float
    features: dict[str, Json]
    lengths: list[int]
    root: str
    origin: Json | None
    hash: str
    train_episodes: list[int]
    held_out_episodes: list[int]
    choosing_episodes: list[int]
    episodes: list[int]
    kept: Json | None
    image_shapes: dict[str, list[int]]
    encoder: Json
    settings: Json

    @classmethod
    def from_json(cls, content: Json) -> Self:
        return cls(**{each.name: content[each.name] for each in fields(cls)})


@dataclass(frozen=True, kw_only=True)
class ExportedTask(Task):
    """A task of which the file holds a part; its rows are those of that part, its episodes' numbers the dataset's.

    Attributes:
        file: that it was read from.
        header: what the file says of it.
        kept: what may be replayed; None: all training episodes.
        tensors: by name, without the task's.
    """

    file: Path
    header: TaskHeader
    kept: Kept | None
    tensors: Mapping[str, torch.Tensor]

    @property
    def frames(self) -> int:
        return sum(self.header.lengths)

    @property
    def train_frames(self) -> int:
        return sum(self.header.lengths[episode] for episode in self.train_episodes)

    @cached_property
    def content_hash(self) -> str:
        return self.header.hash  # of the dataset, which need not be there

    @cached_property
    def mean_action(self) -> np.ndarray:
        return self.tensors["mean_action"].numpy()

    @cached_property
    def action_limits(self) -> np.ndarray:
        return self.tensors["action_limits"].numpy()

    @cached_property
    def embeddings(self) -> "ExportedEmbeddings":
        return ExportedEmbeddings(self)


class ExportedEmbeddings:
    """Embeddings [n, tokens, width] bfloat16 of a task's rows, read from the file.

    Attributes:
        key: everything that decides them and which rows they are of.
        shapes: camera → (tokens, width).
    """

    def __init__(self, task: ExportedTask):
        self.task = task
        self.pictured = task.tensors["pictured"].numpy()
        self.cameras = {camera: task.tensors[f"images/{camera}"] for camera in task.cameras}
        self.shapes = {camera: tuple(found.shape[1:]) for camera, found in self.cameras.items()}
        header = task.header
        self.key = {
            "dataset": header.hash,
            "cameras": header.cameras,
            "image_shapes": header.image_shapes,
            "encoder": header.encoder,
            "exported": header.episodes,
        }

    @property
    def whole(self) -> bool:
        """Whether all rows of the task that samples may be of have them."""
        return len(self.pictured) == len(self.task.queries_of(self.task.header.episodes))

    @property
    def row_bytes(self) -> int:
        """Of one frame, all cameras together."""
        return sum(found[:1].nbytes for found in self.cameras.values())

    def __call__(self, camera: str, rows: np.ndarray) -> torch.Tensor:
        """Raises `RuntimeError` for rows that have none."""
        rows = np.asarray(rows)
        places = np.searchsorted(self.pictured, rows).clip(max=len(self.pictured) - 1)
        absent = rows[self.pictured[places] != rows]
        if len(absent):
            frame = f"frame {self.task.frame[absent[0]]} of episode {self.task.episode[absent[0]]}"
            raise RuntimeError(f"{self.task.file} must hold the embedding of {frame} of {self.task.name} to be read")
        return self.cameras[camera][torch.from_numpy(places)]


def settings_of(stage: StageConfig, data: DataConfig) -> Json:
    """Those by which the data of a task, or what is held out of them, would be others."""
    recipe, shared = asdict(stage), asdict(data)
    names = ("instruction", "episodes", "cameras", "state_names", "action_names", "scale")
    of_all = ("cameras", "image_size", "held_out_episodes", "split_seed", "feature_stride")
    return {
        **{f"stage.{name}": recipe[name] for name in names},
        **{f"data.{name}": shared[name] for name in of_all},
    }


def exported_names(data: DataConfig) -> list[str]:
    """Tasks in the file that the configuration names; none without one. Raises `ConfigError` as `exported_tasks`."""
    return [] if data.replay_file is None else list(_headers(Path(data.replay_file)))


def exported_tasks(
    data: DataConfig, curriculum: Sequence[StageConfig], before: Sequence[str]
) -> dict[str, ExportedTask]:
    """Task → what the file that the configuration names holds of it; none without one.

    Args:
        before: the tasks that have been learnt before.

    Raises:
        ConfigError: no such file, a damaged one or of another format; tasks in it that must be learnt from
            demonstrations; settings by which the data would be others.
    """
    if data.replay_file is None:
        return {}
    path = Path(data.replay_file)
    headers = _headers(path)
    stages = {stage.name: stage for stage in curriculum}
    others = [name for name in headers if name not in before]
    require(
        not others,
        f"{KEY}={path}",
        f"hold tasks that have been learnt before ({', '.join(before) or 'there are none'}), since of these alone no "
        "demonstrations are needed",
        ", ".join(others),
    )
    for name, header in headers.items():
        for key, value in settings_of(stages[name], data).items():
            was = header.settings.get(key, BEFORE_THERE_WAS.get(key))
            require(was == value, key, f"be {was!r}, by which {name} was exported to {path}", value)
    tensors = load_file(path)
    return {
        name: replace(_task(path, header, stages[name].index, tensors), feature_stride=data.feature_stride)
        for name, header in headers.items()
    }


def _headers(path: Path) -> dict[str, TaskHeader]:
    require(path.is_file(), KEY, "be a file that python -m kuavo_train.export_replay wrote", str(path))
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"{KEY} must be a whole file, got {said(error)} in {path}; restore it from a copy, or export it again"
        ) from error
    found = (metadata.get("format"), metadata.get("version"))
    require(found == (FORMAT, VERSION), f"{KEY}={path}", f"be of the format {FORMAT}, version {VERSION}", found)
    tasks = [TaskHeader.from_json(task) for task in json.loads(metadata["content"])["tasks"]]
    return {task.name: task for task in tasks}


def _task(path: Path, header: TaskHeader, index: int, tensors: Mapping[str, torch.Tensor]) -> ExportedTask:
    prefix = f"{header.name}/"
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    lengths = np.array(header.lengths)
    ends = np.cumsum(lengths[header.episodes])
    bounds = np.zeros((len(lengths), 2), dtype=np.int64)  # an episode that is not there has no rows
    bounds[header.episodes] = np.stack([ends - lengths[header.episodes], ends], axis=1)
    recorded = np.cumsum(lengths)
    return ExportedTask(
        file=path,
        header=header,
        kept=None if header.kept is None else Kept.from_json(header.kept),
        tensors=own,
        name=header.name,
        index=index,
        instructions=Instructions(tuple(header.texts), own["instruction"].numpy(), header.recorded, own=header.own),
        recording=Recording(
            root=Path(header.root),
            fps=header.fps,
            features=header.features,
            data_path="",
            video_path="",
            episodes={
                "length": lengths,
                "dataset_from_index": recorded - lengths,
                "dataset_to_index": recorded,
            },
            sentences={},
        ),
        state_names=tuple(header.state_names),
        action_names=tuple(header.action_names),
        state=own["state"].numpy(),
        action=own["action"].numpy(),
        episode=np.repeat(header.episodes, lengths[header.episodes]),
        frame=np.concatenate([np.arange(lengths[episode]) for episode in header.episodes]),
        bounds=bounds,
        train_episodes=tuple(sorted([*header.train_episodes, *header.choosing_episodes])),
        held_out_episodes=tuple(header.held_out_episodes),
        cameras=header.cameras,
        origin=None if header.origin is None else HubOrigin(**header.origin),
    )


def header_of(
    task: Task,
    kept: Kept | None,
    *,
    episodes: list[int],
    image_shapes: dict[str, list[int]],
    encoder: Json,
    settings: Json,
) -> TaskHeader:
    """Of a task that is to be written; arguments as `TaskHeader` says."""
    if isinstance(task, ExportedTask):  # written once more
        return task.header
    used = (OBS_STATE, ACTION, *task.cameras.values())
    return TaskHeader(
        name=task.name,
        texts=list(task.instructions.texts),
        recorded=task.instructions.recorded,
        own=task.instructions.own,
        state_names=list(task.state_names),
        action_names=list(task.action_names),
        cameras=task.cameras,
        fps=task.recording.fps,
        features={key: task.recording.features[key] for key in used},
        lengths=task.recording.lengths.tolist(),
        root=str(task.root),
        origin=asdict(task.origin) if task.origin else None,
        hash=task.content_hash,
        train_episodes=list(task.train_episodes),
        held_out_episodes=list(task.held_out_episodes),
        choosing_episodes=list(task.choosing_episodes),
        episodes=episodes,
        kept=None if kept is None else kept.to_json(),
        image_shapes=image_shapes,
        encoder=encoder,
        settings=settings,
    )
