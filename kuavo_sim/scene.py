"""One compiled scene: the robot, furniture, and one object that can be grasped; stepped at 10 Hz.

The first half writes furniture as MJCF; `World` is the physics with what MuJoCo lacks here: grasping (a weld between a
claw and the object, switched on when the claw closes near it), the conveyor belt (a velocity imposed on the object
while it lies on the belt, up to a light barrier), and limits on how fast targets move.

Every episode compiles its own scene, so a scene is a function of its layout alone and nothing is left of the episode
before. Lengths in m, angles in rad, colours as (r, g, b) in [0, 1].
"""

from dataclasses import dataclass

import mujoco
import numpy as np

from kuavo_sim.robot import (
    ARM_SLICE,
    CLAW_INDEX,
    FINGER_TRAVEL,
    FPS,
    HOME,
    JOINT_NAMES,
    SIDES,
    HeadCamera,
    camera_xml,
    robot_xml,
    vector,
)

Colour = tuple[float, float, float]

RED: Colour = (0.93, 0.10, 0.10)
BLUE: Colour = (0.10, 0.25, 0.95)
YELLOW: Colour = (0.98, 0.85, 0.05)
GREEN: Colour = (0.10, 0.95, 0.25)
WHITE: Colour = (1.0, 1.0, 1.0)
DARK: Colour = (0.10, 0.10, 0.12)
GREY: Colour = (0.55, 0.57, 0.60)
WOOD: Colour = (0.80, 0.74, 0.64)

TABLE_TOP = 0.82
_SUBSTEP = 0.005  # s
_SUBSTEPS = round(1 / FPS / _SUBSTEP)
_JOINT_STEP = 0.35  # rad per control step: targets move at most 3.5 rad/s
_CLAW_STEP = 0.5  # per control step
_BASE_STEP = np.array([0.06, 0.06, 0.20])  # m, m, rad per control step

GRASP_RADIUS = 0.06
_GRASP_ABOVE, _RELEASE_BELOW = 0.6, 0.4  # claw commands: hysteresis, so that a wavering command does not drop things


@dataclass(frozen=True)
class Belt:
    """A conveyor along +y: the object rides at `speed` (m/s) until its centre reaches `barrier_y`."""

    speed: float
    barrier_y: float


@dataclass(frozen=True)
class Graspable:
    """What the claws need to know of the object: its width between the fingers, and how far along its own z axis,
    up and down from its centre, it can be held."""

    width: float
    half_length: float = 0.0


def box_xml(
    name: str,
    centre: tuple[float, float, float],
    half_size: tuple[float, float, float],
    colour: Colour,
    *,
    solid: bool = True,
    extra: str = "",
) -> str:
    collisions = "" if solid else 'contype="0" conaffinity="0"'
    return (
        f'<geom name="{name}" type="box" pos="{vector(centre)}" size="{vector(half_size)}" '
        f'rgba="{vector(colour)} 1" {collisions} {extra}/>\n'
    )


def table_xml(name: str = "table", x: float = 0.52, *, half_depth: float = 0.32, half_width: float = 0.62) -> str:
    """A table (or a rack's shelf) whose top is at TABLE_TOP, on two side panels."""
    sides = "".join(
        box_xml(
            f"{name}_{tag}",
            (x, y, TABLE_TOP / 2 - 0.02),
            (half_depth - 0.02, 0.015, TABLE_TOP / 2 - 0.02),
            GREY,
            solid=False,
        )
        for tag, y in (("left", half_width - 0.03), ("right", 0.03 - half_width))
    )
    return box_xml(name, (x, 0, TABLE_TOP - 0.02), (half_depth, half_width, 0.02), WOOD) + sides


def belt_xml(x: float, y_from: float, y_to: float, half_width: float = 0.085) -> tuple[str, float]:
    """A conveyor belt along y on the table, and the height of its surface. A yellow bar marks its end."""
    height = 0.02
    length = (y_to - y_from) / 2
    top = TABLE_TOP + 2 * height
    xml = box_xml(
        "belt",
        (x, (y_from + y_to) / 2, TABLE_TOP + height),
        (half_width, length, height),
        (0.20, 0.21, 0.24),
        # Almost no friction, and this geom's: the belt's velocity is imposed, not transmitted.
        extra='friction="0.001 0.001 0.001" priority="1"',
    )
    xml += box_xml("belt_end", (x, y_to, top), (half_width, 0.008, 0.006), YELLOW, solid=False)
    return xml, top


def bin_xml(name: str, centre: np.ndarray, colour: Colour, *, half: float, height: float = 0.045) -> str:
    """An open bin on the table; `centre` [2], `half` its inner half width."""
    x, y = centre
    t = 0.006
    z = TABLE_TOP + height / 2
    floor = tuple(0.75 * c for c in colour)
    return (
        box_xml(f"{name}_floor", (x, y, TABLE_TOP + 0.003), (half, half, 0.003), (floor[0], floor[1], floor[2]))
        + box_xml(f"{name}_wall0", (x - half - t, y, z), (t, half + 2 * t, height / 2), colour)
        + box_xml(f"{name}_wall1", (x + half + t, y, z), (t, half + 2 * t, height / 2), colour)
        + box_xml(f"{name}_wall2", (x, y - half - t, z), (half, t, height / 2), colour)
        + box_xml(f"{name}_wall3", (x, y + half + t, z), (half, t, height / 2), colour)
    )


def object_xml(position: tuple[float, float, float], yaw: float, geoms: str) -> str:
    """The one movable object, made of `geoms` in its own frame."""
    quaternion = (np.cos(yaw / 2), 0, 0, np.sin(yaw / 2))
    return f"""
    <body name="object" pos="{vector(position)}" quat="{vector(quaternion)}">
      <freejoint name="object"/>
      {geoms}
    </body>"""


def rotation(axis: str, angle: float) -> np.ndarray:
    """Rotation matrix [3, 3] by `angle` rad about "x", "y" or "z"."""
    c, s = np.cos(angle), np.sin(angle)
    i, j = {"x": (1, 2), "y": (2, 0), "z": (0, 1)}[axis]
    matrix = np.eye(3)
    matrix[i, i] = matrix[j, j] = c
    matrix[i, j], matrix[j, i] = -s, s
    return matrix


class World:
    """The physics of one episode.

    Args:
        scene: worldbody fragment with the furniture and one `object_xml`.
        graspable: measures of the object.
        head: the head camera.
        mobile: whether the robot's base moves (actions are then [20], else [16]).
        belt: the conveyor, if the scene has one (a geom named "belt").
        arm_offset: added to the home posture at the start, [14] rad, left arm first.
        base_pose: x, y, yaw of the base at the start.
    """

    def __init__(
        self,
        scene: str,
        graspable: Graspable,
        *,
        head: HeadCamera,
        mobile: bool = False,
        belt: Belt | None = None,
        arm_offset: np.ndarray | None = None,
        base_pose: tuple[float, float, float] = (0.0, 0.0, 0.0),
    ):
        self.mobile = mobile
        self.model = mujoco.MjModel.from_xml_string(_world_xml(scene, head, mobile=mobile))
        self.data = mujoco.MjData(self.model)
        self._belt, self._graspable = belt, graspable
        self._object_id = self.model.body("object").id
        self._object_dof = int(self.model.body_dofadr[self._object_id])
        self._tool_ids = {side: self.model.site(f"{side}_tool").id for side in SIDES}
        self._arm_qpos = {side: self._joint_address(JOINT_NAMES[side]) for side in SIDES}
        self._finger_qpos = {side: self._joint_address((f"{side}_finger_a",))[0] for side in SIDES}
        self._weld_ids = {side: self.model.equality(f"grasp_{side}").id for side in SIDES}
        self._hand_ids = {side: self.model.body(f"{side}_hand").id for side in SIDES}

        offset = np.zeros(14) if arm_offset is None else arm_offset
        self.target = np.zeros(20 if mobile else 16)  # of the actuators
        self.target[ARM_SLICE["left"]] = HOME["left"] + offset[:7]
        self.target[ARM_SLICE["right"]] = HOME["right"] + offset[7:]
        for side in SIDES:
            self.data.qpos[self._arm_qpos[side]] = self.target[ARM_SLICE[side]]
        if mobile:
            self.target[16:19] = base_pose
            self.data.qpos[self._joint_address(("base_x", "base_y", "base_yaw"))] = base_pose
        self.data.ctrl[:] = self._controls(self.target)
        mujoco.mj_forward(self.model, self.data)

    def put_in_hand(self, side: str) -> None:
        """Let the episode begin with the object in a closed claw, upright as the hand holds it."""
        grip = 1 - self._graspable.width / (2 * FINGER_TRAVEL)
        self.target[CLAW_INDEX[side]] = 1.0
        place = self.data.qpos[self._joint_address(("object",))[0] :]
        place[:3] = self.tool_position(side)
        mujoco.mju_mat2Quat(place[3:7], self.tool_rotation(side).ravel())
        self.data.qpos[self._joint_address((f"{side}_finger_a", f"{side}_finger_b"))] = FINGER_TRAVEL * grip
        mujoco.mj_forward(self.model, self.data)
        self._grasp_or_release(side)
        self.data.ctrl[:] = self._controls(self.target)
        mujoco.mj_forward(self.model, self.data)

    # ── what is the case ────────────────────────────────────────────────────

    def state(self) -> np.ndarray:
        """Joint positions as Kuavo records them, [16] float32: arms in rad, claws in [0, 1]."""
        state = np.empty(16, np.float32)
        for side in SIDES:
            state[ARM_SLICE[side]] = self.data.qpos[self._arm_qpos[side]]
            state[CLAW_INDEX[side]] = np.clip(self.data.qpos[self._finger_qpos[side]] / FINGER_TRAVEL, 0, 1)
        return state

    def tool_position(self, side: str) -> np.ndarray:
        """Point [3] between the finger tips."""
        return self.data.site_xpos[self._tool_ids[side]].copy()

    def tool_rotation(self, side: str) -> np.ndarray:
        return self.data.site_xmat[self._tool_ids[side]].reshape(3, 3).copy()

    def object_position(self) -> np.ndarray:
        return self.data.xpos[self._object_id].copy()

    def object_rotation(self) -> np.ndarray:
        return self.data.xmat[self._object_id].reshape(3, 3).copy()

    def object_speed(self) -> float:
        """Linear speed of the object, m/s."""
        return float(np.linalg.norm(self.data.qvel[self._object_dof : self._object_dof + 3]))

    def base_pose(self) -> np.ndarray:
        """x, y, yaw [3] of the base; zeros when it does not move."""
        if not self.mobile:
            return np.zeros(3)
        return self.data.qpos[self._joint_address(("base_x", "base_y", "base_yaw"))].copy()

    def holds(self, side: str) -> bool:
        return bool(self.data.eq_active[self._weld_ids[side]])

    @property
    def held(self) -> bool:
        return any(self.holds(side) for side in SIDES)

    def touches(self, geom: str) -> bool:
        """Whether the object is in contact with the geom of that name."""
        other = self.model.geom(geom).id
        pairs = self.data.contact.geom
        bodies = self.model.geom_bodyid[pairs]
        return bool(np.any((bodies == self._object_id).any(axis=1) & (pairs == other).any(axis=1)))

    # ── what happens ────────────────────────────────────────────────────────

    def paint(self, geom: str, colour: Colour) -> None:
        """Give a geom another colour; nothing but pictures depends on it."""
        self.model.geom_rgba[self.model.geom(geom).id, :3] = colour

    def step(self, action: np.ndarray) -> None:
        """One control step of 1/FPS s towards `action` [16] or [20], which must be within its limits.

        Targets move at bounded speed and linearly inside the physics substeps. The base moves only while
        ctrl_change_cmd (the last entry) is above 0.5.
        """
        start, self.target = self.target, self._limited(action)
        for side in SIDES:
            self._grasp_or_release(side)
        before, after = self._controls(start), self._controls(self.target)
        for i in range(1, _SUBSTEPS + 1):
            self.data.ctrl[:] = before + (after - before) * (i / _SUBSTEPS)
            self._drive_belt()
            mujoco.mj_step(self.model, self.data)
            for side in SIDES:
                self._grasp_or_release(side)
        mujoco.mj_forward(self.model, self.data)

    def _limited(self, action: np.ndarray) -> np.ndarray:
        step = np.full(len(self.target), _JOINT_STEP)
        for side in SIDES:
            step[CLAW_INDEX[side]] = _CLAW_STEP
        if self.mobile:
            step[16:19] = _BASE_STEP * (action[19] > 0.5)
            step[19] = np.inf
        return self.target + np.clip(action - self.target, -step, step)

    def _controls(self, target: np.ndarray) -> np.ndarray:
        """Actuator controls for a target; a claw that holds the object closes no further than the object's width."""
        controls = np.empty(self.model.nu)
        grip = 1 - self._graspable.width / (2 * FINGER_TRAVEL)
        for k, side in enumerate(SIDES):
            controls[9 * k : 9 * k + 7] = target[ARM_SLICE[side]]
            claw = target[CLAW_INDEX[side]]
            controls[9 * k + 7 : 9 * k + 9] = FINGER_TRAVEL * (min(claw, grip) if self.holds(side) else claw)
        if self.mobile:
            controls[18:21] = target[16:19]
        return controls

    def _grasp_or_release(self, side: str) -> None:
        weld = self._weld_ids[side]
        claw = self.target[CLAW_INDEX[side]]
        if self.data.eq_active[weld]:
            if claw < _RELEASE_BELOW:
                self.data.eq_active[weld] = 0
            return
        if claw <= _GRASP_ABOVE:
            return
        grip = FINGER_TRAVEL - self._graspable.width / 2
        if self.data.qpos[self._finger_qpos[side]] < grip - 0.003 or self._grasp_distance(side) > GRASP_RADIUS:
            return
        hand, rotation_hand = self.data.xpos[self._hand_ids[side]], self._matrix(self._hand_ids[side])
        quaternion = np.empty(4)
        mujoco.mju_mat2Quat(quaternion, (rotation_hand.T @ self._matrix(self._object_id)).ravel())
        # Weld data: anchor [3], then the object's pose in the hand's frame, then the torque scale.
        self.model.eq_data[weld, 0:3] = 0
        self.model.eq_data[weld, 3:6] = rotation_hand.T @ (self.data.xpos[self._object_id] - hand)
        self.model.eq_data[weld, 6:10] = quaternion
        self.model.eq_data[weld, 10] = 1
        self.data.eq_active[weld] = 1

    def _grasp_distance(self, side: str) -> float:
        """Distance of the tool point from the part of the object's axis where it can be held."""
        offset = self.data.site_xpos[self._tool_ids[side]] - self.data.xpos[self._object_id]
        axis = self._matrix(self._object_id)[:, 2]
        along = np.clip(offset @ axis, -self._graspable.half_length, self._graspable.half_length)
        return float(np.linalg.norm(offset - along * axis))

    def _drive_belt(self) -> None:
        if self._belt is None or self.held or not self.touches("belt"):
            return
        beyond = self.data.xpos[self._object_id, 1] >= self._belt.barrier_y
        dof = self._object_dof
        self.data.qvel[dof] = 0
        self.data.qvel[dof + 1] = 0 if beyond else self._belt.speed
        self.data.qvel[dof + 5] = 0

    def _matrix(self, body: int) -> np.ndarray:
        return self.data.xmat[body].reshape(3, 3)

    def _joint_address(self, names) -> np.ndarray:
        return np.array([self.model.jnt_qposadr[self.model.joint(name).id] for name in names])


def _world_xml(scene: str, head: HeadCamera, *, mobile: bool) -> str:
    robot, actuators = robot_xml(head, mobile=mobile)
    welds = "".join(
        f'<weld name="grasp_{side}" body1="{side}_hand" body2="object" active="false" solref="0.01 1"/>'
        for side in SIDES
    )
    overview = camera_xml("overview", (1.75, -1.25, 1.75), (0.2, 0.0, 0.85), 42.0)
    return f"""
<mujoco model="kuavo_sim">
  <compiler angle="radian"/>
  <option timestep="{_SUBSTEP}" integrator="implicitfast" cone="elliptic" impratio="5"/>
  <visual><global offwidth="1024" offheight="1024"/><headlight ambient="0.5 0.5 0.5" diffuse="0.5 0.5 0.5"/></visual>
  <default>
    <geom condim="4" friction="0.9 0.02 0.001"/>
    <default class="robot"><geom contype="0" conaffinity="0"/></default>
  </default>
  <worldbody>
    <light pos="0 0 3" dir="0.2 0 -1"/>
    <geom name="floor" type="plane" size="4 4 0.1" rgba="0.42 0.44 0.47 1"/>
    {overview}
    {robot}
    {scene}
  </worldbody>
  <equality>{welds}</equality>
  <actuator>{actuators}</actuator>
</mujoco>"""
