"""The exact quota: which task each place in the order of samples belongs to."""

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np


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

    def dealt(self, positions: int) -> np.ndarray:
        """[T] how many of the first `positions` each task got."""
        periods, rest = divmod(positions, len(self.pattern))
        return periods * self.counts + np.bincount(self.pattern[:rest], minlength=len(self.shares))


def _exact(shares: Sequence[float]) -> list[Fraction]:
    """Shares as fractions of sum 1; what rounding leaves over goes to the largest."""
    exact = [Fraction(str(share)).limit_denominator(10_000) for share in shares]
    exact[exact.index(max(exact))] += 1 - sum(exact)
    return exact
