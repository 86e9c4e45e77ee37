"""The suite's layouts as LeRobot v3 datasets to train on, and in memory to be evaluated on."""

import contextlib
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import lerobot.utils.constants as key
import numpy as np
import torch
from filelock import FileLock
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from tqdm import tqdm

from benchmarks.memory_suite.layouts import ACTION, SIDE, STATE, TASKS, Layout
from kuavo_train.data.recordings.instructions import Instructions
from kuavo_train.data.task import Task

CAMERA = "observation.images.camera"
FPS = 10
VERSION = 2
"""Of the drawings: one more where a task's episodes change, so that neither old datasets nor old results stay."""


def ensure_dataset(task: str, folder: Path, episodes: int) -> Path:
    """The task's training episodes as a LeRobot dataset of images below `folder`, written unless it is there.

    Every frame of a query is a frame of the dataset. Every layout is checked: its decisions are the memory's alone.
    """
    root = folder / task
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f".{task}.lock"):
        if not root.is_dir():
            partial = folder / f".{task}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            kind = TASKS[task]
            layouts = kind.layouts(task, "training", max(1, episodes // kind.answers))
            with _quiet():
                _write(partial, task, layouts)
            partial.rename(root)
    return root


def _write(root: Path, task: str, layouts: Sequence[Layout]) -> None:
    dataset = LeRobotDataset.create(
        f"local/{task}",
        FPS,
        {
            key.OBS_STATE: {"dtype": "float32", "shape": (len(STATE),), "names": list(STATE)},
            key.ACTION: {"dtype": "float32", "shape": (len(ACTION),), "names": list(ACTION)},
            CAMERA: {"dtype": "image", "shape": (SIDE, SIDE, 3), "names": ["height", "width", "channels"]},
        },
        root=root,
        use_videos=False,
    )
    for layout in tqdm(layouts, f"write {task}", unit="layout", leave=False):
        layout.check()
        for variant in range(layout.variants):
            actions = layout.actions(variant)
            for frame in range(layout.length):
                dataset.add_frame(
                    {
                        key.OBS_STATE: layout.state(frame),
                        key.ACTION: actions[frame],
                        CAMERA: layout.picture(variant, frame),
                        "task": TASKS[task].instruction,
                    }
                )
            dataset.save_episode()
    dataset.finalize()


@contextlib.contextmanager
def _quiet() -> Any:
    """A bar of the library's own for every episode would hide ours."""
    shown, level = datasets.is_progress_bar_enabled(), logging.root.level
    datasets.disable_progress_bars()
    logging.root.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logging.root.setLevel(level)
        if shown:
            datasets.enable_progress_bars()


@dataclass(frozen=True)
class HeldOut:
    """Layouts as the project's own `Task`; pictures are drawn when they are read."""

    name: str
    layouts: Sequence[Layout]

    @cached_property
    def members(self) -> list[tuple[Layout, int]]:
        """Layout and variant of every episode."""
        return [(layout, variant) for layout in self.layouts for variant in range(layout.variants)]

    @cached_property
    def task(self) -> Task:
        lengths = [layout.length for layout, _ in self.members]
        ends = np.cumsum(lengths)
        nowhere: Any = None  # there is no dataset on disk
        return Task(
            name=self.name,
            index=1,
            instructions=Instructions.always(TASKS[self.name].instruction, int(ends[-1])),
            recording=nowhere,
            state_names=STATE,
            action_names=ACTION,
            state=np.stack([layout.state(frame) for layout, _ in self.members for frame in range(layout.length)]),
            action=np.concatenate([layout.actions(variant) for layout, variant in self.members]),
            episode=np.repeat(np.arange(len(lengths)), lengths),
            frame=np.concatenate([np.arange(length) for length in lengths]),
            bounds=np.stack([ends - lengths, ends], axis=1),
            train_episodes=tuple(range(len(lengths))),
            held_out_episodes=(),
            cameras={CAMERA: CAMERA},
        )

    def pictures(self, camera: str, rows: np.ndarray) -> torch.Tensor:
        """[len(rows), 3, S, S] uint8."""
        drawn = []
        for row in np.asarray(rows):
            layout, variant = self.members[self.task.episode[row]]
            drawn.append(layout.picture(variant, int(self.task.frame[row])).transpose(2, 0, 1))
        return torch.from_numpy(np.stack(drawn))


def held_out(task: str, part: str, decisions: int) -> HeldOut:
    """So many episodes of a part, at least one layout."""
    kind = TASKS[task]
    return HeldOut(task, kind.layouts(task, part, max(1, decisions // kind.answers)))
