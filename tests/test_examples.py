"""examples/: what can be tried without the robot. Topics and units there are those of its maker's public code."""

import json
import signal
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from commands import REPOSITORY
from served import Served
from simulated_ros import SimulatedKuavo
from small_datasets import ARM_NAMES

from kuavo_sim.env import KuavoEnv
from kuavo_sim.motions import Script
from kuavo_train.wrapper.policy.smolvla import SmolVLAPolicyWrapper


@pytest.fixture(scope="module")
def example() -> ModuleType:
    sys.path.insert(0, str(REPOSITORY / "examples"))
    return import_module("kuavo_ros_noetic")


def test_the_joints_of_ros_come_in_the_order_of_the_policy(example: ModuleType) -> None:
    state = example.state_of(np.arange(14.0), [50.0, 100.0])
    by_name = dict(zip(ARM_NAMES, state.tolist(), strict=True))
    assert [by_name[f"zarm_l{joint}_link"] for joint in (1, 7)] == [0.0, 6.0]
    assert [by_name[f"zarm_r{joint}_link"] for joint in (1, 7)] == [7.0, 13.0]
    assert (by_name["left_claw"], by_name["right_claw"]) == (0.5, 1.0)


def test_an_action_goes_to_arms_and_claws_or_to_the_base(example: ModuleType) -> None:
    action = np.radians(example.state_of(np.arange(14.0), [0.0, 0.0]))
    action[[7, 15]] = 0.25, 1.5
    arms, claws, base = example.commands_of(action)
    np.testing.assert_allclose(arms, np.arange(14.0), atol=1e-5)
    assert (claws, base) == ([25.0, 100.0], None)
    moving = np.concatenate([action, [1.0, 2.0, 0.5, 0.9]])
    assert example.commands_of(moving) == (None, None, (1.0, 2.0, 0.5))
    assert example.commands_of(np.concatenate([action, [1.0, 2.0, 0.5, 0.1]]))[2] is None


def test_what_the_cameras_and_sensors_say_is_an_observation(example: ModuleType) -> None:
    robot = example.Kuavo.__new__(example.Kuavo)  # without ROS, whose messages have these fields
    joints = np.concatenate([np.full(12, 9.0), np.arange(14.0), np.full(2, 9.0)])
    robot._latest = {
        **{key: SimpleNamespace(data=b"a JPEG") for key in example.CAMERAS},
        example.SENSORS: SimpleNamespace(joint_data=SimpleNamespace(joint_q=joints.tolist())),
        example.CLAW_STATE: SimpleNamespace(data=SimpleNamespace(position=[0.0, 100.0])),
    }
    seen = robot.observe()
    assert set(seen) == {*example.CAMERAS, "observation.state"}
    np.testing.assert_array_equal(seen["observation.state"], example.state_of(np.arange(14.0), [0.0, 100.0]))


def test_through_ros_the_expert_does_the_job_that_moves_its_base(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever acts through `act` and sees through `observe` has the simulated robot, arms, claws and base."""
    env = KuavoEnv("sorting", image_size=8)
    behind = SimulatedKuavo(env, seed=3)
    for name, module in behind.modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    robot, task = example.Kuavo(), env.task
    robot.wait()
    for command in task.demonstrate(Script(task.world, lambda: task.at_decision_point)):
        np.testing.assert_allclose(robot.observe()["observation.state"], behind.seen["agent_pos"], atol=1e-6)
        robot.act(command.action)
        if behind.info["success"]:
            break
    assert behind.info["success"]
    assert {action[19] for action in behind.told} == {0.0, 1.0}


def test_the_example_lets_a_served_policy_drive_until_a_signal_ends_it(
    example: ModuleType, small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def moved() -> None:
        if len(behind.told) == 8:
            signal.raise_signal(signal.SIGTERM)

    behind = SimulatedKuavo(KuavoEnv("weighing", image_size=32), seed=3, moved=moved)
    for name, module in behind.modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.chdir(tmp_path)
    policy = SmolVLAPolicyWrapper.from_pretrained(small_checkpoint, device="cpu", seed=3)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with Served(policy) as server:
            example.main(f"ws://127.0.0.1:{server.port}", "weighing")
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    lines = [json.loads(line) for line in Path("kuavo_ticks.jsonl").read_text().splitlines()]
    logged = np.array([line["action"] for line in lines if line["action"] is not None])
    assert len(logged) == len(behind.told) == 8
    told = np.array(behind.told)[:, :16]
    arms = [column for column, name in enumerate(ARM_NAMES) if "claw" not in name]
    np.testing.assert_allclose(told[:, arms], logged[:, arms], atol=1e-5)
