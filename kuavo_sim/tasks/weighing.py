"""Task 2: a parcel comes on a belt, is weighed, and goes into the container whose colour the scale's lamp showed.

Cue: the lamp is red or blue only while the parcel lies on the scale; once it is lifted, the lamp is dark and nothing
else shows where it belongs. A second thing is hidden too: whether the parcel has been weighed yet. The white "done"
light shows that by default; `phase_visible=False` keeps it dark.
"""

from collections.abc import Iterator

import numpy as np

from kuavo_sim.motions import Command, Script
from kuavo_sim.robot import HeadCamera
from kuavo_sim.scene import (
    BLUE,
    DARK,
    RED,
    TABLE_TOP,
    WHITE,
    Belt,
    Graspable,
    World,
    belt_xml,
    bin_xml,
    box_xml,
    object_xml,
    rotation,
    table_xml,
)
from kuavo_sim.tasks.task import Task, arm_offset, near, within

_BELT_X, _BELT_END = 0.50, -0.19  # m
_PICK_Y = -0.30
_SCALE_HALF, _SCALE_TOP = 0.075, TABLE_TOP + 0.03
_PLAY = 0.008  # m: a parcel lifted by no more still lies on the scale
_BIN_HALF = 0.085
_DECISION_PLACE = (0.36, -0.06, 1.03)  # tool point, halfway between the bins
_COLOURS = (RED, BLUE)


class Weighing(Task):
    name = "weighing"
    instruction = (
        "Pick up the package from the conveyor belt, weigh it on the electronic scale, then pick it up again "
        "and place it in the designated storage container"
    )
    subgoals = ("picked", "weighed", "picked_again", "stored")
    cues = ("red", "blue")
    time_limit = 160

    def build(self, rng: np.random.Generator) -> World:
        self._half = rng.uniform(0.029, 0.036)
        belt, belt_top = belt_xml(_BELT_X, -0.72, _BELT_END)
        start = (_BELT_X + rng.uniform(-0.025, 0.025), rng.uniform(-0.50, -0.40), belt_top + self._half + 0.001)
        yaw = rng.uniform(-0.5, 0.5)
        barrier = _PICK_Y + rng.uniform(-0.035, 0.035)
        self._scale = np.array([0.47, -0.02]) + rng.uniform(-0.015, 0.015, 2)
        self._bins = np.array([[0.30, -0.26], [0.30, 0.13]]) + rng.uniform(-0.015, 0.015, (2, 2))
        colour = (0.95, rng.uniform(0.55, 0.70), 0.10)
        x, y = self._scale
        label = box_xml(
            "label", (0, 0, self._half), (0.018, 0.018, 0.001), (0.45, 0.22, 0.05), solid=False, extra='mass="0"'
        )
        scene = (
            table_xml()
            + belt
            + box_xml("scale_foot", (x, y, TABLE_TOP + 0.01), (0.085, 0.085, 0.01), (0.25, 0.26, 0.3))
            + box_xml("scale", (x, y, _SCALE_TOP - 0.005), (_SCALE_HALF, _SCALE_HALF, 0.005), (0.75, 0.9, 0.8))
            + f'<geom name="lamp" type="sphere" pos="0.60 0.08 {TABLE_TOP + 0.05}" size="0.055" rgba="0 0 0 1"/>'
            + box_xml("done", (0.60, 0.22, TABLE_TOP + 0.05), (0.03, 0.055, 0.05), DARK)
            + bin_xml("bin_red", self._bins[0], RED, half=_BIN_HALF)
            + bin_xml("bin_blue", self._bins[1], BLUE, half=_BIN_HALF)
            + object_xml(
                start, yaw, box_xml("parcel", (0, 0, 0), (self._half,) * 3, colour, extra='mass="0.2"') + label
            )
        )
        return World(
            scene,
            Graspable(2 * self._half),
            head=HeadCamera(),
            belt=Belt(0.10, barrier),
            arm_offset=arm_offset(rng),
        )

    def judge(self) -> dict[str, bool]:
        world = self.world
        parcel = world.object_position()
        lifted = world.held and parcel[2] > _SCALE_TOP + self._half + 0.03
        self._on_scale = within(parcel, self._scale, _SCALE_HALF) and parcel[2] < _SCALE_TOP + self._half + _PLAY
        for i, centre in enumerate(self._bins):
            in_bin = not world.held and within(parcel, centre, _BIN_HALF) and parcel[2] < TABLE_TOP + 0.08
            if self.lasts(f"bin{i}", in_bin) and self.choice is None:
                self.choice = i
        return {
            "picked": lifted,
            "weighed": self.lasts("weighed", self._on_scale and not world.held),
            "picked_again": lifted,
            "stored": self.choice is not None and self.choice == self.cue,
        }

    def deciding(self) -> bool:
        held = self.reached["picked_again"] and self.world.held
        return held and near(self.world.tool_position("right"), _DECISION_PLACE, 0.03)

    def paint(self) -> None:
        lit = self._on_scale and self.cue is not None
        self.world.paint("lamp", _COLOURS[self.cue or 0] if lit else DARK)
        self.world.paint("done", WHITE if self.reached["weighed"] and self.phase_visible else DARK)

    def demonstrate(self, script: Script) -> Iterator[Command]:
        world = self.world
        above_belt = (_BELT_X, _PICK_Y, 1.01)
        yield from script.reach("right", above_belt, script.top_grasp())
        yield from script.wait_until(lambda: world.object_speed() < 0.01)
        yield from script.pick("right", (0.46, -0.18, 1.05))
        yield from script.put("right", (*self._scale, _SCALE_TOP + self._half + 0.003))
        yield from script.wait_until(lambda: self.reached["weighed"])
        yield from script.pick("right", (0.44, -0.03, 1.05), above=0.10)
        yield from script.carry_to_decision("right", _DECISION_PLACE)
        assert self.cue is not None
        yield from script.put(
            "right", (*self._bins[self.cue], TABLE_TOP + self._half + 0.012), orientation=rotation("z", 0.0)
        )
        yield from script.wait(5)
