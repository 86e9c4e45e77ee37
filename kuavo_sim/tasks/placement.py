"""Task 3: take the bottle out of the clutter, pass it to the other hand, lay it into the yellow area, label up.

No cue: everything that matters can be seen. It is the control for the memory of the other three tasks.
"""

from collections.abc import Iterator

import numpy as np

from kuavo_sim.motions import GRASPING, Command, Script
from kuavo_sim.robot import HeadCamera
from kuavo_sim.scene import (
    BLUE,
    TABLE_TOP,
    WHITE,
    YELLOW,
    Colour,
    Graspable,
    World,
    box_xml,
    object_xml,
    rotation,
    table_xml,
)
from kuavo_sim.tasks.task import Task, arm_offset

# The bottle's own frame: origin in the middle of the body, cap along +z, label on the −x side.
_HALF_WIDTH, _HALF_BODY, _MOUTH = 0.0275, 0.06, 0.095  # m
_AREA_HALF = np.array([0.075, 0.07])
_AREA_TOP = TABLE_TOP + 0.002
_HANDOVER = (0.36, 0.00, 1.06)
_LYING = rotation("y", np.pi / 2)  # cap away from the robot, label up
_LEFT_GRASP = rotation("z", -np.pi / 4) @ rotation("y", -np.pi / 2)  # level, pointing forward and to the right
_LEFT_POINTING = -_LEFT_GRASP[:, 2]
_MIN_INSIDE, _MIN_LABEL_UP, _MAX_TILT = 0.7, 0.9, 0.25
_OTHERS: tuple[tuple[Colour, Colour], ...] = (  # bodies and caps of the other bottles
    ((0.93, 0.95, 0.97), (0.3, 0.6, 0.3)),
    ((0.20, 0.55, 0.60), (0.95, 0.95, 0.95)),
    ((0.50, 0.36, 0.25), (0.2, 0.2, 0.2)),
    ((0.55, 0.65, 0.85), (0.85, 0.85, 0.4)),
)


class Placement(Task):
    name = "placement"
    instruction = (
        "Pick up a bottle from the cluttered daily chemical bottles, transfer it to the other hand, "
        "and place it in the specified pose with the label facing up in the yellow area. "
        "Requirements: bottle mouth outside the yellow area, most of the bottle body inside the yellow area, "
        "label facing up"
    )
    subgoals = ("picked", "handed_over", "laid_down", "placed")
    time_limit = 160

    def build(self, rng: np.random.Generator) -> World:
        place = np.array([0.42, -0.25]) + rng.uniform(-0.03, 0.03, 2)
        yaw = rng.uniform(-0.25, 0.25)
        self._area = np.array([0.36, 0.15]) + rng.uniform(-0.02, 0.02, 2)
        scene = table_xml() + box_xml("area", (*self._area, _AREA_TOP - 0.001), (*_AREA_HALF, 0.001), YELLOW)
        first = rng.uniform(0, 2 * np.pi)
        for i, (body, cap) in enumerate(_OTHERS):
            angle = first + (i + rng.uniform(-0.15, 0.15)) * np.pi / 2
            x, y = place + rng.uniform(0.105, 0.125) * np.array([np.cos(angle), np.sin(angle)])
            half = rng.uniform(0.035, 0.055)
            scene += _other_bottle(f"other{i}", x, y, half, body, cap)
        scene += object_xml((*place, TABLE_TOP + _HALF_BODY + 0.001), yaw, _bottle())
        return World(scene, Graspable(2 * _HALF_WIDTH, half_length=0.07), head=HeadCamera(), arm_offset=arm_offset(rng))

    def judge(self) -> dict[str, bool]:
        world = self.world
        centre, turn = world.object_position(), world.object_rotation()
        along = turn[:, 2]
        low = centre[2] < TABLE_TOP + _HALF_WIDTH + 0.03
        lying = low and abs(along[2]) < _MAX_TILT
        body = centre + np.linspace(-_HALF_BODY, _HALF_BODY, 25)[:, None] * along
        inside = (np.abs(body[:, :2] - self._area) < _AREA_HALF).all(axis=1).mean()
        mouth = centre + _MOUTH * along
        mouth_outside = bool((np.abs(mouth[:2] - self._area) > _AREA_HALF).any())
        label_up = -turn[2, 0] > _MIN_LABEL_UP
        placed = lying and inside >= _MIN_INSIDE and mouth_outside and label_up and not world.held
        return {
            "picked": world.held and centre[2] > TABLE_TOP + _HALF_BODY + 0.05,
            "handed_over": self.lasts("handed_over", world.holds("left") and not world.holds("right")),
            "laid_down": lying and inside > 0.5,
            "placed": self.lasts("placed", placed),
        }

    def demonstrate(self, script: Script) -> Iterator[Command]:
        world = self.world
        yield from script.pick("right", (0.40, -0.15, 1.10), grip=(0, 0, 0.05), above=0.13)
        yield from script.carry("right", _HANDOVER, np.eye(3), noise=0.5)
        for _ in range(3):
            grip = world.object_position() - np.array([0, 0, 0.03])
            yield from script.reach("left", grip - 0.12 * _LEFT_POINTING, _LEFT_GRASP, noise=0.5)
            yield from script.reach("left", grip, _LEFT_GRASP, speed=1.4, noise=GRASPING)
            yield from script.claw("left", 1.0, noise=GRASPING)
            if world.holds("left"):
                break
            yield from script.claw("left", 0.0)
        yield from script.claw("right", 0.0)
        up = world.tool_position("right") + np.array([0, -0.03, 0.07])
        yield from script.reach("right", up, world.tool_rotation("right"), noise=0.3)
        yield from script.reach("right", (0.30, -0.36, 1.06))  # out of the head camera's way
        target = np.array([self._area[0] + 0.02, self._area[1], _AREA_TOP + _HALF_WIDTH + 0.004])
        yield from script.carry("left", target + np.array([0, 0, 0.10]), _LYING, noise=0.5)
        yield from script.carry("left", target, _LYING, speed=1.4, noise=0.0)
        yield from script.wait(1)
        yield from script.claw("left", 0.0)
        away = world.tool_position("left") + np.array([0, 0.06, 0.08])
        yield from script.reach("left", away, world.tool_rotation("left"), speed=1.4, noise=0.0)
        yield from script.wait(5)


def _bottle() -> str:
    label = -_HALF_WIDTH - 0.001
    return (
        box_xml("bottle", (0, 0, 0), (_HALF_WIDTH, _HALF_WIDTH, _HALF_BODY), (0.95, 0.15, 0.55), extra='mass="0.2"')
        + f'<geom name="cap" type="cylinder" pos="0 0 {(_HALF_BODY + _MOUTH) / 2}" '
        f'size="0.017 {(_MOUTH - _HALF_BODY) / 2}" rgba="0.1 0.1 0.6 1" mass="0.01" contype="0" conaffinity="0"/>'
        + box_xml("label", (label, 0, 0), (0.001, 0.022, 0.045), WHITE, solid=False, extra='mass="0"')
        + box_xml("print", (label - 0.001, 0, 0.01), (0.001, 0.014, 0.012), BLUE, solid=False, extra='mass="0"')
    )


def _other_bottle(name: str, x: float, y: float, half: float, body: Colour, cap: Colour) -> str:
    """A bottle that only stands in the way."""
    return (
        f'<geom name="{name}" type="cylinder" pos="{x} {y} {TABLE_TOP + half}" size="0.024 {half}" '
        f'rgba="{body[0]} {body[1]} {body[2]} 1"/>'
        f'<geom name="{name}_cap" type="cylinder" pos="{x} {y} {TABLE_TOP + 2 * half + 0.012}" size="0.013 0.012" '
        f'rgba="{cap[0]} {cap[1]} {cap[2]} 1"/>'
    )
