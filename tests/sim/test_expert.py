"""The expert reaches what it can reach, says what it cannot, and nearly always succeeds."""

import numpy as np
import pytest

import kuavo_sim
from kuavo_sim import expert
from kuavo_sim.env import KuavoEnv
from kuavo_sim.expert import demonstrate, success_rate, wilson_interval
from kuavo_sim.motions import DOWN, InverseKinematics, Script, UnreachableError
from kuavo_sim.robot import ARM_SLICE, HOME
from kuavo_sim.tasks import TASKS


@pytest.mark.parametrize("task", kuavo_sim.JOBS)
def test_the_expert_succeeds_under_noise_and_within_the_time_limit(task):
    successes, lengths, failures = success_rate(task, episodes=5, seed=300)
    assert failures == []
    assert successes == 5
    assert max(lengths) <= 110 < TASKS[task].time_limit


@pytest.fixture(scope="module")
def world():
    env = KuavoEnv("weighing", renderer="none", image_size=8)
    env.reset(seed=0)
    return env.task.world


@pytest.mark.parametrize("side", ["left", "right"])
def test_inverse_kinematics_brings_the_tool_to_the_pose(world, side):
    sign = 1 if side == "left" else -1
    goal = np.array([0.42, sign * 0.15, 0.92])
    ik = InverseKinematics(world)
    posture = ik.solve(side, goal, DOWN, HOME[side])
    offset, turn = ik.offset(side, posture, goal, DOWN)
    assert np.linalg.norm(offset) < 0.003
    assert np.linalg.norm(turn) < 0.35


def test_inverse_kinematics_refuses_what_is_out_of_reach(world):
    with pytest.raises(UnreachableError, match="the right hand cannot reach"):
        InverseKinematics(world).solve("right", np.array([1.2, 0.0, 1.0]), DOWN, HOME["right"])


def test_noise_disturbs_the_states_but_not_where_the_recorded_actions_lead():
    env = KuavoEnv("placement", renderer="none", image_size=8)
    clean, noisy = (demonstrate(env, 4, action_noise=noise) for noise in (0.0, 0.025))
    arm = ARM_SLICE["right"]
    steps = 6
    np.testing.assert_allclose(clean.actions[:steps, arm], noisy.actions[:steps, arm], atol=1e-6)
    assert np.abs(clean.states[1:steps, arm] - noisy.states[1:steps, arm]).max() > 0.005


def test_a_missed_grasp_is_tried_again():
    env = KuavoEnv("weighing", renderer="none", image_size=8)
    env.reset(seed=0)
    script = Script(env.task.world, lambda: env.task.at_decision_point)
    commands = script.pick("right", (0.46, -0.18, 1.05))
    closings = 0
    was_closed = False
    for command in commands:  # never executed, so never held
        closed = command.action[15] > 0.5
        closings += closed and not was_closed
        was_closed = closed
    assert closings == 3


def test_wilsons_interval_is_that_of_the_textbook():
    low, high = wilson_interval(95, 100)
    assert (low, high) == (pytest.approx(0.8882, abs=1e-4), pytest.approx(0.9785, abs=1e-4))
    assert wilson_interval(100, 100) == (pytest.approx(0.9630, abs=1e-4), pytest.approx(1.0))


def test_the_command_prints_the_rate_and_refuses_unknown_keys(capsys):
    assert expert.main(["task=sorting", "episodes=2"]) == 0
    assert "2/2 = 100%" in capsys.readouterr().out
    assert expert.main(["tasks=sorting"]) == 2
    assert "task, episodes, action_noise, seed; got 'tasks=sorting'" in capsys.readouterr().err
