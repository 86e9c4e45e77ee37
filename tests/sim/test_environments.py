"""What anyone who steps the environments may rely on."""

import subprocess
import sys

import gymnasium
import mujoco
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import kuavo_sim
from kuavo_sim.env import KuavoEnv
from kuavo_sim.expert import demonstrate
from kuavo_sim.render import RayRenderer
from kuavo_sim.robot import CAMERAS
from kuavo_sim.scene import DARK

TASKS = kuavo_sim.JOBS
WITH_CUE = ("moving_grasp", "weighing", "sorting", *kuavo_sim.CUE_SKILLS)


@pytest.mark.parametrize("task", TASKS)
def test_an_environment_passes_gymnasiums_check(task):
    env = gymnasium.make(kuavo_sim.ENVIRONMENT_IDS[task], image_size=16, render_mode="rgb_array")
    check_env(env.unwrapped)
    env.close()


def test_the_ids_are_those_of_the_documentation():
    assert list(kuavo_sim.JOBS) == list(kuavo_sim.tasks.TASKS)
    assert list(kuavo_sim.SKILLS) == list(kuavo_sim.skills.SKILLS)
    assert list(kuavo_sim.CUE_SKILLS) == list(kuavo_sim.skills.CUE_SKILLS)
    assert list(kuavo_sim.ENVIRONMENT_IDS) == [*kuavo_sim.JOBS, *kuavo_sim.SKILLS, *kuavo_sim.CUE_SKILLS]
    assert [kuavo_sim.ENVIRONMENT_IDS[job] for job in kuavo_sim.JOBS] == [
        "kuavo_sim/MovingGrasp-v0",
        "kuavo_sim/Weighing-v0",
        "kuavo_sim/Placement-v0",
        "kuavo_sim/Sorting-v0",
    ]


@pytest.mark.parametrize(
    ("task", "actions"), [("moving_grasp", 16), ("weighing", 16), ("placement", 16), ("sorting", 20)]
)
def test_observations_and_actions_have_kuavos_shapes(task, actions):
    env = KuavoEnv(task, image_size=48)
    observation, info = env.reset(seed=3)
    assert env.action_space.shape == (actions,)
    assert set(observation) == {"pixels", "agent_pos"}
    assert observation["agent_pos"].shape == (16,)
    assert observation["agent_pos"].dtype == np.float32
    assert tuple(observation["pixels"]) == CAMERAS
    for picture in observation["pixels"].values():
        assert picture.shape == (48, 48, 3)
        assert picture.dtype == np.uint8
    assert info["is_success"] is False
    assert env.task_description == env.task.instruction


def test_depth_is_seen_beside_the_pictures_and_changes_nothing_in_them():
    plain, _ = KuavoEnv("weighing", image_size=(24, 32)).reset(seed=3)
    env = KuavoEnv("weighing", image_size=(24, 32), depth=True)
    observation, _ = env.reset(seed=3)
    assert observation in env.observation_space
    assert tuple(observation["depth"]) == ("depth_h", "depth_l", "depth_r")
    for camera in CAMERAS:
        assert observation["pixels"][camera].shape == (24, 32, 3)
        np.testing.assert_array_equal(observation["pixels"][camera], plain["pixels"][camera])
    table = observation["depth"]["depth_h"][12, 16] / 100
    assert 0.5 < table < 1.5


def test_without_drawing_the_last_pictures_stay_and_all_else_goes_on_the_same():
    drawn, undrawn = (KuavoEnv("weighing", image_size=16, depth=True) for _ in range(2))
    first, _ = undrawn.reset(seed=3)
    drawn.reset(seed=3)
    for step in range(1, 4):
        undrawn.draws = step == 3
        action = np.full(16, 0.1 * step)
        (seen, *of_drawn), (unseen, *of_undrawn) = drawn.step(action), undrawn.step(action)
        assert of_undrawn == of_drawn
        assert np.array_equal(unseen["agent_pos"], seen["agent_pos"])
        for kind in ("pixels", "depth"):
            shown = {name: picture.tolist() for name, picture in unseen[kind].items()}
            assert shown == {name: p.tolist() for name, p in (seen if step == 3 else first)[kind].items()}
            assert step == 3 or shown != {name: p.tolist() for name, p in seen[kind].items()}
    undrawn.draws = False
    again, _ = undrawn.reset(seed=3)
    assert all(np.array_equal(again["pixels"][camera], first["pixels"][camera]) for camera in CAMERAS)


def test_depth_is_the_distance_along_the_cameras_axis():
    """So that a plane held in front of a camera is equally far everywhere, as a depth camera has it."""
    env = KuavoEnv("weighing", renderer="none", image_size=8)
    env.reset(seed=0)
    model, data = env.task.world.model, env.task.world.data
    _, depth = RayRenderer(model, (24, 32)).render_with_depth(data, "head_cam_h")
    camera = data.cam("head_cam_h")
    half = np.tan(np.deg2rad(model.cam("head_cam_h").fovy[0]) / 2)
    for row, column in ((0, 0), (12, 16), (20, 5), (23, 31)):
        across, down = (column + 0.5 - 16) / 12 * half, (row + 0.5 - 12) / 12 * half
        to_pixel = camera.xmat.reshape(3, 3) @ [across, -down, -1.0]
        shown = np.array([1, 1, 1, 0, 1, 1], np.uint8)  # group 3 collides but is not drawn
        distance = mujoco.mj_ray(model, data, camera.xpos, to_pixel, shown, 1, -1, np.zeros(1, np.int32), None)
        assert depth[row, column] == pytest.approx(distance, abs=1e-6)  # mj_ray counts in lengths of its vector


@pytest.mark.parametrize("task", TASKS)
def test_a_seed_fixes_the_episode_and_another_seed_changes_it(task):
    env = KuavoEnv(task)
    first, _ = env.reset(seed=11)
    again, _ = env.reset(seed=11)
    other, _ = env.reset(seed=12)
    for camera in CAMERAS:
        np.testing.assert_array_equal(first["pixels"][camera], again["pixels"][camera])
    assert (first["pixels"]["head_cam_h"] != other["pixels"]["head_cam_h"]).any()


@pytest.mark.parametrize("image_size", [64, (48, 64)], ids=["square", "wide"])  # which sees more to its sides
@pytest.mark.parametrize("task", WITH_CUE)
def test_at_the_decision_point_two_cues_look_the_same(task, image_size):
    """So a policy without memory is at chance there; the cue was shown before, for longer than a chunk of 8."""
    env = KuavoEnv(task, image_size=image_size)
    one, other = (demonstrate(env, 21, cue=cue) for cue in (0, 1))
    assert one.success
    assert other.success
    assert one.decision_frames == other.decision_frames
    (decision,) = one.decision_frames

    def pictures_differ(frame):
        return any((one.pictures[c][frame] != other.pictures[c][frame]).any() for c in CAMERAS)

    assert not pictures_differ(decision)
    np.testing.assert_array_equal(one.states[: decision + 1], other.states[: decision + 1])
    np.testing.assert_array_equal(one.actions[:decision], other.actions[:decision])
    assert np.abs(one.actions[decision] - other.actions[decision]).max() > 0.02
    shown = [frame for frame in range(decision) if pictures_differ(frame)]
    assert len(shown) > 8
    assert decision - shown[-1] > 8


@pytest.mark.parametrize("task", WITH_CUE)
def test_seeds_draw_every_cue_and_demanding_one_changes_nothing_else(task):
    env = KuavoEnv(task, renderer="none", image_size=8)
    drawn = [env.reset(seed=seed)[1]["cue"] for seed in range(12)]
    assert set(drawn) == {0, 1}
    qpos = env.task.world.data.qpos.copy()
    for cue in (0, 1):
        _, info = env.reset(seed=11, options={"cue": cue})
        assert info["cue"] == cue
        np.testing.assert_array_equal(env.task.world.data.qpos, qpos)


@pytest.mark.parametrize("task", WITH_CUE)
def test_acting_on_the_wrong_cue_ends_the_episode_without_success(task):
    env = KuavoEnv(task, renderer="none", image_size=8)
    demonstration = demonstrate(env, 5, cue=0, action_noise=0)
    env.reset(seed=5, options={"cue": 1})
    for action in demonstration.actions:
        _, _, terminated, _, info = env.step(action)
        if terminated:
            break
    assert info["failed"]
    assert not info["success"]
    assert (info["cue"], info["choice"]) == (1, 0)


@pytest.mark.parametrize("task", TASKS)
def test_rewards_add_up_to_the_progress_and_one_for_success(task):
    env = KuavoEnv(task, renderer="none", image_size=8)
    demonstration = demonstrate(env, 8, action_noise=0)
    env.reset(seed=8)
    rewards, progress = [], [0.0]
    for action in demonstration.actions:
        _, reward, terminated, _, info = env.step(action)
        rewards.append(reward)
        progress.append(info["progress"])
    assert terminated
    assert info["success"]
    assert all(info["subgoals"].values())
    assert progress == sorted(progress)
    assert sum(rewards) == pytest.approx(2.0)


def test_doing_nothing_reaches_nothing_and_runs_into_the_time_limit():
    env = KuavoEnv("weighing", renderer="none", image_size=8, max_episode_steps=5)
    env.reset(seed=0)
    idle = env.task.world.target
    outcomes = [env.step(idle)[2:4] for _ in range(5)]
    assert outcomes == [(False, False)] * 4 + [(False, True)]
    assert env.task.progress == 0


@pytest.mark.parametrize("phase_visible", [True, False])
def test_the_done_light_shows_that_the_parcel_was_weighed_unless_hidden(phase_visible):
    env = KuavoEnv("weighing", renderer="none", image_size=8, phase_visible=phase_visible)
    demonstrate(env, 2)
    assert env.task.reached["weighed"]
    model = env.task.world.model
    lit = tuple(model.geom_rgba[model.geom("done").id, :3]) != pytest.approx(DARK)
    assert lit == phase_visible


def test_the_base_moves_only_while_its_mode_is_on():
    env = KuavoEnv("sorting", renderer="none", image_size=8)
    env.reset(seed=0)
    action = env.task.world.target.copy()
    action[16] += 0.3
    start = env.task.world.base_pose()[0]
    for mode, expected in ((0.0, 0.0), (1.0, 0.3)):
        action[19] = mode
        for _ in range(12):
            env.step(action)
        assert env.task.world.base_pose()[0] - start == pytest.approx(expected, abs=0.01)


def test_environments_run_side_by_side_in_a_gymnasium_vector():
    make = [lambda: gymnasium.make("kuavo_sim/Placement-v0", image_size=16)] * 2
    envs = gymnasium.vector.SyncVectorEnv(make)
    observations, _ = envs.reset(seed=[1, 2])
    assert observations["pixels"]["wrist_cam_l"].shape == (2, 16, 16, 3)
    _, _, _, _, infos = envs.step(envs.action_space.sample())
    assert infos["is_success"].tolist() == [False, False]
    assert infos["subgoals"]["picked"].tolist() == [False, False]
    envs.close()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"task": "juggling"}, "task must be one of moving_grasp, weighing, placement, sorting, .*, got 'juggling'"),
        ({"task": "weighing", "image_size": 4}, "image_size must be in"),
        ({"task": "weighing", "image_size": (64, 4)}, r"image_size must be in .* got \(64, 4\)"),
        (
            {"task": "weighing", "image_size": (64, 64, 3)},
            r"image_size must be a number of pixels, or \(height, width\)",
        ),
        ({"task": "weighing", "renderer": "none", "depth": True}, "renderer must be rays with depth=True, got 'none'"),
        ({"task": "weighing", "renderer": "crayons"}, "renderer must be one of rays, egl, none, got 'crayons'"),
        ({"task": "weighing", "render_mode": "human"}, "render_mode must be"),
        ({"task": "weighing", "max_episode_steps": 0}, "max_episode_steps must be at least 1, got 0"),
    ],
)
def test_a_bad_environment_is_refused_with_key_rule_and_value(arguments, words):
    with pytest.raises(ValueError, match=words):
        KuavoEnv(**arguments)


def test_bad_steps_and_resets_are_refused():
    env = KuavoEnv("weighing", renderer="none", image_size=8)
    with pytest.raises(RuntimeError, match="reset"):
        env.step(np.zeros(16))
    with pytest.raises(ValueError, match="cue of weighing must be in 0…1, got 2"):
        env.reset(options={"cue": 2})
    with pytest.raises(ValueError, match="may hold only 'cue', got \\['colour'\\]"):
        env.reset(options={"colour": "red"})
    with pytest.raises(ValueError, match="placement has no cue"):
        KuavoEnv("placement", renderer="none").reset(options={"cue": 0})
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"shape \(16,\), got \(20,\)"):
        env.step(np.zeros(20))
    with pytest.raises(ValueError, match="finite"):
        env.step(np.full(16, np.nan))


def test_the_simulation_loads_neither_torch_nor_lerobot_nor_the_trainer():
    heavy = ("torch", "lerobot", "kuavo_train")
    code = f"import sys, kuavo_sim.record; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
