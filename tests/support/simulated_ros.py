"""rospy and Kuavo's messages, with a robot of kuavo_sim behind the topics of examples/kuavo_ros_noetic.py.

What it says of ROS is said here anew, not taken from the example: topics, order and units. It moves by a tick with
every command to the claws, which follows one to the arms, and with every pose for the base.
"""

import io
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

from kuavo_sim.env import KuavoEnv

PICTURES = {"head_cam_h": "/cam_h", "wrist_cam_l": "/cam_l", "wrist_cam_r": "/cam_r"}
LEGS, HEAD = [9.0] * 12, [9.0] * 2  # of joint_q, around the arms
LEFT, RIGHT, LEFT_CLAW, RIGHT_CLAW = slice(0, 7), slice(8, 15), 7, 15
MOVING = 1.0  # ctrl_change_cmd


class SimulatedKuavo:
    """
    Attributes:
        modules: name → what `import` is to find, for sys.modules.
        told: the actions [20] that it carried out.
        seen: what the environment observed last.
    """

    def __init__(self, env: KuavoEnv, seed: int, *, moved: Callable[[], object] = lambda: None):
        """
        Args:
            moved: called after every tick.
        """
        self._env, self._moved = env, moved
        self.seen, self.info = env.reset(seed=seed)
        self.told: list[np.ndarray] = []
        self._command = np.zeros(20)
        self._listening: dict[str, tuple[Callable, Any]] = {}
        self.modules = {"rospy": self._rospy()}
        for package, names in {
            "geometry_msgs": ["Twist"],
            "sensor_msgs": ["CompressedImage", "JointState"],
            "kuavo_msgs": ["lejuClawCommand", "lejuClawState", "sensorsData"],
        }.items():
            self.modules |= {package: ModuleType(package), f"{package}.msg": ModuleType(f"{package}.msg")}
            vars(self.modules[f"{package}.msg"]).update(dict.fromkeys(names, _message))

    def _rospy(self) -> ModuleType:
        rospy = ModuleType("rospy")
        vars(rospy).update(
            init_node=lambda name, disable_signals: None,
            is_shutdown=lambda: False,
            loginfo_throttle=lambda period, text: None,
            sleep=lambda seconds: self._publish(),  # while the example waits for its topics
            Time=SimpleNamespace(now=lambda: 0.0),
            Subscriber=self._subscribe,
            Publisher=lambda topic, kind, queue_size: SimpleNamespace(
                publish=lambda message: self._take(topic, message)
            ),
        )
        return rospy

    def _subscribe(self, topic: str, kind: object, take: Callable, key: object, **_: object) -> None:
        self._listening[topic] = take, key

    def _say(self, topic: str, **fields: object) -> None:
        take, key = self._listening[topic]
        take(SimpleNamespace(**fields), key)

    def _publish(self) -> None:
        for camera, topic in PICTURES.items():
            self._say(f"{topic}/color/image_raw/compressed", data=_jpeg(self.seen["pixels"][camera]))
        state = self.seen["agent_pos"]
        joints = [*LEGS, *state[LEFT].tolist(), *state[RIGHT].tolist(), *HEAD]
        self._say("/sensors_data_raw", joint_data=SimpleNamespace(joint_q=joints))
        claws = [100.0 * state[LEFT_CLAW], 100.0 * state[RIGHT_CLAW]]
        self._say("/leju_claw_state", data=SimpleNamespace(position=claws))

    def _take(self, topic: str, message: Any) -> None:
        if topic == "/kuavo_arm_traj":
            arms = np.radians(message.position)
            self._command[LEFT], self._command[RIGHT] = arms[:7], arms[7:]
        elif topic == "/leju_claw_command":
            self._command[[LEFT_CLAW, RIGHT_CLAW]] = np.divide(message.data.position, 100.0)
            self._step([0.0, 0.0, 0.0, 0.0])
        elif topic == "/cmd_pose":
            self._step([message.linear.x, message.linear.y, message.angular.z, MOVING])

    def _step(self, base: list[float]) -> None:
        self._command[16:] = base
        self.told.append(self._command.copy())
        self.seen, *_, self.info = self._env.step(self._command[: self._env.action_space.shape[0]].astype(np.float32))
        self._publish()
        self._moved()


def _message() -> SimpleNamespace:
    """Of any kind: with the parts that kinds have."""
    parts = ("linear", "angular", "header", "data")
    return SimpleNamespace(**{part: SimpleNamespace() for part in parts})


def _jpeg(picture: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "jpeg", quality=95)
    return file.getvalue()
