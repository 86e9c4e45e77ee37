"""Intervals for what a run measured: paired bootstrap over episodes, seeds above them, Wilson.

The unit of resampling is the *episode*, never the frame: the frames of one episode are nearly copies of each
other, and counting them as independent makes every interval too narrow. Held-out episodes, noise and time are
the same at every stage, so losses are compared pair by pair and the large differences *between* episodes
cancel.

A plain percentile bootstrap is too narrow for the few episodes robots have (about 85 % instead of 95 % with
5). The percentiles are therefore widened as in Hesterberg, "What Teachers Should Know About the Bootstrap"
(2015), section 4.3, so that for a mean the interval is as wide as Student's. Everything is seeded: the same
numbers give the same interval.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

Scores = Mapping[int, float]
"""Episode id → mean score of that episode."""


@dataclass(frozen=True)
class Interval:
    """An estimate and its confidence interval.

    `low` and `high` are None when the data cannot give one (a single episode): an interval of no width would
    claim certainty, one of infinite width cannot be stored as JSON. `n` counts the units that were resampled.
    """

    estimate: float
    low: float | None
    high: float | None
    level: float
    n: int


def paired_bootstrap(
    before: Scores,
    after: Scores,
    *,
    relative: bool = False,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Change of the mean from `before` to `after`, resampling episodes, each with its pair.

    Args:
        before, after: the same episodes, scored twice.
        relative: divide by the mean of `before` (0.1 = 10 % more than before); resampled along with the
            numerator.

    Raises:
        ValueError: no episodes, other episodes after than before, a value that is not finite, or a relative
            change of a mean that is not positive.
    """
    values_before, values_after = _pairs(before, after)
    _check(level, resamples)
    estimate = float(_change(values_before.mean(), values_after.mean(), relative=relative))
    n = len(values_before)
    if n == 1:
        return Interval(estimate, None, None, level, n)
    rows = np.random.default_rng(seed).integers(0, n, size=(resamples, n))
    changes = _change(values_before[rows].mean(axis=1), values_after[rows].mean(axis=1), relative=relative)
    low, high = _expanded_percentiles(changes, level, n)
    return Interval(estimate, low, high, level, n)


def hierarchical_bootstrap(
    runs: Sequence[tuple[Scores, Scores]],
    *,
    relative: bool = False,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Change from before to after over several training seeds: resample runs, then the episodes of each.

    Every run counts once, however many episodes it has. Two runs trained from different seeds differ for
    reasons that no number of episodes shows; pooling their episodes would hide that. `n` is the number of
    runs.

    Args:
        runs: one (before, after) pair of episode scores for each training seed.

    Raises:
        ValueError: fewer than two runs, or any of the reasons of `paired_bootstrap`.
    """
    if len(runs) < 2:
        raise ValueError(
            f"a hierarchical bootstrap needs at least 2 runs, got {len(runs)}: one run says nothing about "
            "the spread "
            "between seeds; use paired_bootstrap for it"
        )
    _check(level, resamples)
    pairs = [_pairs(before, after) for before, after in runs]
    estimate = _change(
        np.mean([before.mean() for before, _ in pairs]),
        np.mean([after.mean() for _, after in pairs]),
        relative=relative,
    )
    generator = np.random.default_rng(seed)
    n = len(pairs)
    chosen = generator.integers(0, n, size=(resamples, n))
    before_means, after_means = np.empty((resamples, n)), np.empty((resamples, n))
    for index, (before_values, after_values) in enumerate(pairs):
        slots = chosen == index  # a run drawn twice gets two resamples of its episodes
        rows = generator.integers(0, len(before_values), size=(int(slots.sum()), len(before_values)))
        before_means[slots] = before_values[rows].mean(axis=1)
        after_means[slots] = after_values[rows].mean(axis=1)
    changes = _change(before_means.mean(axis=1), after_means.mean(axis=1), relative=relative)
    low, high = _expanded_percentiles(changes, level, n)
    return Interval(float(estimate), low, high, level, n)


def wilson(successes: int, trials: int, *, level: float = 0.95) -> Interval:
    """Interval of a success rate (Wilson 1927): stays inside [0, 1] and honest at 0 and at all successes.

    Raises:
        ValueError: no trials, or successes outside [0, trials].
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"successes must be in [0, trials] with trials ≥ 1, got {successes} of {trials}")
    _check(level, 1)
    z = NormalDist().inv_cdf(0.5 + level / 2)
    rate = successes / trials
    centre = (rate + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(rate * (1 - rate) / trials + z * z / (4 * trials * trials))
    low = 0.0 if successes == 0 else centre - half  # exact in theory, but not in floating point
    high = 1.0 if successes == trials else centre + half
    return Interval(rate, low, high, level, trials)


def student_quantile(level: float, degrees: int) -> float:
    """t such that a Student variable of so many degrees of freedom lies in [−t, t] with probability `level`.

    The distribution in closed form for whole degrees (Abramowitz & Stegun 26.7.3 and 26.7.4), inverted by
    bisection.
    """
    if degrees > 1000:
        return NormalDist().inv_cdf(0.5 + level / 2)

    def inside(angle: float) -> float:
        odd = degrees % 2
        cosine, total = math.cos(angle), 0.0
        term = cosine if odd else 1.0
        for power in range(odd, degrees - 1, 2):
            total += term
            term *= cosine * cosine * (power + 1) / (power + 2)
        total *= math.sin(angle)
        return 2 / math.pi * (angle + total) if odd else total

    low, high = 0.0, math.pi / 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle) < level else (low, middle)
    return math.tan(low) * math.sqrt(degrees)


def _expanded_percentiles(samples: np.ndarray, level: float, n: int) -> tuple[float, float]:
    """Percentiles of the samples, widened for n units so that a mean gets Student's interval."""
    tail = NormalDist().cdf(-math.sqrt(n / (n - 1)) * student_quantile(level, n - 1))
    low, high = np.quantile(samples, [tail, 1 - tail])
    return float(low), float(high)


def _pairs(before: Scores, after: Scores) -> tuple[np.ndarray, np.ndarray]:
    if not before:
        raise ValueError("no episodes to compare")
    if before.keys() != after.keys():
        raise ValueError(
            "the same episodes must be scored before and after; "
            f"only before: {sorted(before.keys() - after.keys())}, only after: "
            f"{sorted(after.keys() - before.keys())}"
        )
    episodes = sorted(before)
    values_before = np.array([before[episode] for episode in episodes], dtype=float)
    values_after = np.array([after[episode] for episode in episodes], dtype=float)
    for values in (values_before, values_after):
        if not np.isfinite(values).all():
            raise ValueError(f"episode {episodes[int(np.argmin(np.isfinite(values)))]} has a score that is not finite")
    return values_before, values_after


def _change(before: np.ndarray | np.floating, after: np.ndarray | np.floating, *, relative: bool):
    if not relative:
        return after - before
    if np.min(before) <= 0:
        raise ValueError(f"a relative change needs a positive mean before, got {float(np.min(before)):g}")
    return (after - before) / before


def _check(level: float, resamples: int) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1), got {level}")
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
