"""What a stage would replay of the tasks before it, and validate them on, written into one file.

Held-out episodes are in it as well. Without them no later stage could say what was lost, and its best checkpoint would
be chosen on the new task alone.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self

import numpy as np
import torch

from kuavo_train.config import RunConfig, StageConfig
from kuavo_train.data.images.plan import FOR_EMBEDDINGS, Images, size_text
from kuavo_train.data.replay.buffer import Kept
from kuavo_train.data.replay.exported_file import FORMAT, VERSION, TaskHeader, header_of, settings_of
from kuavo_train.data.task import Task
from kuavo_train.errors import ConfigError, require
from kuavo_train.runs.tensor_file import TensorPieces, write_tensors
from kuavo_train.stage.findings import Findings
from kuavo_train.stage.kept_data import kept_of_earlier
from kuavo_train.stage.lineage import Start, result_before, stages_before
from kuavo_train.stage.setup import OpenedStage, accelerator_for, open_stage

PIECE = 64  # frames held in memory at once


@dataclass(frozen=True)
class Part:
    """Some episodes of a task in the file, and the bytes that they take."""

    episodes: int
    frames: int
    embeddings: int
    tables: int

    @property
    def text(self) -> str:
        sizes = f"embeddings {size_text(self.embeddings)}, states and actions {size_text(self.tables)}"
        return f"{self.episodes} episode{'s' * (self.episodes != 1)}, {self.frames:,} frames: {sizes}"


@dataclass(frozen=True)
class Exported:
    """
    Attributes:
        parts: task → `kept`, `held out` and, where a strategy sets some apart, `set apart` → what it takes.
        datasets: task → bytes of the files of its dataset, where they are there.
    """

    path: Path
    parts: Mapping[str, Mapping[str, Part]]
    datasets: Mapping[str, int]

    @property
    def summary(self) -> str:
        lines = [f"{self.path}: {size_text(self.path.stat().st_size)}"]
        for task, parts in self.parts.items():
            lines += [f"  {task}, {name}: {part.text}" for name, part in parts.items()]
            lines += [f"  {task}, its dataset: {size_text(size)}" for size in [self.datasets.get(task)] if size]
        return "\n".join([*lines, f"later stages read it with data.replay_file={self.path}"])


def export_replay(config: RunConfig, curriculum: Sequence[StageConfig], path: Path | None = None) -> Exported:
    """Write what the stage of `config` needs of the tasks before it.

    Args:
        path: of the file; None: in the run's folder.

    Raises:
        ConfigError: nothing was learnt before, the stage before is not finished, the vision encoder learns in this
            stage, the stage cannot be opened, or the file not be written.
    """
    before = stages_before(config, curriculum)
    rule = "have tasks learnt before it, whose data can be exported"
    require(bool(before), f"stage {config.stage.index} ({config.stage.name})", rule, "none")
    start = Start(before=result_before(config, curriculum))
    opened = open_stage(config, curriculum, start, accelerator_for(config), Findings())
    if opened.images.why_not_embeddings:
        raise ConfigError(
            f"export_replay must find embeddings by a frozen encoder, got pictures: {opened.images.why_not_embeddings};"
            f" {FOR_EMBEDDINGS}"
        )
    recipes = {stage.name: stage for stage in before}
    tasks = [task for task in opened.tasks if task.name in recipes]
    kept, looks = kept_of_earlier(config, curriculum, tasks, start), opened.dataset(tasks).observations
    chosen = {task.name: _Chosen.of(task, kept.get(task.name), looks) for task in tasks}
    for name, each in chosen.items():
        opened.images.embed(name, each.episodes)
    headers = [each.header(opened, recipes[name]) for name, each in chosen.items()]
    tensors = {name: each.tensors(opened.images) for name, each in chosen.items()}
    path = path or config.run_folder / f"replay_for_{config.stage.folder_name}.safetensors"
    content = json.dumps({"tasks": [vars(header) for header in headers]}, ensure_ascii=False)
    named = {f"{task}/{name}": tensor for task, own in tensors.items() for name, tensor in own.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, named, {"format": FORMAT, "version": VERSION, "content": content})
    except OSError as error:
        needed = size_text(sum(tensor.nbytes for tensor in named.values()))
        raise ConfigError(
            f"--file must be a place that can be written, with {needed} free, got {path}: {error}"
        ) from error
    return Exported(
        path,
        {name: each.sizes(tensors[name]) for name, each in chosen.items()},
        {task.name: _bytes_below(task.root) for task in tasks if task.root.is_dir()},
    )


@dataclass(frozen=True)
class _Chosen:
    """What of a task goes into the file.

    Attributes:
        parts: name → its episodes.
        rows: of the task, as they follow each other in the file.
        pictured: ascending, of the file's rows those that have embeddings.
    """

    task: Task
    kept: Kept | None
    parts: Mapping[str, Sequence[int]]
    rows: np.ndarray
    pictured: np.ndarray

    @classmethod
    def of(cls, task: Task, kept: Kept | None, observations: np.ndarray) -> Self:
        """`observations` are the frames that a sample sees, as offsets from its own."""
        apart = {"held out": task.held_out_episodes, "set apart": task.choosing_episodes}
        replayed = task.train_episodes if kept is None else kept.episodes
        parts = {"kept": replayed, **{name: episodes for name, episodes in apart.items() if episodes}}
        rows = task.rows_of(sorted(episode for episodes in parts.values() for episode in episodes))
        drawn = task.queries_of(task.train_episodes) if kept is None else kept.rows(task)
        first, end = task.bounds[task.episode[drawn]].T[:, :, None]
        looks = np.clip(drawn[:, None] + observations, first, end - 1)
        seen = np.concatenate([looks.ravel(), *(task.queries_of(episodes) for episodes in apart.values())])
        return cls(task, kept, parts, rows, np.flatnonzero(np.isin(rows, seen)))

    @property
    def episodes(self) -> list[int]:
        """Ascending."""
        return sorted(episode for episodes in self.parts.values() for episode in episodes)

    def header(self, opened: OpenedStage, recipe: StageConfig) -> TaskHeader:
        (facts,) = (facts for facts in opened.findings.facts["tasks"] if facts["name"] == self.task.name)
        return header_of(
            self.task,
            self.kept,
            episodes=self.episodes,
            image_shapes={camera: [3, *(about["size"] or ())] for camera, about in facts["cameras"].items()},
            encoder=opened.images.embeddings[self.task.name].key["encoder"],
            settings=settings_of(recipe, opened.config.data),
        )

    def tensors(self, images: Images) -> dict[str, TensorPieces]:
        """By name, without the task's."""
        task, source = self.task, images.sources[self.task.name]

        def embeddings(camera: str) -> Iterator[np.ndarray]:
            for first in range(0, len(self.pictured), PIECE):
                rows = self.rows[self.pictured[first : first + PIECE]]
                yield source(camera, rows).view(torch.uint16).numpy()

        shapes = images.embeddings[task.name].shapes
        return {
            **{
                f"images/{camera}": TensorPieces("BF16", (len(self.pictured), *shape), partial(embeddings, camera))
                for camera, shape in shapes.items()
            },
            "state": _whole("F32", task.state[self.rows]),
            "action": _whole("F32", task.action[self.rows]),
            "instruction": _whole("I64", task.instructions.of_row[self.rows]),
            "pictured": _whole("I64", self.pictured),
            "mean_action": _whole("F32", task.mean_action),
            "action_limits": _whole("F32", task.action_limits),
        }

    def sizes(self, tensors: Mapping[str, TensorPieces]) -> dict[str, Part]:
        """Name of a part → what it takes."""
        pictures = sum(tensor.row_bytes for name, tensor in tensors.items() if name.startswith("images/"))
        numbers = sum(tensors[name].row_bytes for name in ("state", "action", "instruction"))
        found = {}
        for name, episodes in self.parts.items():
            mine = np.isin(self.task.episode[self.rows], episodes)
            frames, seen = int(mine.sum()), int(mine[self.pictured].sum())
            found[name] = Part(len(episodes), frames, seen * pictures, frames * numbers)
        return found


def _whole(dtype: str, values: np.ndarray) -> TensorPieces:
    return TensorPieces(dtype, values.shape, lambda: [values])


def _bytes_below(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
