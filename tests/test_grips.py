"""Grips are measured where they happen, and successes are counted by them."""

import numpy as np
import pytest

from benchmarks import grips
from benchmarks.grips import Options, Watched, by_expert, table
from kuavo_sim.env import KuavoEnv


def played(offset: float | None, *, success: bool) -> Watched:
    grip = None if offset is None else np.array([0.0, offset, 0.05])  # how high it holds does not count
    return Watched(KuavoEnv("weighing", renderer="none", image_size=8), grip, success)


def test_successes_are_counted_by_how_far_off_centre_along_the_table_the_first_grip_was() -> None:
    rows = table([played(0.005, success=True), played(0.025, success=False), played(0.05, success=True),
                  played(None, success=False)]).splitlines()  # fmt: skip
    assert "| 0 to 1 cm | 1 | 1 |" in rows
    assert "| 2 to 3 cm | 1 | 0 |" in rows
    assert "| over 4 cm | 1 | 1 |" in rows
    assert "| nothing gripped | 1 | 0 |" in rows
    assert "| all | 4 | 2 |" in rows
    assert rows[-1].startswith("median 2.5 cm")


def test_the_experts_first_grip_of_every_layout_is_measured() -> None:
    found = by_expert(Options(grips.EXPERT, "weighing", n_episodes=2))
    assert [each.success for each in found] == [True, True]
    offsets = [each.grip for each in found if each.grip is not None]
    assert len(offsets) == 2
    assert np.abs(offsets[0] - offsets[1]).max() > 1e-4
    assert np.linalg.norm(offsets, axis=1).max() < 0.06


REFUSED = (
    ["checkpoint=expert"],
    ["checkpoint=expert", "task=juggling"],
    ["checkpoint=expert", "task=weighing", "n_episodes=0"],
)


@pytest.mark.parametrize("words", REFUSED)
def test_what_cannot_be_measured_is_refused_in_one_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert grips.main(words) == 2
    assert "must be" in capsys.readouterr().err
