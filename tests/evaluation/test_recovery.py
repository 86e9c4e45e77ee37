"""Lost or only suppressed: which word follows from which curves."""

import pytest

from kuavo_train.metrics.verdict import RetentionLimits
from kuavo_train.probing.recovery import KEPT, LOST, PARTLY_KEPT, SUPPRESSED, UNDECIDED, recovery_record

LIMITS = RetentionLimits(resamples=500)
LEARNT = (0.10, 0.12, 0.09, 0.11, 0.10, 0.08)


def scores(level):
    """Six episodes whose mean is `level` times the loss when learnt."""
    return {episode: level * value for episode, value in enumerate(LEARNT)}


def curve(*levels):
    return [(10 * number, scores(level)) for number, level in enumerate(levels)]


def recovered(final, before):
    return recovery_record(
        "grasp", learnt=scores(1), final=final, before=before, before_is="the weights before training", limits=LIMITS
    )


@pytest.mark.parametrize(
    ("final", "before", "word"),
    [
        (curve(1.05, 1.0, 1.0), curve(20, 9, 5), KEPT),
        (curve(2.0, 1.4, 1.05), curve(20, 9, 5), SUPPRESSED),
        (curve(2.0, 1.05, 1.0), curve(3, 2, 1.05), SUPPRESSED),
        (curve(2.0, 1.4, 1.05), curve(3, 1.05, 1.0), UNDECIDED),
        (curve(4.0, 3.0, 2.0), curve(20, 9, 5), PARTLY_KEPT),
        (curve(9.0, 7.0, 5.0), curve(9, 7, 5), LOST),
    ],
)
def test_the_word_follows_from_how_fast_the_loss_comes_back(final, before, word):
    assert recovered(final, before)["word"] == word


def test_the_steps_are_those_until_the_loss_is_back_within_the_limit():
    record = recovered(curve(2.0, 1.4, 1.05), curve(20, 9, 5))
    assert (record["steps_back"], record["steps_anew"]) == (20, None)
    assert record["steps"] == [0, 10, 20]
    assert record["goal"] == pytest.approx(1.1 * record["loss_when_learnt"])
    assert record["change_at_first"]["estimate"] == pytest.approx(1.0)
    assert record["head_start"]["estimate"] == pytest.approx((5 - 1.05) * record["loss_when_learnt"])
    assert "after 20 steps" in record["evidence"]
    assert "not within 20 steps (0.500)" in record["evidence"]


def test_one_episode_is_judged_by_its_mean():
    once = [(0, {7: 0.3}), (10, {7: 0.1})]
    record = recovery_record("grasp", learnt={7: 0.1}, final=once, before=once, before_is="", limits=LIMITS)
    assert record["word"] == UNDECIDED
    assert record["change_at_first"]["low"] is None
