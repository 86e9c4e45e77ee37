"""Motions from which demonstrations are put together: inverse kinematics, and smooth moves of arms, claws and base."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import mujoco
import numpy as np

from kuavo_sim.robot import ARM_SLICE, CLAW_INDEX, FPS, HOME, JOINT_NAMES, SIDES, joint_ranges
from kuavo_sim.scene import World, rotation

UP = np.array([0.0, 0.0, 1.0])
DOWN = np.eye(3)  # the hand's orientation when it points straight down, fingers opening sideways
_MAX_RESIDUAL = 0.003  # m
_MAX_TILT = 0.35  # rad
# Of the noise while a hand goes down and closes. It grips off centre, as policies do, and puts down none the less.
GRASPING = 1.5
_SLIPPING, _SLIPS = 3.5, 0.15  # noise at which half of the grasps miss, and in how many of the first ones it is tried
# From and to m that a hand comes to be beside where it should. Above what it takes or where it puts down: to look, and
# not to go on from where it is. A job asks for it where a few cm count; sorting loses by it (docs/experiments).
EXACT, HOVERS = (0.0, 0.0), (0.0, 0.05)
_MISPLACES, _MISPLACED = (0.03, 0.07), 0.2  # and where it puts down, in some of the first tries
_STANDS_OFF = np.array([0.03, 0.03, 0.06])  # m, m, rad: as far as this from where it should, the base may come to stand


class UnreachableError(RuntimeError):
    """Inverse kinematics found no posture within the tolerances."""


@dataclass(frozen=True)
class Command:
    """One action of the expert, [16] or [20], clean, and what disturbs it where it is carried out.

    Attributes:
        noise: factor on the joint noise.
        offset: of the action's shape, added to it where it is carried out.
    """

    action: np.ndarray
    noise: float
    offset: np.ndarray


class InverseKinematics:
    """Damped least squares on the tool site's Jacobian, drawn towards a posture, then a polish of position alone.

    J⁺ = Jᵀ(JJᵀ + λ²I)⁻¹ (Wampler 1986; Nakamura and Hanafusa 1986); the posture acts in the Jacobian's null space.
    """

    def __init__(self, world: World):
        self._model, self._world = world.model, world
        self._data = mujoco.MjData(world.model)
        self._jacobian = np.zeros((6, world.model.nv))

    def solve(self, side: str, position: np.ndarray, orientation: np.ndarray, seed: np.ndarray) -> np.ndarray:
        """Joint positions [7] that bring the tool point to a pose in the world's frame.

        Args:
            position: [3] m. orientation: [3, 3], columns are the hand's axes. seed: [7] rad, where to start.

        Raises:
            UnreachableError: no posture within 3 mm and 0.35 rad, from `seed`, from home, or from nearby postures.
        """
        self._data.qpos[:] = self._world.data.qpos
        restarts = np.random.default_rng(0)
        starts = [seed, HOME[side], *(HOME[side] + restarts.normal(0, 0.4, 7) for _ in range(4))]
        for start in starts:
            q = self._descend(side, position, orientation, np.array(start, float))
            distance, turn = self.offset(side, q, position, orientation)
            if np.linalg.norm(distance) <= _MAX_RESIDUAL and np.linalg.norm(turn) <= _MAX_TILT:
                return q
        raise UnreachableError(f"the {side} hand cannot reach {np.round(position, 3)} in that orientation")

    def _descend(self, side: str, position: np.ndarray, orientation: np.ndarray, q: np.ndarray) -> np.ndarray:
        low, high = joint_ranges(side).T
        dofs = [int(self._model.joint(name).dofadr[0]) for name in JOINT_NAMES[side]]
        for iteration in range(120):
            polish = iteration >= 100
            distance, turn = self.offset(side, q, position, orientation)
            if np.linalg.norm(distance) < 3e-4 and (polish or np.linalg.norm(turn) < 5e-3):
                break
            site = self._model.site(f"{side}_tool").id
            mujoco.mj_jacSite(self._model, self._data, self._jacobian[:3], self._jacobian[3:], site)
            weight = 0.0 if polish else 0.3  # m per rad
            jacobian = self._jacobian[:, dofs] * np.repeat([1.0, weight], 3)[:, None]
            error = np.concatenate([distance, weight * turn])
            inverse = jacobian.T @ np.linalg.inv(jacobian @ jacobian.T + 0.02**2 * np.eye(6))
            bias = 0.0 if polish else 0.05
            step = inverse @ error + bias * (np.eye(7) - inverse @ jacobian) @ (HOME[side] - q)
            q = np.clip(q + np.clip(step, -0.3, 0.3), low + 0.02, high - 0.02)
        return q

    def offset(
        self, side: str, q: np.ndarray, position: np.ndarray, orientation: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """What a posture `q` [7] rad lacks to the pose: [3] m and a rotation vector [3] rad."""
        for name, value in zip(JOINT_NAMES[side], q, strict=True):
            self._data.qpos[self._model.joint(name).qposadr[0]] = value
        mujoco.mj_kinematics(self._model, self._data)
        mujoco.mj_comPos(self._model, self._data)
        site = self._data.site(f"{side}_tool")
        quaternion, turn = np.empty(4), np.empty(3)
        mujoco.mju_mat2Quat(quaternion, (orientation @ site.xmat.reshape(3, 3).T).ravel())
        mujoco.mju_quat2Vel(turn, quaternion, 1.0)
        return position - site.xpos, turn


@dataclass
class Script:
    """The moves from which tasks put their demonstrations together. Each yields one Command per control step.

    Poses are in the world's frame. Speeds are mean joint speeds in rad/s.

    Args:
        at_decision_point: whether this is the step at which the right action depends on the cue.
        mishaps: draws what goes wrong on the way, and how far off hands and base come to be; None: nothing does.
    """

    world: World
    at_decision_point: Callable[[], bool]
    mishaps: np.random.Generator | None = None
    action: np.ndarray = field(init=False)
    offset: np.ndarray = field(init=False)  # of what is carried out from the action
    ik: InverseKinematics = field(init=False)

    def __post_init__(self) -> None:
        # Arms start somewhat off; the expert wants them home, so that an idle arm's action does not depend on chance.
        self.action = self.world.target.copy()
        self.offset = np.zeros_like(self.action)
        for side in SIDES:
            self.action[ARM_SLICE[side]] = HOME[side]
        self.ik = InverseKinematics(self.world)

    def happens(self, share: float) -> bool:
        """Whether a mishap that befalls this share of the occasions does so now."""
        return self.mishaps is not None and self.mishaps.random() < share

    def reach(
        self,
        side: str,
        position,
        orientation: np.ndarray = DOWN,
        *,
        speed: float = 2.0,
        noise: float = 1.0,
        beside: tuple[float, float] = EXACT,
    ) -> Iterator[Command]:
        """Bring the tool point to a pose, along a straight line in joint space.

        Args:
            beside: from and to m that a mishap lets it come to be to a side, until it moves on.
        """
        position = np.asarray(position, float)
        goal = self.ik.solve(side, position, orientation, self.action[ARM_SLICE[side]])
        off = self._off(side, position, orientation, goal, beside)
        yield from self.move_joints(side, goal, speed=speed, noise=noise, off=off)

    def move_joints(
        self, side: str, goal: np.ndarray, *, speed: float = 2.0, noise: float = 1.0, off: np.ndarray | float = 0.0
    ) -> Iterator[Command]:
        """`off` [7] rad is how far off what is carried out ends."""
        arm = ARM_SLICE[side]
        start, started_off = self.action[arm].copy(), self.offset[arm].copy()
        steps = max(2, int(np.ceil(np.abs(goal - start).max() / speed * FPS)))
        for i in range(1, steps + 1):
            t = i / steps
            done = t * t * (3 - 2 * t)
            self.action[arm] = start + (goal - start) * done
            self.offset[arm] = started_off + (off - started_off) * done
            yield self._command(noise)

    def _off(
        self, side: str, position: np.ndarray, orientation: np.ndarray, goal: np.ndarray, beside: tuple[float, float]
    ) -> np.ndarray:
        """[7] rad from the posture `goal` to one beside it; zeros where nothing goes wrong, or none is in reach."""
        if self.mishaps is None or not any(beside):
            return np.zeros(7)
        angle, distance = self.mishaps.uniform(-np.pi, np.pi), self.mishaps.uniform(*beside)
        place = position + distance * np.array([np.cos(angle), np.sin(angle), 0.0])
        try:
            return self.ik.solve(side, place, orientation, goal) - goal
        except UnreachableError:
            return np.zeros(7)

    def claw(self, side: str, value: float, steps: int = 3, noise: float = 0.0) -> Iterator[Command]:
        """Open (0) or close (1) a claw, in place."""
        self.action[CLAW_INDEX[side]] = value
        yield from self.wait(steps, noise)

    def wait(self, steps: int, noise: float = 0.0) -> Iterator[Command]:
        for _ in range(steps):
            yield self._command(noise)

    def wait_until(self, condition: Callable[[], bool], limit: int = 40, noise: float = 0.0) -> Iterator[Command]:
        """Stand still until `condition()`; at most `limit` steps."""
        for _ in range(limit):
            if condition():
                return
            yield self._command(noise)

    def pick(
        self,
        side: str,
        lift_to,
        *,
        grip=(0.0, 0.0, 0.0),
        above: float = 0.11,
        attempts: int = 3,
        beside: tuple[float, float] = EXACT,
    ) -> Iterator[Command]:
        """Grasp the object from above, where it lies now, and lift the tool point to `lift_to`; retry if not held.

        Args:
            grip: where to hold it, relative to the object's centre, along the world's axes.
            beside: as of `reach`, above the object.
        """
        slips = self.happens(_SLIPS)
        for attempt in range(attempts):
            noise = _SLIPPING if slips and attempt == 0 else GRASPING
            target = self.world.object_position() + grip
            hand = self.top_grasp()
            yield from self.reach(side, target + above * UP, hand, beside=beside)
            yield from self.reach(side, target, hand, speed=1.4, noise=noise)
            yield from self.claw(side, 1.0, noise=noise)
            if self.world.holds(side):
                yield from self.reach(side, target + above * UP, hand, speed=1.4, noise=0.3)
            if self.world.holds(side):
                yield from self.reach(side, lift_to, noise=0.5)
                return
            yield from self.claw(side, 0.0)

    def top_grasp(self) -> np.ndarray:
        """The hand from above, its fingers along the object's nearest pair of sides."""
        matrix = self.world.object_rotation()
        yaw = np.arctan2(matrix[1, 0], matrix[0, 0])
        quarter = np.pi / 2
        heading = self.world.base_pose()[2]
        return rotation("z", heading + (yaw - heading + quarter / 2) % quarter - quarter / 2)

    def carry(
        self, side: str, position, orientation: np.ndarray, *, speed: float = 2.0, noise: float = 1.0
    ) -> Iterator[Command]:
        """Bring the *object* in the claw to a pose: centre at `position` [3], axes as in `orientation` [3, 3]."""
        turn = orientation @ self.world.object_rotation().T
        grip = turn @ (self.world.tool_position(side) - self.world.object_position())
        hand = turn @ self.world.tool_rotation(side)
        yield from self.reach(side, np.asarray(position, float) + grip, hand, speed=speed, noise=noise)

    def put(
        self,
        side: str,
        position,
        *,
        above: float = 0.11,
        orientation: np.ndarray = DOWN,
        beside: tuple[float, float] = EXACT,
        careless: bool = False,
    ) -> Iterator[Command]:
        """Set the held object down with its centre at `position`, let go, and draw the hand back up.

        Args:
            beside: as of `reach`, above `position`.
            careless: it may come to lie beside, which is one of the mishaps.
        """
        grip = self.world.tool_position(side) - self.world.object_position()
        target = np.asarray(position, float) + grip
        yield from self.reach(side, target + above * UP, orientation, beside=beside)
        grip = self.world.tool_position(side) - self.world.object_position()
        target = np.asarray(position, float) + grip
        misses = _MISPLACES if careless and self.happens(_MISPLACED) else EXACT
        yield from self.reach(side, target, orientation, speed=1.4, noise=0.0, beside=misses)
        yield from self.wait(1)
        yield from self.claw(side, 0.0)
        yield from self.reach(side, target + above * UP, orientation, speed=1.4, noise=0.0)

    def carry_to_decision(self, side: str, position) -> Iterator[Command]:
        """Bring the held object to where the cue is needed, up to the first step at which the task sees it there."""
        for command in self.reach(side, position, speed=1.0, noise=0.0):
            yield command
            if self.at_decision_point():
                return
        yield from self.wait_until(self.at_decision_point, limit=5)

    def drive(self, x: float, y: float, yaw: float, *, accuracy: float = 1.0) -> Iterator[Command]:
        """Send the base to a pose and wait until it stands about there, or the cue is needed.

        Args:
            accuracy: how near it must come; with 2, half as far off as it may come to stand otherwise.
        """
        self.action[16:20] = x, y, yaw, 1.0
        if self.mishaps is not None:
            self.offset[16:19] = self.mishaps.uniform(-_STANDS_OFF, _STANDS_OFF) / accuracy
        goal = np.array([x, y, yaw]) + self.offset[16:19]
        yield from self.wait_until(
            lambda: self.at_decision_point() or bool(np.abs(self.world.base_pose() - goal).max() < 0.01), noise=0.3
        )
        self.action[19] = 0.0

    def _command(self, noise: float) -> Command:
        return Command(self.action.copy(), noise, self.offset.copy())
