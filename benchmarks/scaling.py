"""How what happens around the model grows with the number of frames and of tasks.

Synthetic tasks in memory, episodes of 200 frames, equal shares, clips of 4 queries (the default recipe). Start-up is
what a stage does before its first step once the datasets are open: statistics, order, dataset, the first batch. A
step is the fetching of one batch, its images left out: they are one read from a memory map, whatever its length. Memory
is the peak of what Python and numpy hold meanwhile, the tables of state and action included.
"""

import time
import tracemalloc
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from benchmarks.measuring import Table, alternate, milliseconds
from benchmarks.models import ACTIONS, STATE
from kuavo_train.data.clip_sampler import ClipOrder
from kuavo_train.data.dataset import MixedDataset
from kuavo_train.data.normalization import fit_normalization
from kuavo_train.data.recordings.instructions import Instructions
from kuavo_train.data.task import Task

EPISODE = 200
CHUNK, STRIDE, DEPTH = 50, 8, 4


@dataclass(frozen=True)
class Settings:
    frames: tuple[int, ...] = (1_000, 10_000, 100_000, 1_000_000)
    tasks: tuple[int, ...] = (1, 4, 16)
    batch_size: int = 64
    rounds: int = 5


def run(settings: Settings) -> list[Table]:
    sizes = [(tasks, frames) for tasks in settings.tasks for frames in settings.frames]
    rows: list[dict[str, Any]] = []
    fetchers: dict[str, Fetcher] = {}
    for tasks, frames in sizes:
        tracemalloc.start()
        made = synthetic_tasks(tasks, frames)
        began = time.perf_counter()
        fetcher = Fetcher(made, settings.batch_size)
        seconds = time.perf_counter() - began
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        fetchers[f"{tasks} tasks, {frames} frames"] = fetcher
        rows.append({"tasks": tasks, "frames": frames, "start-up ms": 1e3 * seconds, "MiB": peak / 2**20})
    timings = alternate(fetchers, rounds=settings.rounds, block=10)
    for row, timing in zip(rows, timings.values(), strict=True):
        row["step ms"] = milliseconds(timing.wall)
        row["CPU ms"] = milliseconds(timing.cpu)
    return [Table(f"batch {settings.batch_size}, K = {DEPTH}", rows)]


class Fetcher:
    """A stage's data, without images: each call is the next batch."""

    def __init__(self, tasks: list[Task], batch_size: int):
        shares = {task.name: 1 / len(tasks) for task in tasks}
        self.order = ClipOrder(
            seed=0, stage=1, tasks=tasks, shares=shares, batch_size=batch_size, depth=DEPTH, stride=STRIDE
        )
        self.dataset = MixedDataset(
            tasks, [_no_image] * len(tasks), fit_normalization(tasks, "joint"), actions=range(CHUNK)
        )
        self.number = 0
        self()

    def __call__(self) -> None:
        self.dataset.fetch(self.order.batch(self.number))
        self.number += 1


def _no_image(camera: str, rows: np.ndarray) -> torch.Tensor:
    return torch.zeros((len(rows), 1), dtype=torch.uint8)


def synthetic_tasks(count: int, frames: int) -> list[Task]:
    """Tasks of `frames` frames together."""
    return [_task(number, max(frames // count, 2)) for number in range(count)]


def _task(number: int, frames: int) -> Task:
    random = np.random.default_rng(number)
    starts = np.arange(0, frames, EPISODE)
    bounds = np.stack([starts, np.minimum(starts + EPISODE, frames)], axis=1)
    rows = np.arange(frames)
    unused: Any = SimpleNamespace()  # what only decoding needs
    return Task(
        name=f"task{number}",
        index=number + 1,
        instructions=Instructions.always("put the parcel into the container", frames),
        recording=unused,
        state_names=tuple(f"joint_{n}" for n in range(STATE)),
        action_names=tuple(f"joint_{n}" for n in range(ACTIONS)),
        state=random.standard_normal((frames, STATE), dtype=np.float32),
        action=random.standard_normal((frames, ACTIONS), dtype=np.float32),
        episode=rows // EPISODE,
        frame=rows % EPISODE,
        bounds=bounds,
        train_episodes=tuple(range(len(bounds))),
        held_out_episodes=(),
        cameras={"observation.images.head_cam_h": "observation.images.head_cam_h"},
    )
