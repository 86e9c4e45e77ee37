"""examples/: what can be tried without the robot. Topics and units there are those of its maker's public code."""

import sys
from importlib import import_module
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from commands import REPOSITORY
from small_datasets import ARM_NAMES


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
