"""The expert reaches what it can reach, says what it cannot, and nearly always succeeds."""

import numpy as np
import pytest

import kuavo_sim
from kuavo_sim import expert, motions
from kuavo_sim.env import KuavoEnv
from kuavo_sim.expert import demonstrate, success_rate, wilson_interval
from kuavo_sim.motions import DOWN, InverseKinematics, Script, UnreachableError
from kuavo_sim.robot import ARM_SLICE, HOME, SIDES
from kuavo_sim.scene import DARK, TABLE_TOP
from kuavo_sim.tasks import TASKS


@pytest.mark.parametrize("task", kuavo_sim.JOBS)
def test_the_expert_succeeds_under_noise_and_within_the_time_limit(task):
    successes, lengths, failures = success_rate(task, episodes=5, seed=300)
    assert failures == []
    assert successes == 5
    assert np.median(lengths) <= 110
    assert max(lengths) < TASKS[task].time_limit - 20


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


def grips_of(task: str, episodes: int, **noise: float) -> list[np.ndarray]:
    """Of each grasp in demonstrations that succeed, [3] m from the object to the tool point."""
    grips, env = [], KuavoEnv(task, renderer="none", image_size=8)
    step, held = env.step, [False]

    def watched(action: np.ndarray):
        seen, world = step(action), env.task.world
        if world.held and not held[0]:
            side = next(side for side in SIDES if world.holds(side))
            grips.append(world.tool_position(side) - world.object_position())
        held[0] = world.held
        return seen

    env.step = watched  # type: ignore[method-assign]
    for seed in range(episodes):
        held[0] = False
        assert demonstrate(env, seed, **noise).success
    return grips


def test_the_expert_grips_off_centre_as_policies_do_and_puts_down_exactly_none_the_less():
    disturbed = np.linalg.norm(np.array(grips_of("weighing", 6))[:, :2], axis=1)
    assert np.median(disturbed) > 0.01
    assert np.abs(grips_of("weighing", 2, action_noise=0.0)).max() < 0.003


def test_some_first_grasps_miss_and_are_tried_again(monkeypatch):
    monkeypatch.setattr(motions, "GRASPING", 0.0)  # with which a few miss by chance
    closings = []
    env = KuavoEnv("weighing", renderer="none", image_size=8)
    for seed in range(20):
        closed = demonstrate(env, seed).actions[:, 15] > 0.5
        closings.append(int((np.diff(closed.astype(int)) > 0).sum()))
    assert min(closings) == 2
    assert 0 < sum(count > 2 for count in closings) < 10


def test_a_hand_comes_to_be_beside_where_the_recorded_actions_lead_until_it_moves_on():
    env = KuavoEnv("weighing", renderer="none", image_size=8)
    env.reset(seed=0)
    world, arm = env.task.world, ARM_SLICE["right"]
    script = Script(world, lambda: False, np.random.default_rng(0))

    def carried_out(commands) -> np.ndarray:
        """[3] m from where the last action leads to where the hand is; [7] rad of its offset."""
        for command in [*commands, *script.wait(5)]:
            env.step(np.clip(command.action + command.offset, env.action_space.low, env.action_space.high))
        distance, _ = script.ik.offset("right", command.action[arm], world.tool_position("right"), DOWN)
        return distance

    place = np.array([0.42, -0.20, 1.0])
    beside = carried_out(script.reach("right", place, beside=(0.04, 0.05)))
    assert 0.03 < np.linalg.norm(beside[:2]) < 0.06
    assert abs(beside[2]) < 0.015
    assert np.linalg.norm(carried_out(script.reach("right", place - (0, 0, 0.05)))) < 0.015


def placed_and_put_down(seeds: range) -> list[int]:
    """Of each demonstration of moving_grasp, how often the object was put down: twice is what the job asks for."""
    env, counts = KuavoEnv("moving_grasp", renderer="none", image_size=8), []
    for seed in seeds:
        demonstration = demonstrate(env, seed)
        assert demonstration.success
        open_again = np.diff((demonstration.actions[:, 15] < 0.5).astype(int)) > 0
        counts.append(int(open_again.sum()))
    return counts


def test_what_comes_to_lie_beside_its_mark_is_taken_and_put_down_anew(monkeypatch):
    monkeypatch.setattr(motions, "_SLIPS", 0.0)
    monkeypatch.setattr(motions, "GRASPING", 0.0)
    counts = placed_and_put_down(range(16))
    assert set(counts) <= {2, 3, 4}
    assert 2 < sum(count > 2 for count in counts) < 14
    monkeypatch.setattr(motions, "_MISPLACED", 0.0)
    assert placed_and_put_down(range(4)) == [2] * 4


def test_a_target_is_dark_once_the_object_has_rested_where_it_should():
    env = KuavoEnv("moving_grasp", renderer="none", image_size=8)
    env.reset(seed=3, options={"cue": 0})
    task, model = env.task, env.task.world.model
    place = model.joint("object").qposadr[0]
    for off, dark in ((0.055, False), (0.02, True), (0.055, True)):
        for _ in range(8):
            task.world.data.qpos[place : place + 2] = task._targets[0] + (off, 0)
            task.world.data.qpos[place + 2] = TABLE_TOP + 0.004 + task._half_height
            env.step(env.task.world.target[:16])
        assert np.allclose(model.geom("target0").rgba[:3], DARK) == dark


def test_the_base_comes_to_stand_off_where_the_recorded_actions_send_it():
    env = KuavoEnv("sorting", renderer="none", image_size=8)
    stood = []
    for seed in range(4):
        demonstration = demonstrate(env, seed)
        assert demonstration.success
        drives = demonstration.actions[demonstration.actions[:, 19] > 0.5, 16:19]
        np.testing.assert_allclose(drives[0], (0.35, 0.0, 0.0), atol=1e-6)
        stood.append(env.task.world.base_pose() - drives[-1])
    assert 0.002 < np.abs(stood).max() < 0.03


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
