"""Orders of samples for a policy whose memory recurs: clips of consecutive queries of one episode.

A *walk* is one episode visited as the robot visits it: a query every `stride` frames, from some offset. A
*stream* does one walk after another; the memory is carried along it and starts anew with every walk. A *clip* is
the next K queries of a stream, the part of it that one optimizer step sees and backpropagates through.

Clips are dealt to tasks by the quota, so the shares hold to the clip; a task's walks come without replacement,
and after `stride` passes over its episodes, each from another offset, every frame has been seen once. Where samples
are of every n-th frame alone (`data.feature_stride`), offsets are multiples of n, and so many fewer are the passes.
"""

import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

import numpy as np

from kuavo_train.data.replay.buffer import Kept
from kuavo_train.data.sampler import Draw, Order
from kuavo_train.data.task import Task


class ClipOrder(Order):
    """Batches of whole clips, each of `depth` queries; a pure function of (seed, stage, batch) and of what changed.

    Args:
        depth: K, the queries of a clip.
        stride: frames between queries, the policy's `n_action_steps`.
        jitter: queries are moved by up to so many frames, as a robot's clock might.
    """

    def __init__(
        self,
        *,
        seed: int,
        stage: int,
        tasks: Sequence[Task],
        shares: Mapping[str, float],
        batch_size: int,
        depth: int,
        stride: int,
        jitter: int = 0,
        processes: int = 1,
        kept: Mapping[str, Kept] = MappingProxyType({}),
    ):
        if batch_size % depth:
            each = f" in each of {processes} processes" if processes > 1 else ""
            raise ValueError(
                f"training.batch_size must be a multiple of policy.mem_backprop_depth={depth}, got {batch_size}{each}"
            )
        if not 0 <= 2 * jitter < stride:
            raise ValueError(
                f"training.query_jitter must be in [0, policy.n_action_steps / 2 = {stride / 2}), got {jitter}"
            )
        self.clip, self.stride, self.jitter = depth, stride, jitter
        super().__init__(
            seed=seed,
            stage=stage,
            tasks=tasks,
            shares=shares,
            batch_size=batch_size,
            processes=processes,
            kept=kept,
        )
        self._changed()

    @property
    def stream_count(self) -> int:
        """An upper limit of the streams' numbers, whatever the shares become."""
        return len(self.tasks) * max(cut.turns for cut in self.cuts)

    def change_shares(self, shares: Mapping[str, float], *, batch: int) -> None:
        """A task that gets more clips gets more streams; one that gets fewer keeps its own, or walks would be lost."""
        super().change_shares(shares, batch=batch)
        self._changed()

    def change_samples(self, samples: int, *, batch: int) -> None:
        """As with a change of shares, no stream is lost."""
        super().change_samples(samples, batch=batch)
        self._changed()

    def _changed(self) -> None:
        self._replay = _Replay(self)
        self._streams = list(self._streams_by_batch())

    def streams(self, number: int) -> list[int]:
        """How many each task has in a batch."""
        return next(streams for first, streams in reversed(self._streams) if first <= number)

    def _streams_by_batch(self) -> Iterator[tuple[int, list[int]]]:
        """From which batch on how many: as many as a task may have clips in a batch, so that none is taken twice."""
        streams = [0] * len(self.tasks)
        for batch in sorted({segment.first for segment in self.segments} | {cut.first for cut in self.cuts}):
            segment = next(segment for segment in reversed(self.segments) if segment.first <= batch)
            clips = next(cut.turns for cut in reversed(self.cuts) if cut.first <= batch)
            turns = self.turn(batch) - segment.turn + np.arange(len(segment.quota.pattern) * clips)
            tasks_of, _ = segment.quota.deal(turns.reshape(-1, clips))
            needed = [int((tasks_of == place).sum(axis=1).max()) for place in range(len(self.tasks))]
            streams = [max(pair) for pair in zip(streams, needed, strict=True)]
            yield batch, streams

    def batch(self, number: int, *, process: int = 0) -> list[Draw]:
        if self._replay.number > number:
            self._replay = _Replay(self)
        while self._replay.number < number:
            self._replay.next_batch()
        draws = self._replay.next_batch()
        part = len(draws) // self.processes
        return draws[process * part : (process + 1) * part]

    def walks(self, place: int) -> Iterator[list[int]]:
        """The rows of a task's walks, forever: passes over its episodes in a new order each time."""
        task, number = self.tasks[place], 0
        apart, jitter = (frames // task.feature_stride for frames in (self.stride, self.jitter))
        key = [self.seed, self.stage, zlib.crc32(task.name.encode()), 0]
        while True:
            round_number, turn = divmod(number, apart)
            for episode in np.random.default_rng([*key, number]).permutation(self.episodes[place]):
                offsets = np.random.default_rng([*key, round_number, int(episode), 1]).permutation(apart)
                rows = task.queries_of([int(episode)])
                places = np.arange(offsets[turn], len(rows), apart)
                if jitter and len(places):
                    moved = np.random.default_rng([*key, number, int(episode), 2])
                    places = places + moved.integers(-jitter, jitter + 1, len(places))
                if len(places):  # an episode may be shorter than the offset
                    yield rows[np.clip(places, 0, len(rows) - 1)].tolist()
            number += 1


class _Replay:
    """The streams as they stand before batch `number`."""

    def __init__(self, order: ClipOrder):
        self.order, self.number = order, 0
        self.walks = [order.walks(place) for place in range(len(order.tasks))]
        self.left: defaultdict[tuple[int, int], list[int]] = defaultdict(
            list
        )  # rows of a stream's walk, the last first

    def next_batch(self) -> list[Draw]:
        """That of all processes, one after another."""
        order, streams = self.order, self.order.streams(self.number)
        tasks, ranks = order._deal(order.turn(self.number), order.turn(self.number + 1))
        self.number += 1
        draws = []
        for task, rank in zip(tasks.tolist(), ranks.tolist(), strict=True):
            stream = rank % streams[task]
            for _ in range(order.clip):
                begins = not self.left[task, stream]
                if begins:
                    self.left[task, stream] = next(self.walks[task])[::-1]
                row = self.left[task, stream].pop()
                # Numbered so that a stream keeps its memory when there come to be more of them.
                draws.append(Draw(task, row, stream * len(order.tasks) + task, begins))
        return draws
