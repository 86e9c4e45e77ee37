"""The upper body of a Kuavo-like humanoid as MJCF: two 7-joint arms, two claws, three cameras, and for task 4 a base.

Feature names, order and units are those of Kuavo recordings: joint positions in radians, claws in [0, 1] (0 open,
1 closed). At zero every arm hangs straight down; a hand's frame is then the world's: x forward, y to the left (the
direction in which the fingers open), and the hand points along its −z.

The robot touches nothing: its geoms have no collisions. Grasping is a weld (scene.py), and a claw that also pushed its
object about would throw it off the table more often than hold it.
"""

from dataclasses import dataclass

import numpy as np

SIDES = ("left", "right")
CAMERAS = ("head_cam_h", "wrist_cam_l", "wrist_cam_r")
DEPTHS = dict(zip(("depth_h", "depth_l", "depth_r"), CAMERAS, strict=True))  # as Kuavo recordings name them
JOINT_NAMES = {side: tuple(f"zarm_{side[0]}{i}_link" for i in range(1, 8)) for side in SIDES}
CLAW_NAMES = {side: f"{side}_claw" for side in SIDES}
STATE_NAMES = (*JOINT_NAMES["left"], CLAW_NAMES["left"], *JOINT_NAMES["right"], CLAW_NAMES["right"])
FPS = 10  # actions per second
BASE_NAMES = ("cmd_pos_x", "cmd_pos_y", "cmd_pos_yaw", "ctrl_change_cmd")

# Where the seven joints and the claw of a side stand in state and action.
ARM_SLICE = {"left": slice(0, 7), "right": slice(8, 15)}
CLAW_INDEX = {"left": 7, "right": 15}

SHOULDER = (0.0, 0.20, 1.20)  # m, left; the right one mirrors y
UPPER_ARM, FOREARM, HAND = 0.28, 0.26, 0.17  # m: shoulder–elbow, elbow–wrist, wrist–tool point
FINGER_TRAVEL = 0.055  # m per finger from open to closed, so a claw opens 11 cm

_LEFT_RANGES = ((-2.8, 1.2), (-0.9, 2.2), (-1.8, 1.8), (-2.5, 0.0), (-2.2, 2.2), (-1.5, 1.5), (-2.4, 2.4))
_AXES = ("0 1 0", "1 0 0", "0 0 1", "0 1 0", "0 0 1", "1 0 0", "0 1 0")
_MIRRORED = (False, True, True, False, True, True, False)  # roll and yaw joints change sign from left to right


def mirror(left: np.ndarray) -> np.ndarray:
    """Joint positions [7] (rad) of the right arm that mirror those of the left, and the other way round."""
    return np.where(_MIRRORED, -left, left)


def joint_ranges(side: str) -> np.ndarray:
    """Lower and upper joint limits [7, 2] in rad."""
    ranges = np.array(_LEFT_RANGES)
    if side == "right":
        flipped = -ranges[:, ::-1]
        ranges = np.where(np.array(_MIRRORED)[:, None], flipped, ranges)
    return ranges


# Both hands before the chest, pointing down: tool points at (0.26, ±0.30, 1.02) m.
HOME = {"left": np.array([-0.35, 0.35, 0.0, -1.95, 0.0, -0.30, 2.25])}
HOME["right"] = mirror(HOME["left"])


def action_limits(*, mobile: bool) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper limits [16] (or [20] with a base) of the action, float32."""
    low: np.ndarray = np.zeros(16, np.float32)
    high: np.ndarray = np.ones(16, np.float32)
    for side in SIDES:
        ranges = joint_ranges(side)
        low[ARM_SLICE[side]], high[ARM_SLICE[side]] = ranges[:, 0], ranges[:, 1]
    if mobile:
        low = np.concatenate([low, np.array([-2.0, -2.0, -2 * np.pi, 0.0], np.float32)])
        high = np.concatenate([high, np.array([2.0, 2.0, 2 * np.pi, 1.0], np.float32)])
    return low, high


@dataclass(frozen=True)
class HeadCamera:
    """Where the head camera looks. `position` and `target` in m in the robot's frame, `fovy` in degrees."""

    position: tuple[float, float, float] = (0.12, -0.05, 1.50)
    target: tuple[float, float, float] = (0.42, -0.05, 0.84)
    fovy: float = 52.0

    def xml(self) -> str:
        return camera_xml("head_cam_h", self.position, self.target, self.fovy)


def camera_xml(
    name: str,
    position: tuple[float, float, float],
    target: tuple[float, float, float],
    fovy: float,
    up: tuple[float, float, float] = (0.0, 0.0, 1.0),
) -> str:
    """A camera that looks from `position` to `target` (m), with `up` upwards in the picture."""
    forward = np.subtract(target, position)
    forward = forward / np.linalg.norm(forward)
    right = np.cross(forward, up)
    right = right / np.linalg.norm(right)
    axes = np.concatenate([right, np.cross(right, forward)])
    return f'<camera name="{name}" pos="{vector(position)}" xyaxes="{vector(axes)}" fovy="{fovy}"/>'


def vector(values) -> str:
    """Numbers as MJCF writes them."""
    return " ".join(f"{float(v):.6g}" for v in np.ravel(values))


def robot_xml(head: HeadCamera, *, mobile: bool) -> tuple[str, str]:
    """The robot as (worldbody fragment, actuator fragment) of an MJCF file.

    Actuators stand in the order of the state, each claw with one actuator per finger, the base (x, y, yaw) at the end.
    """
    base_joints, base_actuators = "", ""
    if mobile:
        base_joints = """
      <joint name="base_x" type="slide" axis="1 0 0" armature="40"/>
      <joint name="base_y" type="slide" axis="0 1 0" armature="40"/>
      <joint name="base_yaw" type="hinge" axis="0 0 1" armature="20"/>"""
        base_actuators = "".join(
            f'<position name="{name}" joint="{name}" kp="40000" dampratio="1"/>\n'
            for name in ("base_x", "base_y", "base_yaw")
        )
    body = f"""
    <body name="robot" gravcomp="1">{base_joints}
      {_shell("torso", "box", 'pos="-0.06 0 1.02" size="0.08 0.13 0.22"', mass=20)}
      {_shell("hip", "box", 'pos="-0.06 0 0.74" size="0.09 0.14 0.06"', mass=10, dark=True)}
      {_shell("leg_l", "capsule", 'fromto="-0.06 0.1 0.7 -0.06 0.1 0.06" size="0.06"', mass=5)}
      {_shell("leg_r", "capsule", 'fromto="-0.06 -0.1 0.7 -0.06 -0.1 0.06" size="0.06"', mass=5)}
      {_shell("neck", "capsule", 'fromto="-0.05 0 1.24 -0.05 0 1.38" size="0.04"', mass=1, dark=True)}
      {_shell("head", "ellipsoid", 'pos="-0.04 0 1.45" size="0.09 0.08 0.11"', mass=2)}
      {_shell("visor", "ellipsoid", 'pos="0.01 0 1.46" size="0.05 0.065 0.05"', mass=0.1, dark=True)}
      {head.xml()}
      {_arm_xml("left")}
      {_arm_xml("right")}
    </body>"""
    return body, _arm_actuators("left") + _arm_actuators("right") + base_actuators


def _shell(name: str, kind: str, shape: str, *, mass: float, dark: bool = False) -> str:
    colour = "0.18 0.18 0.2 1" if dark else "0.9 0.9 0.92 1"
    return f'<geom name="{name}" class="robot" type="{kind}" {shape} rgba="{colour}" mass="{mass}"/>'


def _arm_xml(side: str) -> str:
    sign = 1.0 if side == "left" else -1.0
    s = side[0]
    ranges = joint_ranges(side)
    trim = "0.1 0.75 0.35 1" if side == "left" else "1.0 0.45 0.05 1"

    def joint(i: int) -> str:
        armature = 0.12 if i < 4 else 0.05
        return (
            f'<joint name="{JOINT_NAMES[side][i]}" axis="{_AXES[i]}" range="{vector(ranges[i])}" '
            f'armature="{armature}" damping="1"/>'
        )

    def finger(name: str, y: float) -> str:
        return f"""
          <body name="{name}" pos="0 {y} -0.125" gravcomp="1">
            <joint name="{name}" type="slide" axis="0 {-np.sign(y)} 0" range="0 {FINGER_TRAVEL}" armature="0.02"/>
            <geom class="robot" type="box" pos="0 0 -0.025" size="0.012 0.007 0.04" rgba="{trim}" mass="0.03"/>
          </body>"""

    shell = "0.88 0.88 0.9 1"
    camera = camera_xml(f"wrist_cam_{s}", (0.10, 0.0, -0.04), (0.02, 0.0, -0.24), 78.0, up=(1.0, 0.0, 0.0))
    x, y, z = SHOULDER
    return f"""
      <body name="{side}_shoulder" pos="{x} {sign * y} {z}" gravcomp="1">
        {joint(0)}{joint(1)}{joint(2)}
        <geom class="robot" type="capsule" fromto="0 0 0 0 0 -{UPPER_ARM}" size="0.042" rgba="{shell}" mass="1.2"/>
        <body name="{side}_elbow" pos="0 0 -{UPPER_ARM}" gravcomp="1">
          {joint(3)}{joint(4)}
          <geom class="robot" type="capsule" fromto="0 0 0 0 0 -{FOREARM}" size="0.034" rgba="{shell}" mass="0.9"/>
          <body name="{side}_hand" pos="0 0 -{FOREARM}" gravcomp="1">
            {joint(5)}{joint(6)}
            <geom class="robot" type="capsule" fromto="0 0 0 0 0 -0.07" size="0.028" rgba="0.2 0.2 0.22 1" mass="0.3"/>
            <geom class="robot" type="box" pos="0 0 -0.095" size="0.018 0.066 0.010" rgba="0.2 0.2 0.22 1" mass="0.1"/>
            <site name="{side}_tool" pos="0 0 -{HAND}"/>
            {camera}{finger(f"{side}_finger_a", 0.062)}{finger(f"{side}_finger_b", -0.062)}
          </body>
        </body>
      </body>"""


def _arm_actuators(side: str) -> str:
    arm = "".join(
        f'<position name="{name}" joint="{name}" kp="{400 if i < 4 else 200}" dampratio="1" '
        f'ctrlrange="{vector(limits)}"/>\n'
        for i, (name, limits) in enumerate(zip(JOINT_NAMES[side], joint_ranges(side), strict=True))
    )
    fingers = "".join(
        f'<position name="{side}_finger_{f}" joint="{side}_finger_{f}" kp="300" dampratio="1" '
        f'ctrlrange="0 {FINGER_TRAVEL}"/>\n'
        for f in "ab"
    )
    return arm + fingers
