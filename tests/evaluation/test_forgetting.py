"""Metrics against cases worked out by hand, and the rule of the verdict at its edges."""

import pytest

from kuavo_train.metrics import forgetting as f
from kuavo_train.metrics.forgetting import MissingCellError, PerformanceMatrix
from kuavo_train.metrics.intervals import Interval, PairedOutcomes
from kuavo_train.metrics.verdict import (
    SIGNIFICANT_FORGETTING,
    SLIGHT_DEGRADATION,
    WELL_RETAINED,
    RetentionLimits,
    judge,
    judge_absolute,
    judge_success,
)

SUCCESS = ((0.1, 0.2, 0.3), (0.8, 0.3, 0.2), (0.6, 0.9, 0.5), (0.7, 0.6, 1.0))


def success(values=SUCCESS, tasks=("a", "b", "c"), learnt_in=(1, 2, 3), stages=(0, 1, 2, 3)):
    return PerformanceMatrix("success", True, tasks, learnt_in, stages, values)


def loss(values, tasks=("a", "b", "c"), learnt_in=(1, 2, 3), stages=(0, 1, 2, 3)):
    return PerformanceMatrix("loss", False, tasks, learnt_in, stages, values)


def test_metrics_of_success_rates_equal_those_worked_out_by_hand():
    matrix = success()
    assert f.average_score(matrix) == pytest.approx((0.7 + 0.6 + 1.0) / 3)
    assert f.plasticity(matrix) == pytest.approx((0.8 + 0.9 + 1.0) / 3)
    assert f.backward_transfer(matrix) == pytest.approx(((0.7 - 0.8) + (0.6 - 0.9)) / 2)
    assert f.forgetting(matrix) == pytest.approx({"a": 0.8 - 0.7, "b": 0.9 - 0.6})
    assert f.mean_forgetting(matrix) == pytest.approx(0.2)
    assert f.forward_transfer(matrix) == pytest.approx(((0.3 - 0.2) + (0.5 - 0.3)) / 2)
    assert f.intransigence(matrix, {"a": 0.9, "b": 0.9, "c": 0.9}) == pytest.approx({"a": 0.1, "b": 0.0, "c": -0.1})


def test_forgetting_counts_from_the_best_score_since_learnt_not_from_the_first():
    matrix = success(((None, None), (0.5, None), (0.9, 0.4), (0.6, 0.4)), ("a", "b"), (1, 2), (0, 1, 2, 3))
    assert f.forgetting(matrix)["a"] == pytest.approx(0.9 - 0.6)
    assert f.backward_transfer(matrix) == pytest.approx(((0.6 - 0.5) + 0.0) / 2)


def test_a_score_before_a_task_was_learnt_is_never_its_best():
    matrix = success(((0.0, 1.0), (0.5, 1.0), (0.5, 0.3), (0.5, 0.2)), ("a", "b"), (1, 2), (0, 1, 2, 3))
    assert f.forgetting(matrix)["b"] == pytest.approx(0.3 - 0.2)


def test_libero_metrics_equal_those_worked_out_by_hand():
    matrix = success()
    fwt = f.libero_fwt({"a": [0.4, 0.8], "b": [0.3, 0.6, 0.9], "c": [1.0]})
    assert fwt == pytest.approx({"a": 0.6, "b": 0.6, "c": 1.0})
    assert f.libero_nbt(matrix) == pytest.approx({"a": (0.2 + 0.1) / 2, "b": 0.3})
    assert f.libero_nbt(matrix, relative=True) == pytest.approx({"a": 0.15 / 0.8, "b": 0.3 / 0.9})
    assert f.libero_auc(matrix, fwt) == pytest.approx({"a": (0.6 + 0.6 + 0.7) / 3, "b": (0.6 + 0.6) / 2, "c": 1.0})


def test_losses_are_negated_so_that_a_rising_loss_is_forgetting():
    matrix = loss(((1.0, 1.1), (0.2, 1.0), (0.5, 0.3)), ("a", "b"), (1, 2), (0, 1, 2))
    assert f.average_score(matrix) == pytest.approx(-0.4)
    assert f.backward_transfer(matrix) == pytest.approx(-0.3)
    assert f.mean_forgetting(matrix) == pytest.approx(0.3)
    assert f.forward_transfer(matrix) == pytest.approx(0.1)
    assert f.intransigence(matrix, {"a": 0.1, "b": 0.3}) == pytest.approx({"a": 0.1, "b": 0.0})
    assert f.mean_intransigence(matrix, {"a": 0.1, "b": 0.3}) == pytest.approx(0.05)


def test_a_single_task_has_an_average_and_nothing_that_compares():
    matrix = loss(((1.0,), (0.2,)), ("a",), (1,), (0, 1))
    assert f.average_score(matrix) == pytest.approx(-0.2)
    assert f.backward_transfer(matrix) is f.mean_forgetting(matrix) is f.forward_transfer(matrix) is None
    assert f.forgetting(matrix) == {}


def test_a_skipped_stage_compares_with_the_stage_really_trained_before_it():
    values = ((1.0, 1.0, 1.0), (0.2, 0.9, 0.8), (0.3, 0.2, 0.7), (0.4, 0.5, 0.2))
    matrix = loss(values, ("a", "b", "d"), (1, 2, 4), (0, 1, 2, 4))
    assert f.forward_transfer(matrix) == pytest.approx(((1.0 - 0.9) + (1.0 - 0.7)) / 2)
    assert f.backward_transfer(matrix) == pytest.approx(-((0.4 - 0.2) + (0.5 - 0.2)) / 2)


def test_a_run_cut_short_counts_only_the_tasks_it_learnt():
    matrix = loss(((1.0, 1.0, None), (0.2, 0.9, None), (0.3, 0.2, None)), stages=(0, 1, 2))
    assert f.average_score(matrix) == pytest.approx(-(0.3 + 0.2) / 2)
    assert f.mean_forgetting(matrix) == pytest.approx(0.1)


def test_tasks_learnt_jointly_in_one_stage_have_nothing_to_forget():
    matrix = loss(((1.0, 1.0), (0.2, 0.3)), ("a", "b"), (1, 1), (0, 1))
    assert f.average_score(matrix) == pytest.approx(-0.25)
    assert f.backward_transfer(matrix) is None


def test_a_hole_that_a_metric_needs_is_an_error_naming_stage_and_task():
    matrix = loss(((1.0, 1.0), (0.2, None), (None, 0.3)), ("a", "b"), (1, 2), (0, 1, 2))
    with pytest.raises(MissingCellError, match="loss of task a after stage 2"):
        f.backward_transfer(matrix)
    with pytest.raises(MissingCellError, match="loss of task b after stage 1"):
        f.forward_transfer(matrix)


def test_a_missing_row_0_stops_forward_transfer_alone():
    matrix = loss(((None, None), (0.2, 0.9), (0.3, 0.3)), ("a", "b"), (1, 2), (0, 1, 2))
    assert f.backward_transfer(matrix) == pytest.approx(-0.1)
    with pytest.raises(MissingCellError, match=r"before training \(row 0\)"):
        f.forward_transfer(matrix)


def test_a_task_the_joint_run_lacks_is_an_error_not_a_zero():
    with pytest.raises(MissingCellError, match="task c is missing from the joint run"):
        f.intransigence(success(), {"a": 0.9, "b": 0.9})


def test_libero_metrics_refuse_losses_and_tasks_that_never_succeeded():
    with pytest.raises(ValueError, match="success rates, not on loss"):
        f.libero_nbt(loss(((1.0,), (0.2,)), ("a",), (1,), (0, 1)))
    with pytest.raises(ValueError, match="task a had no success"):
        f.libero_nbt(success(((0.0, 0.0), (0.0, 0.0), (0.0, 0.5)), ("a", "b"), (1, 2), (0, 1, 2)), relative=True)
    with pytest.raises(MissingCellError, match="task a was never measured"):
        f.libero_fwt({"a": []})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": ("a", "a", "c")}, "tasks must be distinct"),
        ({"learnt_in": (1, 2)}, "learnt_in must give a stage"),
        ({"learnt_in": (0, 1, 2)}, "learnt_in must give a stage from 1 on"),
        ({"stages": (1, 2, 3, 4)}, "stages must start with 0"),
        ({"stages": (0, 2, 1, 3)}, "stages must start with 0 and increase"),
        ({"values": SUCCESS[:3]}, "must be 4 stages × 3 tasks"),
        ({"values": (*SUCCESS[:3], (0.1, float("nan"), 0.2))}, "task b after stage 3 is nan"),
    ],
)
def test_a_matrix_that_does_not_fit_together_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        success(**change)


@pytest.mark.parametrize(
    ("low", "high", "word", "worst"),
    [
        (-0.20, 0.05, WELL_RETAINED, WELL_RETAINED),
        (0.02, 0.10, WELL_RETAINED, WELL_RETAINED),
        (0.02, 0.11, WELL_RETAINED, SLIGHT_DEGRADATION),
        (-2.0, 9.00, WELL_RETAINED, SIGNIFICANT_FORGETTING),
        (0.11, 0.30, SLIGHT_DEGRADATION, SLIGHT_DEGRADATION),
        (0.25, 0.40, SLIGHT_DEGRADATION, SIGNIFICANT_FORGETTING),
        (0.31, 0.90, SIGNIFICANT_FORGETTING, SIGNIFICANT_FORGETTING),
    ],
)
def test_the_lower_end_of_the_interval_decides_the_verdict_and_the_upper_end_whether_it_is_settled(
    low, high, word, worst
):
    verdict = judge(Interval((low + high) / 2, low, high, 0.95, 12), RetentionLimits())
    assert (verdict.word, verdict.worst, verdict.settled) == (word, worst, word == worst)


def test_without_an_interval_the_estimate_decides_and_nothing_is_settled():
    verdict = judge(Interval(0.5, None, None, 0.95, 1), RetentionLimits())
    assert (verdict.word, verdict.worst, verdict.settled) == (SIGNIFICANT_FORGETTING, None, False)


@pytest.mark.parametrize(
    ("both", "lost", "won", "neither", "word", "worst"),
    [
        (40, 0, 0, 0, WELL_RETAINED, WELL_RETAINED),
        (10, 0, 0, 0, WELL_RETAINED, SLIGHT_DEGRADATION),  # ten layouts do not show that it was kept
        (0, 2, 0, 8, WELL_RETAINED, SIGNIFICANT_FORGETTING),  # from 20 % to 0: nor that it was lost
        (0, 5, 0, 0, WELL_RETAINED, SIGNIFICANT_FORGETTING),  # p = 0.06, though the interval begins at 39 points
        (11, 9, 0, 0, SLIGHT_DEGRADATION, SIGNIFICANT_FORGETTING),
        (2, 18, 0, 0, SIGNIFICANT_FORGETTING, SIGNIFICANT_FORGETTING),
        (5, 0, 15, 0, WELL_RETAINED, WELL_RETAINED),
    ],
)
def test_a_drop_in_success_is_called_so_only_where_the_paired_test_shows_it(both, lost, won, neither, word, worst):
    verdict = judge_success(PairedOutcomes(both, lost, won, neither), RetentionLimits())
    assert verdict is not None
    assert (verdict.word, verdict.worst) == (word, worst)


def test_limits_of_the_drop_in_success_decide_its_word():
    outcomes = PairedOutcomes(2, 18, 0, 0)
    assert judge_success(outcomes, RetentionLimits(slight_drop=1.0)).word == SLIGHT_DEGRADATION
    assert judge_success(outcomes, RetentionLimits(well_retained_drop=1.0, slight_drop=1.0)).word == WELL_RETAINED
    assert judge_success(outcomes, RetentionLimits(confidence=1 - 1e-6)).word == WELL_RETAINED


def test_what_never_succeeded_has_no_success_to_lose():
    assert judge_success(PairedOutcomes(0, 0, 3, 7), RetentionLimits()) is None


def test_absolute_limits_judge_the_loss_alone():
    words = [judge_absolute(value, RetentionLimits()) for value in (0.69, 0.7, 0.99, 1.0)]
    assert words == [WELL_RETAINED, SLIGHT_DEGRADATION, SLIGHT_DEGRADATION, SIGNIFICANT_FORGETTING]


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"well_retained_change": 0.4}, r"well_retained_change must be in \[0, slight_change = 0.3\], got 0.4"),
        ({"well_retained_drop": 0.5}, r"well_retained_drop must be in \[0, slight_drop = 0.3\], got 0.5"),
        ({"well_retained_loss": 2.0}, r"well_retained_loss must be in \[0, slight_loss = 1.0\], got 2.0"),
        ({"confidence": 1.0}, "confidence must be in"),
        ({"resamples": 0}, "resamples must be at least 1"),
    ],
)
def test_limits_that_contradict_each_other_are_refused(limits, message):
    with pytest.raises(ValueError, match=message):
        RetentionLimits(**limits)
