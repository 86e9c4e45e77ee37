"""Policies side by side: what episodes add up to, and what a difference on the same layouts is worth."""

import math
from typing import Any

import pytest

from kuavo_train.evaluation.episodes import Episode
from kuavo_train.evaluation.paired_comparison import differ, judge
from kuavo_train.metrics.intervals import PairedOutcomes


def episode(seed: int, *, success: bool = True, **known: Any) -> Episode:
    usual: dict[str, Any] = {
        "progress": 1.0 if success else 0.5,
        "reward": 2.0 if success else 0.5,
        "steps": 10,
        "subgoals": {"picked": 4, "placed": 9 if success else None},
        "cue": 0,
        "choice": None,
        "roughness": 0.1,
    }
    return Episode(seed=seed, success=success, **(usual | known))


def episodes(*outcomes: bool) -> dict[Any, Episode]:
    return {seed: episode(seed, success=success) for seed, success in enumerate(outcomes)}


@pytest.mark.parametrize(
    ("counts", "low", "high"),
    [  # Newcombe 1998, "Improved confidence intervals …", method 10; here the second less the first
        ((36, 2, 12, 0), 0.0569, 0.3404),
        ((36, 12, 2, 0), -0.3404, -0.0569),
        ((0, 0, 0, 54), -0.0664, 0.0664),
    ],
)
def test_the_interval_of_a_paired_difference_is_the_published_one(counts: tuple, low: float, high: float) -> None:
    found = PairedOutcomes(*counts).difference()
    assert (found.low, found.high) == (pytest.approx(low, abs=2e-4), pytest.approx(high, abs=2e-4))


@pytest.mark.parametrize(
    ("lost", "won", "p"), [(0, 0, 1.0), (3, 3, 1.0), (0, 5, 2 / 32), (5, 0, 2 / 32), (1, 9, 22 / 1024), (0, 1, 1.0)]
)
def test_mcnemars_test_is_the_exact_two_sided_one(lost: int, won: int, p: float) -> None:
    assert PairedOutcomes(4, lost, won, 7).p_value == pytest.approx(p)


def test_a_policy_is_judged_by_the_episodes_that_could_be_played() -> None:
    judged = judge(episodes(True, False, True) | {9: episode(9, success=False, error="it broke")})
    assert (judged["success"]["successes"], judged["success"]["n"]) == (2, 3)
    assert judged["progress"]["estimate"] == pytest.approx(2.5 / 3)
    assert judged["reward"]["estimate"] == pytest.approx(1.5)
    assert [(reached["name"], reached["count"], reached["step"]) for reached in judged["funnel"]] == [
        ("picked", 3, 4.0),
        ("placed", 2, 9.0),
    ]
    assert judged["failures"] == ["seed 9: it broke"]
    assert judged["branches"] is None


def test_branches_are_counted_among_those_that_acted_on_a_cue() -> None:
    judged = judge(
        {0: episode(0, choice=0), 1: episode(1, choice=1), 2: episode(2, choice=None), 3: episode(3, choice=0)}
    )
    assert (judged["branches"]["right"], judged["branches"]["n"]) == (2, 3)


def test_nothing_played_is_no_success_rate_of_zero() -> None:
    judged = judge({0: episode(0, error="it broke")})
    assert judged["success"] is None
    assert judged["progress"] is None


def test_a_difference_is_taken_on_the_layouts_that_both_have_played() -> None:
    mine, other = episodes(True, True, True, False), episodes(False, False, True, True)
    other[0] = episode(0, success=False, error="it broke")
    found = differ(mine, other)
    assert found is not None
    assert (found["n"], found["won"], found["lost"]) == (3, 1, 1)
    assert found["success"]["estimate"] == pytest.approx(0.0)
    assert found["p_value"] == 1.0
    assert differ(mine, {7: episode(7)}) is None


def test_an_interval_of_no_difference_at_all_still_has_a_width() -> None:
    found = differ(episodes(True, True, True), episodes(True, True, True))
    assert found is not None
    assert found["success"]["low"] < 0 < found["success"]["high"]
    assert math.isclose(found["success"]["low"], -found["success"]["high"])
