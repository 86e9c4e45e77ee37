"""Which frames, from which task, in which order.

The order of samples is a pure function of (seed, stage, position) and of the changes of shares on record: no global
random state, no dependence on workers. It is one sequence: a batch is cut from it, and each process takes its part of
the batch, so that a stage goes on in it with any number of processes. A task's share is a quota: after any n samples
|n_task − w_task·n| < 1, counted anew from each change of shares. Inside a task, frames come without replacement, pass
by pass, whatever the shares.
"""

import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from kuavo_train.data.batch import Origin
from kuavo_train.data.replay.buffer import Kept
from kuavo_train.data.replay.quota import Quota
from kuavo_train.data.task import Task
from kuavo_train.reading import Json


class Draw(NamedTuple):
    """One sample: a row of a task and, where memory recurs, the stream it belongs to.

    `begins` is True where the memory starts anew before the sample.
    """

    task: int  # place in the order's tasks
    row: int
    stream: int = 0
    begins: bool = True


@dataclass(frozen=True)
class Segment:
    """What is dealt by one quota: from the batch `first` on, where `turn` turns are dealt, up to the next segment's."""

    first: int
    turn: int
    quota: Quota


@dataclass(frozen=True)
class Cut:
    """Batches of `turns` turns, of all processes together: from `first` on, where `turn` turns have been dealt."""

    first: int
    turn: int
    turns: int


class Order(ABC):
    """Which samples make up a batch. `tasks` are those with a share, the current one among them.

    `clip` is the number of samples that are dealt together, to one task: a turn.

    Attributes:
        episodes, rows: by place in `tasks`, those that may be drawn; rows ascending.

    Args:
        batch_size: samples of a batch of one process.
        processes: that train together.
        kept: task → what of its training data may be drawn; of others all.
    """

    clip = 1

    def __init__(
        self,
        *,
        seed: int,
        stage: int,
        tasks: Sequence[Task],
        shares: Mapping[str, float],
        batch_size: int,
        processes: int = 1,
        kept: Mapping[str, Kept] = MappingProxyType({}),
    ):
        self.seed, self.stage, self.tasks = seed, stage, list(tasks)
        self.batch_size, self.processes = batch_size, processes
        self.kept = {place: kept[task.name] for place, task in enumerate(self.tasks) if task.name in kept}
        self.episodes, self.rows = [], []
        for place, task in enumerate(self.tasks):
            episodes = self.kept[place].episodes if place in self.kept else task.train_episodes
            self.episodes.append(episodes)
            self.rows.append(self.kept[place].rows(task) if place in self.kept else task.queries_of(episodes))
        self.segments = [Segment(0, 0, self._quota(shares))]
        self.cuts = [Cut(0, 0, processes * batch_size // self.clip)]

    def not_kept(self, origin: Origin) -> dict[int, int]:
        """Place of a task → how many of the samples may not be drawn, of tasks of which a part is kept."""
        found = {}
        for place in self.kept:
            mine = origin.task == place
            drawn = self.tasks[place].bounds[origin.episode[mine].numpy(), 0] + origin.frame[mine].numpy()
            if others := int((~np.isin(drawn, self.rows[place])).sum()):
                found[place] = others
        return found

    @abstractmethod
    def batch(self, number: int, *, process: int = 0) -> list[Draw]:
        """The samples of a process's batch, `number` counting from the stage's beginning."""

    def change_shares(self, shares: Mapping[str, float], *, batch: int) -> None:
        """Deal by `shares` from a batch on. Every task goes on in the pass over its frames where it stands."""
        if batch <= self.segments[-1].first:
            raise ValueError(f"shares must change after batch {self.segments[-1].first}, got {batch}")
        self.segments.append(Segment(batch, self.turn(batch), self._quota(shares)))

    def change_samples(self, samples: int, *, batch: int) -> None:
        """Cut batches of so many samples, of all processes together, from a batch on. The sequence stays what it is."""
        if batch < self.cuts[-1].first:
            raise ValueError(f"batches must change after batch {self.cuts[-1].first}, got {batch}")
        cut = Cut(batch, self.turn(batch), samples // self.clip)
        self.cuts = [*(each for each in self.cuts if each.first < batch), cut]

    def turn(self, number: int) -> int:
        """The turns that are dealt before a batch."""
        cut = next(cut for cut in reversed(self.cuts) if cut.first <= number)
        return cut.turn + (number - cut.first) * cut.turns

    def _part(self, number: int, process: int) -> tuple[int, int]:
        """First turn and the end of a process's part of a batch."""
        first, end = self.turn(number), self.turn(number + 1)
        part = (end - first) // self.processes
        return first + process * part, first + (process + 1) * part

    def _quota(self, shares: Mapping[str, float]) -> Quota:
        return Quota([shares[task.name] for task in self.tasks])

    @property
    def shares(self) -> dict[str, float]:
        """Task → share, as dealt by the last segment."""
        return self._named(self.segments[-1].quota)

    def _named(self, quota: Quota) -> dict[str, float]:
        return {task.name: float(share) for task, share in zip(self.tasks, quota.shares, strict=True)}

    def _deal(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Task of each turn from `start` up to `stop`, and how many turns it had before."""
        before = np.zeros(len(self.tasks), dtype=np.int64)
        tasks, ranks = [], []
        ends = [following.turn for _, following in pairwise(self.segments)]
        for segment, end in zip(self.segments, [*ends, stop], strict=True):
            here = np.arange(max(start, segment.turn), min(stop, end)) - segment.turn
            dealt, rank = segment.quota.deal(here)
            tasks.append(dealt)
            ranks.append(rank + before[dealt])
            before = before + segment.quota.dealt(max(end - segment.turn, 0))
        return np.concatenate(tasks), np.concatenate(ranks)

    def steps_per_epoch(self, current: str, batches_per_step: int) -> int:
        """Steps in which the current task's frames that may be drawn come once; replayed frames are on top."""
        place = [task.name for task in self.tasks].index(current)
        frames = len(self.rows[place]) / self.segments[-1].quota.shares[place]
        return math.ceil(frames / (self.cuts[-1].turns * self.clip * batches_per_step))

    def audit(
        self,
        frames_drawn: Sequence[Sequence[Mapping[int, int]]],
        episodes_drawn: Sequence[Mapping[int, Sequence[int]]],
        *,
        not_kept: Sequence[Mapping[int, int]] = (),
        batches_per_step: int = 1,
    ) -> Json:
        """Declared against really drawn: what replay_audit.json holds.

        Where shares were changed, `declared` is what the segments declare, weighted by their samples.

        Args:
            frames_drawn: per process and segment, place in `tasks` → number of samples.
            episodes_drawn: per process, place in `tasks` → the episodes they came from.
            not_kept: per process, place in `tasks` → samples that `not_kept` found among them.
            batches_per_step: those of one optimizer step.

        Raises:
            RuntimeError: a share is off by more than the order allows, a held-out episode was drawn, one that is
                set apart to choose by, or anything that was not kept.
        """
        for place, task in enumerate(self.tasks):
            episodes = {episode for drawn in episodes_drawn for episode in drawn.get(place, [])}
            held_out = episodes & {*task.held_out_episodes, *task.choosing_episodes}
            if held_out:
                raise RuntimeError(f"held-out episodes of {task.name} must never be drawn, got {sorted(held_out)}")
            if place in self.kept and (others := episodes - set(self.kept[place].episodes)):
                raise RuntimeError(f"only what is kept of {task.name} must be replayed, got episodes {sorted(others)}")
            if strays := sum(process.get(place, 0) for process in not_kept):
                raise RuntimeError(f"only what is kept of {task.name} must be replayed, got {strays} other frames")
        segments, counts, due = [], np.zeros(len(self.tasks), dtype=np.int64), [Fraction()] * len(self.tasks)
        for segment, *drawn in zip(self.segments, *frames_drawn, strict=True):
            frames = [sum(process.get(place, 0) for process in drawn) for place in range(len(self.tasks))]
            for place, share in enumerate(segment.quota.shares):
                if abs(frames[place] - share * sum(frames)) >= self.clip:  # that are dealt together
                    raise RuntimeError(
                        f"replay share of {self.tasks[place].name} must be {float(share)}, drawn {frames[place]} of "
                        f"{sum(frames)} samples"
                    )
                due[place] += share * sum(frames)
            counts += frames
            step = segment.first // batches_per_step
            segments.append({"from_step": step, "declared": self._named(segment.quota), "drawn": self._drawn(frames)})
        total = int(counts.sum())
        return {
            "declared": {task.name: float(share / total) for task, share in zip(self.tasks, due, strict=True)},
            "drawn": self._drawn(counts.tolist()),
            "total_frames": total,
            "dealt_together": self.clip * len(segments),
            "held_out_frames_drawn": 0,
            "passes": {t.name: counts[place] / len(self.rows[place]) for place, t in enumerate(self.tasks)},
            **({"kept": self._kept(), "frames_drawn_not_kept": 0} if self.kept else {}),
            "segments": segments,
        }

    def _kept(self) -> Json:
        return {
            kept.task: {key: getattr(kept, key) for key in ("frames", "of_frames", "of_episodes")}
            | {"episodes": list(kept.episodes)}
            for kept in self.kept.values()
        }

    def _drawn(self, frames: Sequence[int]) -> Json:
        return {
            task.name: {"frames": count, "share": count / sum(frames)}
            for task, count in zip(self.tasks, frames, strict=True)
        }


class SampleOrder(Order):
    """Every sample on its own."""

    def batch(self, number: int, *, process: int = 0) -> list[Draw]:
        return [Draw(int(task), int(row)) for task, row in self(*self._part(number, process))]

    def __call__(self, start: int, stop: int) -> np.ndarray:
        """[stop − start, 2] (place in `tasks`, row) of the samples from `start` up to `stop`."""
        tasks, ranks = self._deal(start, stop)
        rows = np.empty_like(ranks)
        for place in range(len(self.tasks)):
            mine = tasks == place
            passes, offsets = np.divmod(ranks[mine], len(self.rows[place]))
            drawn = np.empty_like(offsets)
            for number in np.unique(passes):
                drawn[passes == number] = self._shuffled(place, int(number))[offsets[passes == number]]
            rows[mine] = drawn
        return np.stack([tasks, rows], axis=1)

    @lru_cache(maxsize=16)  # noqa: B019 - lives as long as its stage
    def _shuffled(self, place: int, number: int) -> np.ndarray:
        """The task's rows in the order of its `number`-th pass."""
        task = self.tasks[place]
        sequence = np.random.SeedSequence([self.seed, self.stage, zlib.crc32(task.name.encode()), number])
        return np.random.Generator(np.random.PCG64(sequence)).permutation(self.rows[place])


class StepSampler(Sampler[list[Draw]]):
    """Batches of this process from step `start` to `stop`."""

    def __init__(self, order: Order, *, start: int, stop: int, batches_per_step: int = 1, process: int = 0):
        self.order, self.start, self.stop, self.batches_per_step = order, start, stop, batches_per_step
        self.process = process

    def __len__(self) -> int:
        return (self.stop - self.start) * self.batches_per_step

    def __iter__(self) -> Iterator[list[Draw]]:
        for number in range(self.start * self.batches_per_step, self.stop * self.batches_per_step):
            yield self.order.batch(number, process=self.process)
