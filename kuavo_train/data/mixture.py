"""Which frames, from which task, in which order.

The order of samples is a pure function of (seed, stage, position): no global random state, no dependence on
workers, batch size or processes. A task's share is a quota: after any n samples |n_task − w_task·n| < 1. Inside
a task, frames come without replacement, pass by pass.
"""

import math
import signal
import zlib
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from lerobot.utils.constants import ACTION, OBS_STATE
from torch.utils.data import DataLoader, Dataset, Sampler

from kuavo_train.data.cache import FrameSource
from kuavo_train.data.normalization import Normalization
from kuavo_train.data.tasks import Task

Batch = dict[str, Any]
BOOKKEEPING = ("task_position", "episode_index", "frame_index")


class Quota:
    """Deals positions 0, 1, 2, … to tasks so that each one's count never strays a whole sample from its share.

    A single-processor Pfair schedule: the j-th sample of a task with share w may come from position ⌊(j−1)/w⌋
    on and must come before ⌈j/w⌉; of those that may come, the one due first does (Baruah, Cohen, Plaxton and
    Varvel 1996; earliest due first suffices on one processor). Shares are rational, so the schedule repeats.
    """

    def __init__(self, shares: Sequence[float]):
        self.shares = _exact(shares)
        period = math.lcm(*(share.denominator for share in self.shares))
        counts = [0] * len(self.shares)
        pattern, ranks = np.empty(period, dtype=np.int64), np.empty(period, dtype=np.int64)
        for position in range(period):
            due = [
                (math.ceil((count + 1) / share), task)
                for task, (share, count) in enumerate(zip(self.shares, counts, strict=True))
                if share > 0 and math.floor(count / share) <= position
            ]
            task = min(due)[1]
            pattern[position], ranks[position] = task, counts[task]
            counts[task] += 1
        self.pattern, self.ranks, self.counts = pattern, ranks, np.array(counts)

    def deal(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Task of each position, and how many samples of that task came before it."""
        period, place = np.divmod(positions, len(self.pattern))
        tasks = self.pattern[place]
        return tasks, period * self.counts[tasks] + self.ranks[place]


def _exact(shares: Sequence[float]) -> list[Fraction]:
    """Shares as fractions of sum 1; what rounding leaves over goes to the largest."""
    exact = [Fraction(str(share)).limit_denominator(10_000) for share in shares]
    exact[exact.index(max(exact))] += 1 - sum(exact)
    return exact


class SampleOrder:
    """Position in a stage → (task, row). `tasks` are those with a share, the current one among them."""

    def __init__(self, *, seed: int, stage: int, tasks: Sequence[Task], shares: Mapping[str, float]):
        self.seed, self.stage, self.tasks = seed, stage, list(tasks)
        self.quota = Quota([shares[task.name] for task in self.tasks])

    def __call__(self, start: int, stop: int) -> np.ndarray:
        """[stop − start, 2] (place in `tasks`, row) of the samples from `start` up to `stop`."""
        tasks, ranks = self.quota.deal(np.arange(start, stop))
        rows = np.empty_like(ranks)
        for place, task in enumerate(self.tasks):
            mine = tasks == place
            passes, offsets = np.divmod(ranks[mine], len(task.train_rows))
            drawn = np.empty_like(offsets)
            for number in np.unique(passes):
                drawn[passes == number] = self._shuffled(place, int(number))[offsets[passes == number]]
            rows[mine] = drawn
        return np.stack([tasks, rows], axis=1)

    @lru_cache(maxsize=16)  # noqa: B019 - lives as long as its stage
    def _shuffled(self, place: int, number: int) -> np.ndarray:
        """The task's training rows in the order of its `number`-th pass."""
        task = self.tasks[place]
        sequence = np.random.SeedSequence([self.seed, self.stage, zlib.crc32(task.name.encode()), number])
        return np.random.Generator(np.random.PCG64(sequence)).permutation(task.train_rows)

    def steps_per_epoch(self, current: str, samples_per_step: int) -> int:
        """Steps in which the current task's training frames come once; replayed frames are on top."""
        place = [task.name for task in self.tasks].index(current)
        frames = len(self.tasks[place].train_rows) / self.quota.shares[place]
        return math.ceil(frames / samples_per_step)

    def audit(
        self, frames_drawn: Sequence[Mapping[int, int]], episodes_drawn: Sequence[Mapping[int, Sequence[int]]]
    ) -> dict[str, Any]:
        """Declared against really drawn: what replay_audit.json holds.

        Args:
            frames_drawn: per process, place in `tasks` → number of samples.
            episodes_drawn: per process, place in `tasks` → the episodes they came from.

        Raises:
            RuntimeError: a task's count is a whole sample or more off its share, or a held-out episode was drawn.
        """
        frames = [sum(drawn.get(place, 0) for drawn in frames_drawn) for place in range(len(self.tasks))]
        total = sum(frames)
        for place, (task, share) in enumerate(zip(self.tasks, self.quota.shares, strict=True)):
            if abs(frames[place] - share * total) >= 1:
                raise RuntimeError(
                    f"replay share of {task.name} must be {float(share)}, drawn {frames[place]} of {total} samples"
                )
            episodes = {episode for drawn in episodes_drawn for episode in drawn.get(place, [])}
            held_out = episodes & set(task.held_out_episodes)
            if held_out:
                raise RuntimeError(f"held-out episodes of {task.name} must never be drawn, got {sorted(held_out)}")
        names = [task.name for task in self.tasks]
        return {
            "declared": {name: float(share) for name, share in zip(names, self.quota.shares, strict=True)},
            "drawn": {
                name: {"frames": count, "share": count / total} for name, count in zip(names, frames, strict=True)
            },
            "total_frames": total,
            "held_out_frames_drawn": 0,
        }


class StepSampler(Sampler[list[tuple[int, int]]]):
    """Batches of this process from step `start` to `stop`; positions of all processes interleave by batch."""

    def __init__(
        self,
        order: SampleOrder,
        *,
        start: int,
        stop: int,
        batch_size: int,
        batches_per_step: int = 1,
        process: int = 0,
        processes: int = 1,
    ):
        self.order, self.start, self.stop = order, start, stop
        self.batch_size, self.batches_per_step = batch_size, batches_per_step
        self.process, self.processes = process, processes

    def __len__(self) -> int:
        return (self.stop - self.start) * self.batches_per_step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for batch in range(self.start * self.batches_per_step, self.stop * self.batches_per_step):
            first = (batch * self.processes + self.process) * self.batch_size
            yield [(int(task), int(row)) for task, row in self.order(first, first + self.batch_size)]


class MixedDataset(Dataset):
    """Frames of several tasks in the union of their features; an index is (place in `tasks`, row)."""

    def __init__(
        self, tasks: Sequence[Task], frames: Sequence[FrameSource], normalization: Normalization, *, chunk_size: int
    ):
        self.tasks, self.frames, self.chunk_size = list(tasks), list(frames), chunk_size
        space = normalization.space
        self.columns = [(space.state_columns(task), space.action_columns(task)) for task in self.tasks]
        # A dimension that a task lacks holds the mean, which normalizes to zero.
        self.fill_state = normalization.array(OBS_STATE, "mean")
        self.fill_action = normalization.array(ACTION, "mean")

    def __len__(self) -> int:
        return sum(len(task.train_rows) for task in self.tasks)

    def __getitem__(self, index: tuple[int, int]) -> Batch:
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[tuple[int, int]]) -> Batch:
        """One batch of B samples with chunks of C actions:

        observation.images.*: [B, 3, H, W] uint8; observation.state: [B, S]; action: [B, C, A]; action_is_pad:
        [B, C], True past the episode's end; action_dim_is_pad: [B, A], True where the task lacks the dimension;
        task: B instructions; task_position, episode_index, frame_index: [B].
        """
        places, rows = np.array(indices, dtype=np.int64).T
        size = len(places)
        state = np.tile(self.fill_state, (size, 1))
        action = np.tile(self.fill_action, (size, self.chunk_size, 1))
        is_pad = np.zeros((size, self.chunk_size), dtype=bool)
        dim_is_pad = np.ones((size, len(self.fill_action)), dtype=bool)
        episodes, frame_numbers = np.empty(size, dtype=np.int64), np.empty(size, dtype=np.int64)
        images: dict[str, torch.Tensor] = {}
        for place in np.unique(places):
            task, (state_columns, action_columns) = self.tasks[place], self.columns[place]
            mine = np.flatnonzero(places == place)
            own = rows[mine]
            episodes[mine], frame_numbers[mine] = task.episode[own], task.frame[own]
            state[np.ix_(mine, state_columns)] = task.state[own]
            chunk = own[:, None] + np.arange(self.chunk_size)
            last = task.bounds[task.episode[own], 1][:, None] - 1
            is_pad[mine] = chunk > last
            action[mine[:, None, None], np.arange(self.chunk_size)[:, None], action_columns] = task.action[
                np.minimum(chunk, last)
            ]
            dim_is_pad[np.ix_(mine, action_columns)] = False
            for camera in task.cameras:
                pictures = self.frames[place](camera, own)
                if camera not in images:
                    images[camera] = torch.empty((size, *pictures.shape[1:]), dtype=torch.uint8)
                images[camera][torch.from_numpy(mine)] = pictures
        return {
            **images,
            OBS_STATE: torch.from_numpy(state),
            ACTION: torch.from_numpy(action),
            "action_is_pad": torch.from_numpy(is_pad),
            "action_dim_is_pad": torch.from_numpy(dim_is_pad),
            "task": [self.tasks[place].instruction for place in places],
            "task_position": torch.from_numpy(places.copy()),
            "episode_index": torch.from_numpy(episodes),
            "frame_index": torch.from_numpy(frame_numbers),
        }

    def loader(self, sampler: StepSampler, *, num_workers: int, pin_memory: bool) -> DataLoader:
        """Batches in the sampler's order, whatever the number of workers."""
        return DataLoader(
            self,
            batch_sampler=sampler,
            collate_fn=lambda batch: batch,
            num_workers=num_workers,
            pin_memory=pin_memory,
            worker_init_fn=_leave_signals_to_the_parent,
        )


def _leave_signals_to_the_parent(_worker: int) -> None:
    """Ctrl-C reaches the whole process group; the parent finishes its step first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def preprocess(batch: Batch, preprocessor: Any) -> Batch:
    """Through LeRobot's preprocessor (tokens, device, normalization); images become floats in [0, 1] there."""
    prepared = preprocessor({key: value for key, value in batch.items() if key not in BOOKKEEPING})
    return {
        key: value.float() / 255 if isinstance(value, torch.Tensor) and value.dtype == torch.uint8 else value
        for key, value in prepared.items()
    }
