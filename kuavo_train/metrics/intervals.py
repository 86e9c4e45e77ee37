"""Intervals and tests for what runs measured: bootstrap over episodes, seeds beside them, Wilson, Newcombe, McNemar.

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
from collections.abc import Mapping
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
    of_seeds: np.ndarray, of_resamples: np.ndarray, *, episodes: int, level: float = 0.95, seed: int = 0
) -> Interval:
    """Interval of a statistic's mean over training seeds: what other seeds *and* other episodes would have given.

    Every run of a strategy has the same held-out episodes, so seeds and episodes are crossed: seeds are drawn
    with replacement, and episodes once for all of them (Owen, "The pigeonhole bootstrap", 2007). Drawing episodes anew
    for each seed would count one hard episode as bad luck that the seeds average out.

    Both kinds of deviation are widened for their few units, each by its own number, and before they are added:
    percentiles cannot be widened here, since two seeds have no more than three different resamples. How often the
    interval then holds the truth is counted in tests/evaluation/test_bootstrap.py.

    Args:
        of_seeds: [S] the statistic of each seed's run, on all episodes.
        of_resamples: [N, S] the same on N resamples of the episodes, the same ones for every seed.
        episodes: how many there are.

    Returns:
        `n` is S. A single seed gives an interval over episodes alone; a single episode none at all.

    Raises:
        ValueError: no seeds, shapes that do not fit, or a value that is not finite.
    """
    seeds, resamples = len(of_seeds), len(of_resamples)
    _check(level, resamples)
    if seeds < 1 or of_resamples.shape != (resamples, seeds):
        raise ValueError(f"resamples must be [N, S] for the {seeds} seeds, got {of_resamples.shape}")
    if not (np.isfinite(of_seeds).all() and np.isfinite(of_resamples).all()):
        raise ValueError("the statistic of a seed is not finite")
    estimate = float(of_seeds.mean())
    if episodes == 1:
        return Interval(estimate, None, None, level, seeds)
    deviations = _widening(level, episodes) * (of_resamples.mean(axis=1) - estimate)
    if seeds > 1:
        chosen = np.random.default_rng(seed).integers(0, seeds, size=(resamples, seeds))
        deviations += _widening(level, seeds) * (of_seeds[chosen].mean(axis=1) - estimate)
    low, high = np.quantile(estimate + deviations, [0.5 - level / 2, 0.5 + level / 2])
    return Interval(estimate, float(low), float(high), level, seeds)


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


@dataclass(frozen=True)
class PairedOutcomes:
    """Two success rates on the same n trials, as counts of trials: both succeeded, only one of them, neither."""

    both: int
    only_first: int
    only_second: int
    neither: int

    @classmethod
    def of[K](cls, first: Mapping[K, bool], second: Mapping[K, bool]) -> "PairedOutcomes":
        """Counted over the trials that both have. Raises ValueError when there is none."""
        pairs = [(first[trial], second[trial]) for trial in first if trial in second]
        if not pairs:
            raise ValueError("no trial that both have")
        return cls(*(pairs.count(kind) for kind in ((True, True), (True, False), (False, True), (False, False))))

    @property
    def n(self) -> int:
        return self.both + self.only_first + self.only_second + self.neither

    def difference(self, *, level: float = 0.95) -> Interval:
        """Rate of the second less that of the first, with Newcombe's interval (1998, "Improved confidence intervals for
        the difference between binomial proportions based on paired data", method 10): from both Wilson intervals
        and the correlation. Unlike a bootstrap it stays honest where no trial, or every one, differs between the two.
        """
        first_below, first, first_above = _arms(self.both + self.only_first, self.n, level)
        second_below, second, second_above = _arms(self.both + self.only_second, self.n, level)
        correlation = self._correlation

        def combined(a: float, b: float) -> float:
            return math.sqrt(max(a * a - 2 * correlation * a * b + b * b, 0.0))

        estimate = second - first
        low, high = estimate - combined(second_below, first_above), estimate + combined(second_above, first_below)
        return Interval(estimate, low, high, level, self.n)

    @property
    def _correlation(self) -> float:
        """Of the outcomes, corrected for continuity as in Newcombe's method 10."""
        margins = (
            (self.both + self.only_first)
            * (self.only_second + self.neither)
            * (self.both + self.only_second)
            * (self.only_first + self.neither)
        )
        if margins == 0:
            return 0.0
        covariance = self.both * self.neither - self.only_first * self.only_second
        corrected = max(covariance - self.n / 2, 0.0) if covariance > 0 else covariance
        return corrected / math.sqrt(margins)

    @property
    def p_value(self) -> float:
        """McNemar's test, exact and two-sided: how likely trials that differ between the two are split so unevenly
        when each falls either way with probability one half; 1 when there is none.
        """
        apart, fewer = self.only_first + self.only_second, min(self.only_first, self.only_second)
        return min(1.0, 2 * sum(math.comb(apart, k) for k in range(fewer + 1)) / 2**apart)


def mean_interval[K](scores: Mapping[K, float], *, level: float = 0.95) -> Interval:
    """The mean over episodes with its bootstrap interval. Raises ValueError as `paired_bootstrap` does."""
    numbered = dict(enumerate(scores.values()))
    return paired_bootstrap(dict.fromkeys(numbered, 0.0), numbered, level=level)


def _arms(successes: int, trials: int, level: float) -> tuple[float, float, float]:
    """How far Wilson's interval reaches below the rate, the rate, and how far above."""
    found = wilson(successes, trials, level=level)
    assert found.low is not None
    assert found.high is not None
    return found.estimate - found.low, found.estimate, found.high - found.estimate


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


def _widening(level: float, n: int) -> float:
    """By how much Student's interval of a mean of n values is wider than the spread of its bootstrap says."""
    return math.sqrt(n / (n - 1)) * student_quantile(level, n - 1) / NormalDist().inv_cdf(0.5 + level / 2)


def _expanded_percentiles(samples: np.ndarray, level: float, n: int) -> tuple[float, float]:
    """Percentiles of the samples, widened for n units so that a mean gets Student's interval."""
    tail = NormalDist().cdf(-_widening(level, n) * NormalDist().inv_cdf(0.5 + level / 2))
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
