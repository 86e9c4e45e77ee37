"""Intervals: seeded, paired by episode, wide enough for few episodes, and refusing what cannot be compared."""

import numpy as np
import pytest

from kuavo_train.metrics.intervals import hierarchical_bootstrap, paired_bootstrap, student_quantile, wilson


def episodes(values):
    return dict(enumerate(map(float, values)))


def test_the_estimate_is_the_plain_change_of_the_mean():
    before, after = episodes([0.2, 0.4]), episodes([0.3, 0.6])
    assert paired_bootstrap(before, after).estimate == pytest.approx(0.15)
    assert paired_bootstrap(before, after, relative=True).estimate == pytest.approx(0.5)


def test_the_same_numbers_give_the_same_interval_and_another_seed_another():
    before, after = episodes(np.linspace(0.1, 0.5, 9)), episodes(np.linspace(0.2, 0.4, 9))
    assert paired_bootstrap(before, after) == paired_bootstrap(before, after)
    assert paired_bootstrap(before, after, seed=1) != paired_bootstrap(before, after)


def test_the_order_in_which_episodes_were_stored_does_not_matter():
    before, after = episodes(np.linspace(0.1, 0.5, 9)), episodes(np.linspace(0.2, 0.4, 9))
    assert paired_bootstrap(dict(reversed(before.items())), after) == paired_bootstrap(before, after)


def test_episodes_are_paired_by_id_so_differences_between_episodes_cancel():
    """Episodes differ tenfold, the change is 1 % of each: unpaired, the interval would be far wider than the change."""
    before = {episode: float(value) for episode, value in enumerate(np.geomspace(0.1, 1.0, 12))}
    after = {episode: 1.01 * before[episode] for episode in reversed(before)}
    interval = paired_bootstrap(before, after, relative=True)
    assert interval.low == pytest.approx(0.01)
    assert interval.high == pytest.approx(0.01)


def test_intervals_of_few_episodes_cover_the_truth_as_often_as_they_say():
    """A plain percentile bootstrap covers about 88 % here."""
    random = np.random.default_rng(0)
    hits = 0
    for trial in range(400):
        interval = paired_bootstrap(episodes(np.zeros(6)), episodes(random.normal(size=6)), resamples=500, seed=trial)
        hits += interval.low <= 0.0 <= interval.high
    assert 0.92 <= hits / 400 <= 0.98


def test_one_episode_has_an_estimate_but_no_interval():
    interval = paired_bootstrap({7: 0.2}, {7: 0.3})
    assert (interval.low, interval.high, interval.n) == (None, None, 1)


@pytest.mark.parametrize(
    ("before", "after", "relative", "message"),
    [
        ({}, {}, False, "no episodes"),
        ({1: 0.1, 2: 0.2}, {1: 0.1, 3: 0.2}, False, r"only before: \[2\], only after: \[3\]"),
        ({1: 0.1, 2: float("nan")}, {1: 0.1, 2: 0.2}, False, "episode 2 has a score that is not finite"),
        ({1: 0.0, 2: 0.0}, {1: 0.1, 2: 0.2}, True, "positive mean"),
    ],
)
def test_what_cannot_be_compared_is_refused(before, after, relative, message):
    with pytest.raises(ValueError, match=message):
        paired_bootstrap(before, after, relative=relative)


def over_seeds(scores, resamples=1000, **settings):
    """Interval of the mean of `scores` [S, E]."""
    scores = np.asarray(scores, dtype=float)
    rows = np.random.default_rng(0).integers(0, scores.shape[1], size=(resamples, scores.shape[1]))
    of_resamples = scores[:, rows].mean(axis=2).T
    return hierarchical_bootstrap(scores.mean(axis=1), of_resamples, episodes=scores.shape[1], **settings)


def test_seeds_that_disagree_widen_the_interval_beyond_the_episodes_own():
    interval = over_seeds([np.full(20, shift) for shift in (0.00, 0.05, 0.10)])
    assert interval.estimate == pytest.approx(0.05)
    assert interval.n == 3
    assert interval.low <= 0.0
    assert interval.high >= 0.1


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("spread", [(1.0, 0.0, 0.2), (0.3, 1.0, 0.3)], ids=["seeds differ", "episodes differ"])
def test_intervals_of_few_seeds_cover_the_truth_as_often_as_they_say(seeds, spread):
    random = np.random.default_rng(0)
    of_seed, of_episode, of_both = spread
    hits = 0
    for _ in range(200):
        scores = of_seed * random.normal(size=(seeds, 1)) + of_episode * random.normal(size=(1, 8))
        interval = over_seeds(scores + of_both * random.normal(size=(seeds, 8)))
        hits += interval.low <= 0.0 <= interval.high
    assert hits / 200 >= 0.92


def test_a_single_seed_has_the_interval_of_its_episodes_and_a_single_episode_none():
    scores = np.linspace(0.1, 0.5, 9)
    alone, paired = over_seeds([scores]), paired_bootstrap(episodes(np.zeros(9)), episodes(scores))
    assert (alone.low, alone.high) == pytest.approx((paired.low, paired.high), abs=0.02)
    assert over_seeds([[0.3], [0.4]]).low is None


def test_a_seed_whose_statistic_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="not finite"):
        over_seeds([[0.1, np.nan]])
    with pytest.raises(ValueError, match=r"must be \[N, S\] for the 2 seeds"):
        hierarchical_bootstrap(np.zeros(2), np.zeros((10, 3)), episodes=5)


def test_wilson_equals_the_published_values():
    """Newcombe 1998, table I: 81 of 263, 15 of 148, 0 of 20."""
    for successes, trials, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)):
        interval = wilson(successes, trials)
        assert (interval.low, interval.high) == pytest.approx((low, high), abs=5e-5)
    assert wilson(20, 20).high == 1.0


@pytest.mark.parametrize(("successes", "trials"), [(0, 0), (-1, 5), (6, 5)])
def test_impossible_counts_are_refused(successes, trials):
    with pytest.raises(ValueError, match="successes must be in"):
        wilson(successes, trials)


def test_student_quantiles_equal_the_tables():
    for degrees, value in ((1, 12.7062), (2, 4.3027), (5, 2.5706), (19, 2.0930), (10_000, 1.9600)):
        assert student_quantile(0.95, degrees) == pytest.approx(value, abs=1e-4)
