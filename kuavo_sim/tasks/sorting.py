"""Task 4: walk to a rack, take the workpiece, turn round, walk to the placement rack, put it into its compartment.

Cue: the sign on the first rack shows the colour of the compartment. After the turn it stands behind the robot.
"""

from collections.abc import Iterator

import numpy as np

from kuavo_sim.motions import Command, Script
from kuavo_sim.robot import HeadCamera
from kuavo_sim.scene import (
    BLUE,
    DARK,
    GREY,
    RED,
    TABLE_TOP,
    WHITE,
    Graspable,
    World,
    bin_xml,
    box_xml,
    object_xml,
    rotation,
    table_xml,
)
from kuavo_sim.tasks.task import Task, arm_offset, within

_AT_RACK = np.array([0.35, 0.0, 0.0])  # x, y (m) and yaw (rad) of the base
_AT_PLACEMENT = np.array([-0.35, 0.0, np.pi])
_RACK_X = 0.92
_BIN_HALF = 0.085
_COLOURS = (RED, BLUE)
_CARRYING = (0.34, -0.14, 1.03)  # tool point relative to the base


class Sorting(Task):
    name = "sorting"
    instruction = (
        "Move from the starting point to the rack, pick up the workpiece, turn around, move to the placement rack, "
        "and place it in the designated position in the material container"
    )
    subgoals = ("at_rack", "picked", "at_placement_rack", "placed")
    cues = ("red", "blue")
    time_limit = 160
    mobile = True

    def build(self, rng: np.random.Generator) -> World:
        self._half = rng.uniform(0.026, 0.032)
        place = np.array([_AT_RACK[0] + 0.45, -0.18]) + rng.uniform(-0.03, 0.03, 2)
        yaw = rng.uniform(-0.5, 0.5)
        # On the placement rack, as the robot sees it: red on its right, blue on its left.
        self._bins = np.array([[-0.75, 0.23], [-0.75, -0.05]]) + rng.uniform(-0.015, 0.015, (2, 2))
        start = (rng.uniform(-0.05, 0.05), rng.uniform(-0.05, 0.05), rng.uniform(-0.08, 0.08))
        colour = (rng.uniform(0.1, 0.2), rng.uniform(0.7, 0.8), rng.uniform(0.2, 0.3))
        workpiece = box_xml("workpiece", (0, 0, 0), (self._half, self._half, 0.035), colour, extra='mass="0.2"')
        workpiece += box_xml("knob", (0, 0, 0.036), (0.012, 0.012, 0.003), WHITE, solid=False, extra='mass="0"')
        scene = (
            table_xml("rack", _RACK_X, half_depth=0.24, half_width=0.45)
            + table_xml("placement_rack", -_RACK_X, half_depth=0.24, half_width=0.45)
            + box_xml("sign_post", (_RACK_X + 0.06, 0.10, TABLE_TOP + 0.05), (0.012, 0.02, 0.05), GREY, solid=False)
            + box_xml(
                "sign_back",
                (_RACK_X + 0.056, 0.10, TABLE_TOP + 0.096),
                (0.085, 0.10, 0.004),
                DARK,
                solid=False,
                extra='euler="0 -0.7 0"',
            )
            + box_xml(
                "sign",
                (_RACK_X + 0.05, 0.10, TABLE_TOP + 0.10),
                (0.075, 0.09, 0.004),
                DARK,
                solid=False,
                extra='euler="0 -0.7 0"',
            )
            + bin_xml("bin_red", self._bins[0], RED, half=_BIN_HALF)
            + bin_xml("bin_blue", self._bins[1], BLUE, half=_BIN_HALF)
            + object_xml((*place, TABLE_TOP + 0.036), yaw, workpiece)
        )
        return World(
            scene,
            Graspable(2 * self._half),
            head=HeadCamera(),
            mobile=True,
            arm_offset=arm_offset(rng),
            base_pose=start,
        )

    def judge(self) -> dict[str, bool]:
        world = self.world
        place = world.object_position()
        lifted = world.held and place[2] > TABLE_TOP + 0.09
        for i, centre in enumerate(self._bins):
            in_bin = not world.held and within(place, centre, _BIN_HALF) and place[2] < TABLE_TOP + 0.08
            if self.lasts(f"bin{i}", in_bin) and self.choice is None:
                self.choice = i
        return {
            "at_rack": self._stands_at(_AT_RACK, 0.06),
            "picked": lifted,
            "at_placement_rack": world.held and self._stands_at(_AT_PLACEMENT, 0.06),
            "placed": self.choice is not None and self.choice == self.cue,
        }

    def _stands_at(self, pose: np.ndarray, tolerance: float) -> bool:
        return bool(np.abs(self.world.base_pose() - pose).max() < tolerance)

    def deciding(self) -> bool:
        return self.reached["picked"] and self.world.held and self._stands_at(_AT_PLACEMENT, 0.02)

    def paint(self) -> None:
        if self.cue is not None:
            self.world.paint("sign", _COLOURS[self.cue])

    def demonstrate(self, script: Script) -> Iterator[Command]:
        yield from script.drive(*_AT_RACK)
        yield from script.pick("right", np.add(_CARRYING, [*_AT_RACK[:2], 0]))
        yield from script.drive(0.10, 0.0, np.pi)
        yield from script.drive(*_AT_PLACEMENT, accuracy=4)
        assert self.cue is not None
        facing_back = rotation("z", np.pi)
        yield from script.put("right", (*self._bins[self.cue], TABLE_TOP + 0.05), orientation=facing_back)
        yield from script.wait(5)
