"""Task 1: grasp an object off the running belt, place it on one marked target, then on the other.

Cue: which target comes first. It shines green for the first two seconds only, well before the object is in the claw.
A target turns dark once the object has rested where it should, so the rest of the job can be read off the table.
"""

from collections.abc import Iterator

import numpy as np

from kuavo_sim.motions import GRASPING, HOVERS, Command, Script
from kuavo_sim.robot import FPS, HeadCamera
from kuavo_sim.scene import (
    DARK,
    GREEN,
    TABLE_TOP,
    Belt,
    Colour,
    Graspable,
    World,
    belt_xml,
    box_xml,
    object_xml,
    table_xml,
)
from kuavo_sim.tasks.task import Task, arm_offset, near, within

_BELT_X, _BELT_END = 0.50, -0.15  # m
_BARRIER_Y = -0.22
_BELT_SPEED = 0.09  # m/s
_MEETING_Y = -0.31  # where the expert meets the object, still moving
_LEAD = 0.05  # m before that at which it begins to reach down
_CUE_STEPS = 2 * FPS
_TARGET_HALF, _PRECISION = 0.065, 0.04
_TARGET_TOP = TABLE_TOP + 0.004
_DECISION_PLACE = (0.40, -0.08, 1.02)
_UNLIT: Colour = (0.55, 0.25, 0.85)


class MovingGrasp(Task):
    name = "moving_grasp"
    instruction = (
        "Grasp the object from the conveyor belt using visual guidance. Place it precisely at the first marked target "
        "location on the table. Then grasp it again and place it precisely at the second marked target location on "
        "the table."
    )
    subgoals = ("grasped", "at_first_target", "grasped_again", "at_second_target")
    cues = ("near_first", "far_first")
    time_limit = 160

    def build(self, rng: np.random.Generator) -> World:
        self._radius = rng.uniform(0.026, 0.032)
        self._half_height = rng.uniform(0.028, 0.036)
        belt, belt_top = belt_xml(_BELT_X, -0.72, _BELT_END)
        start = (_BELT_X + rng.uniform(-0.03, 0.03), rng.uniform(-0.58, -0.52), belt_top + self._half_height + 0.001)
        yaw = rng.uniform(-0.7, 0.7)
        self._targets = np.array([[0.30, -0.20], [0.36, 0.12]]) + rng.uniform(-0.02, 0.02, (2, 2))
        colour = (rng.uniform(0.0, 0.2), rng.uniform(0.65, 0.8), rng.uniform(0.8, 0.95))
        body = (
            f'<geom name="workpiece" type="cylinder" size="{self._radius} {self._half_height}" mass="0.2" '
            f'rgba="{colour[0]} {colour[1]} {colour[2]} 1"/>'
        ) + box_xml(
            "stripe", (0, 0, self._half_height), (self._radius * 0.9, 0.006, 0.001), DARK, solid=False, extra='mass="0"'
        )
        scene = table_xml() + belt + object_xml(start, yaw, body)
        for i, (x, y) in enumerate(self._targets):
            scene += box_xml(f"target{i}", (x, y, TABLE_TOP + 0.002), (_TARGET_HALF, _TARGET_HALF, 0.002), _UNLIT)
            scene += box_xml(f"cross{i}a", (x, y, _TARGET_TOP), (0.03, 0.005, 0.0005), (1, 1, 1), solid=False)
            scene += box_xml(f"cross{i}b", (x, y, _TARGET_TOP), (0.005, 0.03, 0.0005), (1, 1, 1), solid=False)
        self._visited, self._placed = [False, False], [False, False]
        return World(
            scene,
            Graspable(2 * self._radius),
            head=HeadCamera(),
            belt=Belt(_BELT_SPEED, _BARRIER_Y),
            arm_offset=arm_offset(rng),
        )

    def judge(self) -> dict[str, bool]:
        world = self.world
        place = world.object_position()
        lifted = world.held and place[2] > TABLE_TOP + self._half_height + 0.06
        for i, centre in enumerate(self._targets):
            resting = not world.held and within(place, centre, _TARGET_HALF) and world.touches(f"target{i}")
            if self.lasts(f"target{i}", resting):
                self._visited[i] = True
                if self.choice is None:
                    self.choice = i
        rests = [self._rests_on(target) for target in range(2)]
        self._placed = [placed or now for placed, now in zip(self._placed, rests, strict=True)]
        first = self.cue if self.cue is not None else 0
        return {
            "grasped": lifted,
            "at_first_target": rests[first],
            "grasped_again": lifted,
            "at_second_target": rests[1 - first],
        }

    def _rests_on(self, target: int) -> bool:
        place = self.world.object_position()
        return self.lasts(
            f"placed{target}",
            not self.world.held
            and self.world.touches(f"target{target}")
            and near(place[:2], self._targets[target], _PRECISION),
        )

    def deciding(self) -> bool:
        held = self.reached["grasped"] and not any(self._visited) and self.world.held
        return held and self.steps > _CUE_STEPS and near(self.world.tool_position("right"), _DECISION_PLACE, 0.03)

    def paint(self) -> None:
        for i in range(2):
            lit = i == self.cue and self.steps < _CUE_STEPS
            self.world.paint(f"target{i}", DARK if self._placed[i] else GREEN if lit else _UNLIT)

    def demonstrate(self, script: Script) -> Iterator[Command]:
        world = self.world
        x, _, z = world.object_position()
        yield from script.reach("right", (x, _MEETING_Y, z + 0.11), noise=0.7, beside=HOVERS)
        yield from script.wait_until(lambda: world.object_position()[1] > _MEETING_Y - _LEAD, noise=0.5)
        yield from script.reach("right", (x, _MEETING_Y, z), speed=1.6, noise=GRASPING)
        yield from script.claw("right", 1.0, noise=GRASPING)
        if world.holds("right"):
            yield from script.reach("right", (x, _MEETING_Y, z + 0.11), speed=1.6, noise=0.3)
        else:
            yield from script.claw("right", 0.0)
            yield from script.pick("right", (0.46, -0.20, 1.05), beside=HOVERS)
        yield from script.carry_to_decision("right", _DECISION_PLACE)
        assert self.cue is not None
        first, second = self._targets[self.cue], self._targets[1 - self.cue]
        height = _TARGET_TOP + self._half_height + 0.004
        between = (*((first + second) / 2), 1.02)
        yield from self._place(script, (*first, height), "at_first_target", between)
        yield from script.pick("right", between, beside=HOVERS)
        yield from self._place(script, (*second, height), "at_second_target", between)

    def _place(self, script: Script, position, subgoal: str, lift_to) -> Iterator[Command]:
        """Put the object down at `position`, anew where it comes to lie beside it."""
        for attempt in range(3):
            if attempt:
                yield from script.pick("right", lift_to, beside=HOVERS)
            yield from script.put("right", position, beside=HOVERS, careless=attempt == 0)
            yield from script.wait_until(lambda: self.reached[subgoal], limit=5)
            if self.reached[subgoal]:
                return
