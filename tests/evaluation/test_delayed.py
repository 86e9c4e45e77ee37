"""A policy whose answers take time, and how smoothly a robot is told to move."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_datasets import ARM_NAMES, BASE_NAMES, CAMERAS

from kuavo_train.errors import ConfigError
from kuavo_train.evaluation.checkpoints import rows_of
from kuavo_train.evaluation.delayed import Delayed
from kuavo_train.evaluation.options import Options
from kuavo_train.evaluation.smoothness import HELD, smoothness
from kuavo_train.wrapper.policy.smolvla import SmolVLAPolicyWrapper

STEPS, CHUNK = 2, 6  # n_action_steps and chunk_size of the small checkpoint


def look(number: int, robots: int = 1) -> dict[str, Any]:
    random = np.random.default_rng(number)
    shape = (robots, 32, 32, 3)
    return {
        **{f"observation.images.{camera}": random.integers(0, 256, shape, dtype=np.uint8) for camera in CAMERAS},
        "observation.state": random.normal(size=(robots, 16)).astype(np.float32),
        "task": "weighing",
    }


@pytest.fixture(scope="module")
def policy(small_checkpoint: Path) -> SmolVLAPolicyWrapper:
    return SmolVLAPolicyWrapper.from_pretrained(small_checkpoint, device="cpu", seed=3)


def walk(policy: Any, steps: int = 8, seed: int = 5) -> tuple[np.ndarray, list[int]]:
    """[steps, A] of one robot, and the chunks that they are of."""
    policy.reset(seeds=[seed])
    acted, chunks = [], []
    for step in range(steps):
        acted.append(policy.select_action(look(step))[0])
        chunks += policy.chunks() if isinstance(policy, Delayed) else [step // STEPS]
    return np.stack(acted), chunks


def test_without_delay_waiting_is_the_policy_as_it_is(policy: SmolVLAPolicyWrapper) -> None:
    expected, numbers = walk(policy)
    acted, chunks = walk(Delayed(policy, "wait", 0))
    assert np.array_equal(acted, expected)
    assert chunks == numbers


def test_a_robot_that_waits_holds_its_pose_until_the_answer_is_there(policy: SmolVLAPolicyWrapper) -> None:
    acted, chunks = walk(Delayed(policy, "wait", 3), 10)
    assert chunks == [HELD] * 3 + [0, 0] + [HELD] * 3 + [1, 1]
    np.testing.assert_allclose(acted[0], look(0)["observation.state"][0], atol=1e-6)
    assert all(np.array_equal(pose, acted[4]) for pose in acted[5:8])


def test_a_robot_that_goes_on_is_held_only_until_its_first_answer(policy: SmolVLAPolicyWrapper) -> None:
    for handover in ("blend", "rtc"):
        _, chunks = walk(Delayed(policy, handover, 2), 10)
        assert chunks == [HELD] * 2 + [0] * 4 + [1] * 2 + [2] * 2


def test_a_chunk_planned_for_the_hand_over_begins_with_what_is_carried_out_meanwhile(
    policy: SmolVLAPolicyWrapper,
) -> None:
    jumps = {}
    for handover in ("blend", "rtc"):
        delayed = Delayed(policy, handover, 2)
        delayed.reset(seeds=[5])
        answers = []
        for step in range(7):
            delayed.select_action(look(step))
            answers.append(delayed._robots[0].answer)
        first, second = answers[0].actions, answers[4].actions
        jumps[handover] = float(np.abs(second[:2] - first[STEPS : STEPS + 2]).max())
    assert jumps["rtc"] < 1e-4 < jumps["blend"]


def test_robots_of_a_batch_keep_their_own_time(policy: SmolVLAPolicyWrapper) -> None:
    delayed = Delayed(policy, "blend", 1)
    delayed.reset(seeds=[0, 0])
    chunks = []
    for step in range(6):
        if step == 3:
            delayed.reset([1], seeds=[7])
        delayed.select_action(look(step, robots=2))
        chunks.append(delayed.chunks())
    assert [each[0] for each in chunks] == [HELD, 0, 0, 0, 1, 1]
    assert [each[1] for each in chunks] == [HELD, 0, 0, HELD, 0, 0]


def test_each_hand_over_at_each_delay_is_a_row(policy: SmolVLAPolicyWrapper, small_checkpoint: Path) -> None:
    options = Options({"a": str(small_checkpoint)}, delay_ms=(0.0, 150.0), handover=("wait", "rtc"))
    rows = list(rows_of("a", policy, options, "a"))
    assert [row.name for row in rows] == ["a", "a, wait, 0 ms", "a, wait, 150 ms", "a, rtc, 0 ms", "a, rtc, 150 ms"]
    assert [row.against for row in rows] == [None, "a", "a", "a", "a"]
    assert isinstance(rows[2].driving(policy), Delayed)
    assert rows[2].driving(policy)._delay == 2  # of 100 ms, rounded up


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"delay_ms": (100.0,)}, "delay_ms and handover must be given together"),
        ({"delay_ms": (-1.0,), "handover": ("wait",)}, "delay_ms must not be negative"),
        ({"delay_ms": (0.0,), "handover": ("jump",)}, "handover must be one of wait, blend, rtc, got 'jump'"),
    ],
)
def test_what_cannot_be_delayed_is_refused(small_checkpoint: Path, given: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        Options({"a": str(small_checkpoint)}, **given)


# --------------------------------------------------------------------------------------------------------- smoothness

NAMES = ARM_NAMES + BASE_NAMES


def moving(**columns: list[float]) -> np.ndarray:
    """[T, 20] where only these dimensions move."""
    actions = np.zeros((len(next(iter(columns.values()))), len(NAMES)))
    for name, values in columns.items():
        actions[:, NAMES.index(name)] = values
    return actions


def test_a_jump_between_chunks_is_no_acceleration_inside_them() -> None:
    arms = [0.0, 0.1, 0.2, 1.2, 1.3, 1.4]
    found = smoothness(moving(zarm_l1_link=arms), [0, 0, 0, 1, 1, 1], NAMES)["arms"]
    assert found.jump == pytest.approx(1.0 / 14)
    assert found.acceleration == pytest.approx(0.0, abs=1e-12)
    assert found.reversed == 0.0


def test_acceleration_inside_a_chunk_is_no_jump() -> None:
    found = smoothness(moving(left_claw=[0.0, 0.0, 1.0, 1.0]), [0, 0, 0, 0], NAMES)["claws"]
    assert found.jump is None
    assert found.acceleration == pytest.approx(1.0 / 2)


def test_turning_back_is_counted_among_movements_and_pauses_are_none() -> None:
    steps = [0.0, 1.0, 1.0, 2.0, 1.0, 2.0]  # on, pause, on, back, on
    assert smoothness(moving(zarm_r2_link=steps), [0] * 6, NAMES)["arms"].reversed == pytest.approx(2 / 3)


def test_arms_claws_and_base_are_told_apart_and_the_switch_is_none_of_them() -> None:
    found = smoothness(moving(ctrl_change_cmd=[0.0, 1.0, 0.0, 1.0]), [0, 0, 1, 1], NAMES)
    assert list(found) == ["arms", "claws", "base"]
    assert {each.jump for each in found.values()} == {0.0}
    assert list(smoothness(np.zeros((3, 16)), [0, 0, 0], ARM_NAMES)) == ["arms", "claws"]


def test_a_pose_held_is_inside_no_chunk() -> None:
    actions = moving(zarm_l1_link=[0.0, 1.0, 1.0, 1.0, 2.0])
    found = smoothness(actions, [0, 0, HELD, HELD, 1], NAMES)["arms"]
    assert found.acceleration is None
    assert found.jump == pytest.approx((0 + 1.0) / 2 / 14)
