"""What part of a stage's samples each task gets: shares for equal exposure, and shares raised for one task."""

import math
from collections.abc import Mapping, Sequence

SHARE_UNITS = 10_000
"""Worked-out shares are multiples of 1/10 000, so that the order they are dealt in repeats early."""


def proportional_shares(samples: Mapping[str, float]) -> dict[str, float]:
    """Task → its part of all samples, rounded to 1/10 000 with the sum exactly 1."""
    total = sum(samples.values())
    units = {task: SHARE_UNITS * count / total for task, count in samples.items()}
    whole = {task: math.floor(value) for task, value in units.items()}
    by_remainder = sorted(units, key=lambda task: whole[task] - units[task])
    for task in by_remainder[: SHARE_UNITS - sum(whole.values())]:
        whole[task] += 1
    return {task: count / SHARE_UNITS for task, count in whole.items()}


def raised_shares(
    shares: Mapping[str, float], tasks: Sequence[str], *, new: str, factor: float, limit: float, floor: float
) -> dict[str, float]:
    """The shares after raising those of `tasks` by `factor`, each to at most `limit`; all others shrink in proportion.

    The task being learnt keeps at least `floor`, or what it has where that is less: where the raises would take
    more, they are cut down together. A task without a share gets none. Shares that cannot be raised any further come
    back as they are.
    """
    raised = {task: min(shares[task] * factor, limit) for task in tasks if 0 < shares.get(task, 0) < limit}
    if not raised:
        return dict(shares)
    before, wanted = sum(shares[task] for task in raised), sum(raised.values())
    least_for_others = min(1.0, floor / shares[new]) * (1 - before)
    granted = min(1.0, (1 - least_for_others - before) / (wanted - before))
    shrunk = (1 - before - granted * (wanted - before)) / (1 - before)
    return proportional_shares(
        {
            task: share + granted * (raised[task] - share) if task in raised else share * shrunk
            for task, share in shares.items()
        }
    )
