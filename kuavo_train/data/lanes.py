"""Orders of samples for a policy whose memory recurs: clips of consecutive queries of one episode.

A *walk* is one episode visited as the robot visits it: a query every `stride` frames, from some offset. A
*stream* does one walk after another; the memory is carried along it and starts anew with every walk. A *clip* is
the next K queries of a stream, the part of it that one optimizer step sees and backpropagates through.

Clips are dealt to tasks by the quota, so the shares hold to the clip; a task's walks come without replacement,
and after `stride` passes over its episodes, each from another offset, every frame has been seen once.
"""

import zlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from kuavo_train.data.order import Draw, Order, Quota
from kuavo_train.data.tasks import Task


class LaneOrder(Order):
    """Lane-major batches of `lanes` clips of `depth` queries; a pure function of (seed, stage, process, batch).

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
    ):
        if batch_size % depth:
            raise ValueError(
                f"training.batch_size must be a multiple of policy.mem_backprop_depth={depth}, got {batch_size}"
            )
        if not 0 <= 2 * jitter < stride:
            raise ValueError(
                f"training.query_jitter must be in [0, policy.n_action_steps / 2 = {stride / 2}), got {jitter}"
            )
        self.clip, self.stride, self.jitter = depth, stride, jitter
        self.lanes = batch_size // depth
        super().__init__(seed=seed, stage=stage, tasks=tasks, shares=shares, batch_size=batch_size)
        self.streams = [self._streams_needed(self.segments[0].quota)]  # of each segment, per task
        self._replayed: dict[int, _Replay] = {}

    @property
    def stream_count(self) -> int:
        """An upper limit of the streams' numbers, whatever the shares become."""
        return len(self.tasks) * self.lanes

    def change_shares(self, shares: Mapping[str, float], *, batch: int) -> None:
        """A task that gets more clips gets more streams; one that gets fewer keeps its own, or walks would be lost."""
        super().change_shares(shares, batch=batch)
        needed = self._streams_needed(self.segments[-1].quota)
        self.streams.append([max(pair) for pair in zip(self.streams[-1], needed, strict=True)])
        self._replayed.clear()

    def _streams_needed(self, quota: Quota) -> list[int]:
        """As many streams per task as it may have clips in one batch: no stream is asked twice in it."""
        batches = np.arange(len(quota.pattern) * self.lanes).reshape(-1, self.lanes)
        tasks_of, _ = quota.deal(batches)
        return [int((tasks_of == place).sum(axis=1).max()) for place in range(len(self.tasks))]

    def tolerance(self, processes: int) -> int:
        """Whole clips are dealt, by each process on its own."""
        return self.clip * processes

    def batch(self, number: int, *, process: int = 0, processes: int = 1) -> list[Draw]:
        """The draws of a batch. Each process has its own streams: their memory never changes place."""
        replay = self._replayed.get(process)
        if replay is None or replay.number > number:
            replay = self._replayed[process] = _Replay(self, process)
        while replay.number < number:
            replay.next_batch()
        return replay.next_batch()

    def walks(self, place: int, process: int) -> Iterator[list[int]]:
        """The rows of a task's walks, forever: passes over its training episodes in a new order each time."""
        task, number = self.tasks[place], 0
        key = [self.seed, self.stage, zlib.crc32(task.name.encode()), process]
        while True:
            round_number, turn = divmod(number, self.stride)
            for episode in np.random.default_rng([*key, number]).permutation(task.train_episodes):
                offsets = np.random.default_rng([*key, round_number, int(episode), 1]).permutation(self.stride)
                rows = task.rows_of([int(episode)])
                places = np.arange(offsets[turn], len(rows), self.stride)
                if self.jitter and len(places):
                    moved = np.random.default_rng([*key, number, int(episode), 2])
                    places = places + moved.integers(-self.jitter, self.jitter + 1, len(places))
                if len(places):  # an episode may be shorter than the offset
                    yield rows[np.clip(places, 0, len(rows) - 1)].tolist()
            number += 1


class _Replay:
    """The streams of one process as they stand before batch `number`."""

    def __init__(self, order: LaneOrder, process: int):
        self.order, self.number = order, 0
        self.walks = [order.walks(place, process) for place in range(len(order.tasks))]
        self.left: list[list[list[int]]] = [[[] for _ in range(order.lanes)] for _ in order.tasks]

    def next_batch(self) -> list[Draw]:
        order, lanes = self.order, self.order.lanes
        segment = sum(segment.first <= self.number for segment in order.segments) - 1
        tasks, ranks = order._deal(self.number * lanes, (self.number + 1) * lanes, turns=lanes)
        self.number += 1
        draws = []
        for task, rank in zip(tasks.tolist(), ranks.tolist(), strict=True):
            stream = rank % order.streams[segment][task]
            for _ in range(order.clip):
                begins = not self.left[task][stream]
                if begins:
                    self.left[task][stream] = next(self.walks[task])[::-1]
                row = self.left[task][stream].pop()
                draws.append(Draw(task, row, task * lanes + stream, begins))
        return draws
