"""The scripted expert: inverse kinematics, smooth motions, and a check after each grasp whether it holds.

    python -m kuavo_sim.expert task=weighing episodes=100

prints how often the expert succeeds, with a 95 % Wilson interval.

Demonstrations carry noise, so that they show how to come back to the path: the *executed* action is the expert's plus
autocorrelated joint noise, faded out where precision matters; the *recorded* action is the expert's own, without the
noise. A policy thus sees disturbed states with the right answer to them.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import mujoco
import numpy as np

from kuavo_sim.arguments import parse_arguments
from kuavo_sim.env import KuavoEnv
from kuavo_sim.robot import ARM_SLICE, CLAW_INDEX, HOME, JOINT_NAMES, SIDES, action_limits, joint_ranges
from kuavo_sim.scene import FPS, World, rotation
from kuavo_sim.tasks import TASKS
from kuavo_sim.tasks.task import Task

UP = np.array([0.0, 0.0, 1.0])
DOWN = np.eye(3)  # the hand's orientation when it points straight down, fingers opening sideways
_NOISE_MEMORY = 0.8  # autocorrelation of the noise from one step to the next
_MAX_RESIDUAL = 0.003  # m
_MAX_TILT = 0.35  # rad


class UnreachableError(RuntimeError):
    """Inverse kinematics found no posture within the tolerances."""


@dataclass(frozen=True)
class Command:
    """One action of the expert ([16] or [20], clean) and how much of the noise may disturb it, in [0, 1]."""

    action: np.ndarray
    noise: float


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
            offset, turn = self._error(side, q, position, orientation)
            if np.linalg.norm(offset) <= _MAX_RESIDUAL and np.linalg.norm(turn) <= _MAX_TILT:
                return q
        raise UnreachableError(f"the {side} hand cannot reach {np.round(position, 3)} in that orientation")

    def _descend(self, side: str, position: np.ndarray, orientation: np.ndarray, q: np.ndarray) -> np.ndarray:
        low, high = joint_ranges(side).T
        dofs = [int(self._model.joint(name).dofadr[0]) for name in JOINT_NAMES[side]]
        for iteration in range(120):
            polish = iteration >= 100
            offset, turn = self._error(side, q, position, orientation)
            if np.linalg.norm(offset) < 3e-4 and (polish or np.linalg.norm(turn) < 5e-3):
                break
            site = self._model.site(f"{side}_tool").id
            mujoco.mj_jacSite(self._model, self._data, self._jacobian[:3], self._jacobian[3:], site)
            weight = 0.0 if polish else 0.3  # m per rad
            jacobian = self._jacobian[:, dofs] * np.repeat([1.0, weight], 3)[:, None]
            error = np.concatenate([offset, weight * turn])
            inverse = jacobian.T @ np.linalg.inv(jacobian @ jacobian.T + 0.02**2 * np.eye(6))
            bias = 0.0 if polish else 0.05
            step = inverse @ error + bias * (np.eye(7) - inverse @ jacobian) @ (HOME[side] - q)
            q = np.clip(q + np.clip(step, -0.3, 0.3), low + 0.02, high - 0.02)
        return q

    def _error(
        self, side: str, q: np.ndarray, position: np.ndarray, orientation: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """What is missing to the pose: [3] m and a rotation vector [3] rad."""
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
    """

    task: Task
    action: np.ndarray = field(init=False)
    ik: InverseKinematics = field(init=False)

    def __post_init__(self) -> None:
        # Arms start somewhat off; the expert wants them home, so that an idle arm's action does not depend on chance.
        self.action = self.world.target.copy()
        for side in SIDES:
            self.action[ARM_SLICE[side]] = HOME[side]
        self.ik = InverseKinematics(self.world)

    @property
    def world(self) -> World:
        return self.task.world

    def reach(
        self, side: str, position, orientation: np.ndarray = DOWN, *, speed: float = 2.0, noise: float = 1.0
    ) -> Iterator[Command]:
        """Bring the tool point to a pose, along a straight line in joint space."""
        arm = ARM_SLICE[side]
        goal = self.ik.solve(side, np.asarray(position, float), orientation, self.action[arm])
        yield from self.move_joints(side, goal, speed=speed, noise=noise)

    def move_joints(self, side: str, goal: np.ndarray, *, speed: float = 2.0, noise: float = 1.0) -> Iterator[Command]:
        arm = ARM_SLICE[side]
        start = self.action[arm].copy()
        steps = max(2, int(np.ceil(np.abs(goal - start).max() / speed * FPS)))
        for i in range(1, steps + 1):
            t = i / steps
            self.action[arm] = start + (goal - start) * t * t * (3 - 2 * t)
            yield self._command(noise)

    def claw(self, side: str, value: float, steps: int = 3) -> Iterator[Command]:
        """Open (0) or close (1) a claw, in place."""
        self.action[CLAW_INDEX[side]] = value
        yield from self.wait(steps)

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
        self, side: str, lift_to, *, grip=(0.0, 0.0, 0.0), above: float = 0.11, attempts: int = 3
    ) -> Iterator[Command]:
        """Grasp the object from above, where it lies now, and lift the tool point to `lift_to`; retry if not held.

        Args:
            grip: where to hold it, relative to the object's centre, along the world's axes.
        """
        for _ in range(attempts):
            target = self.world.object_position() + grip
            hand = self.top_grasp()
            yield from self.reach(side, target + above * UP, hand)
            yield from self.reach(side, target, hand, speed=1.4, noise=0.0)
            yield from self.claw(side, 1.0)
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

    def put(self, side: str, position, *, above: float = 0.11, orientation: np.ndarray = DOWN) -> Iterator[Command]:
        """Set the held object down with its centre at `position`, let go, and draw the hand back up."""
        grip = self.world.tool_position(side) - self.world.object_position()
        target = np.asarray(position, float) + grip
        yield from self.reach(side, target + above * UP, orientation)
        grip = self.world.tool_position(side) - self.world.object_position()
        target = np.asarray(position, float) + grip
        yield from self.reach(side, target, orientation, speed=1.4, noise=0.0)
        yield from self.wait(1)
        yield from self.claw(side, 0.0)
        yield from self.reach(side, target + above * UP, orientation, speed=1.4, noise=0.0)

    def carry_to_decision(self, side: str, position) -> Iterator[Command]:
        """Bring the held object to where the cue is needed, up to the first step at which the task sees it there."""
        for command in self.reach(side, position, speed=1.0, noise=0.0):
            yield command
            if self.task.at_decision_point:
                return
        yield from self.wait_until(lambda: self.task.at_decision_point, limit=5)

    def drive(self, x: float, y: float, yaw: float) -> Iterator[Command]:
        """Send the base to a pose and wait until it stands there, or the cue is needed."""
        self.action[16:20] = x, y, yaw, 1.0
        goal = np.array([x, y, yaw])
        yield from self.wait_until(
            lambda: self.task.at_decision_point or bool(np.abs(self.world.base_pose() - goal).max() < 0.01), noise=0.3
        )
        self.action[19] = 0.0

    def _command(self, noise: float) -> Command:
        return Command(self.action.copy(), noise)


@dataclass(frozen=True)
class Demonstration:
    """One episode by the expert. T steps; observation t is what was seen before action t."""

    seed: int
    cue: int | None
    success: bool
    states: np.ndarray  # [T, 16] float32
    actions: np.ndarray  # [T, A] float32, clean
    pictures: dict[str, np.ndarray]  # camera → [T, H, W, 3] uint8
    decision_frames: list[int]
    subgoal_frames: dict[str, int]  # sub-goal → first frame that shows it; T if only the state after the last does
    depths: dict[str, np.ndarray] = field(default_factory=dict)  # name → [T, H, W] uint8, of an environment with depth


def demonstrate(env: KuavoEnv, seed: int, *, cue: int | None = None, action_noise: float = 0.025) -> Demonstration:
    """Let the expert do one episode. `action_noise` is the standard deviation of the joint noise in rad."""
    options = {} if cue is None else {"cue": cue}
    observation, info = env.reset(seed=seed, options=options)
    noise_rng = np.random.default_rng([seed, 1])
    noise = np.zeros(16)
    states, actions, pictures, depths = [], [], [], []
    decisions: list[int] = []
    subgoals: dict[str, int] = {}

    def note(frame: int) -> None:
        if info["decision_point"]:
            decisions.append(frame)
        for name, reached in info["subgoals"].items():
            if reached:
                subgoals.setdefault(name, frame)

    note(0)
    ended = False
    low, high = action_limits(mobile=env.task.mobile)
    try:
        for command in env.task.demonstrate(Script(env.task)):
            fresh = noise_rng.normal(0, action_noise, 16)
            noise = _NOISE_MEMORY * noise + np.sqrt(1 - _NOISE_MEMORY**2) * fresh
            executed = command.action.copy()
            for arm in ARM_SLICE.values():
                executed[arm] += command.noise * noise[arm]
            states.append(observation["agent_pos"])
            pictures.append(observation["pixels"])
            depths.append(observation.get("depth", {}))
            actions.append(command.action.astype(np.float32))
            observation, _, terminated, truncated, info = env.step(np.clip(executed.astype(np.float32), low, high))
            note(len(actions))
            ended = terminated or truncated
            if ended:
                break
    except UnreachableError:
        pass  # the episode counts as failed
    return Demonstration(
        seed=seed,
        cue=info["cue"],
        success=info["success"],
        states=np.array(states, np.float32),
        actions=np.array(actions, np.float32),
        pictures=_stacked(pictures),
        decision_frames=decisions,
        subgoal_frames=subgoals,
        depths=_stacked(depths),
    )


def _stacked(frames: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """T of name → […] become name → [T, …]; nothing of nothing."""
    return {name: np.stack([frame[name] for frame in frames]) for name in (frames[0] if frames else ())}


def success_rate(
    task: str, episodes: int, action_noise: float = 0.025, seed: int = 0
) -> tuple[int, list[int], list[int]]:
    """Let the expert do `episodes` episodes; how many succeed, their lengths in steps, and the seeds that fail."""
    env = KuavoEnv(task, renderer="none", image_size=8)
    lengths, failures = [], []
    for s in range(seed, seed + episodes):
        demonstration = demonstrate(env, s, action_noise=action_noise)
        lengths.append(len(demonstration.actions))
        if not demonstration.success:
            failures.append(s)
    return episodes - len(failures), lengths, failures


def wilson_interval(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval for a success rate (Wilson 1927); 95 % with the default z."""
    rate = successes / trials
    centre = (rate + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * np.sqrt(rate * (1 - rate) / trials + z * z / (4 * trials**2))
    return max(0.0, float(centre - half)), min(1.0, float(centre + half))


def main(words: list[str]) -> int:
    types: dict[str, Callable[[str], Any]] = {"task": str, "episodes": int, "action_noise": float, "seed": int}
    try:
        arguments: dict[str, Any] = {"task": "all", "episodes": 100} | parse_arguments(
            words, types, f"{__doc__}\nArguments: {', '.join(f'{key}=…' for key in types)}"
        )
        tasks = list(TASKS) if arguments["task"] == "all" else [arguments["task"]]
        if arguments["episodes"] < 1:
            raise ValueError(f"episodes must be at least 1, got {arguments['episodes']}")
        for task in tasks:
            successes, lengths, failures = success_rate(**(arguments | {"task": task}))
            low, high = wilson_interval(successes, len(lengths))
            print(
                f"{task:13} {successes}/{len(lengths)} = {successes / len(lengths):.0%}  "
                f"(95 % interval {low:.1%} to {high:.1%})  steps: mean {np.mean(lengths):.0f}, max {max(lengths)}"
                + (f"  failed seeds: {failures}" if failures else "")
            )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
