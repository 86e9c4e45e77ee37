"""Take an object from the table, a moving or a stopped belt, and put it on a mark, into a bin or on a box."""

from collections.abc import Iterator
from typing import ClassVar

import numpy as np

from kuavo_sim.motions import GRASPING, Command, Script
from kuavo_sim.robot import HeadCamera
from kuavo_sim.scene import TABLE_TOP, Belt, World, belt_xml, object_xml, table_xml
from kuavo_sim.skills.skill import Skill
from kuavo_sim.skills.things import GOAL_KINDS, clutter_xml, draw_goals, draw_thing
from kuavo_sim.skills.words import get_and_set, one_of
from kuavo_sim.tasks.task import arm_offset

_FROM_TABLE = ("from the table", "off the table", "from the bench", "")
_FROM_BELT = ("from the running belt", "off the belt", "from the band", "off the moving band")


class _Put(Skill):
    kind: ClassVar[str]
    subgoals = ("lifted", "put_down")

    def build(self, rng: np.random.Generator) -> World:
        sign = self.draw_side(rng)
        self.thing = draw_thing(rng)
        place = np.array([rng.uniform(0.32, 0.50), sign * rng.uniform(0.08, 0.36)])
        low, high = (0.28, sign * -0.14), (0.46, sign * 0.34)
        self.goals, goal = draw_goals(rng, self.kind, low, high, taken=[place], without=[self.thing.colour])
        self.centre = self.goals[0].centre
        self.instruction = get_and_set(rng, self.thing.words, one_of(rng, _FROM_TABLE), goal)
        taken = [place, *(each.centre for each in self.goals)]
        scene = table_xml() + "".join(each.xml() for each in self.goals)
        scene += clutter_xml(rng, (0.30, -0.5), (0.70, 0.5), taken, without=[self.thing.colour])
        start = (place[0], place[1], TABLE_TOP + self.thing.half_height + 0.001)
        scene += object_xml(start, rng.uniform(-0.8, 0.8), self.thing.geoms)
        return World(scene, self.thing.graspable, head=HeadCamera(), arm_offset=arm_offset(rng))

    def judge(self) -> dict[str, bool]:
        return {"lifted": self.lifted(TABLE_TOP), "put_down": self.put_down()}

    def demonstrate(self, script: Script) -> Iterator[Command]:
        grip = (0, 0, max(0.0, self.thing.half_height - 0.035))
        yield from script.pick(self.side, self.halfway(), grip=grip)
        yield from script.put(self.side, self.goal_place())
        yield from script.wait(5)


class PutOnMark(_Put):
    name = "put_on_mark"
    kind = "mark"


class PutInBin(_Put):
    name = "put_in_bin"
    kind = "bin"


class PutOnBox(_Put):
    name = "put_on_box"
    kind = "box"


class TakeFromBelt(Skill):
    """The belt ends anywhere in reach; in half of the episodes it brings the object to a halt there."""

    name = "take_from_belt"
    subgoals = ("off_the_belt", "set_down")

    def build(self, rng: np.random.Generator) -> World:
        sign = self.draw_side(rng)
        self.thing = draw_thing(rng)
        end = rng.uniform(-0.22, -0.11) if sign < 0 else rng.uniform(0.30, 0.40)
        x = rng.uniform(0.45, 0.54)
        belt, self._belt_top = belt_xml(x, end - rng.uniform(0.42, 0.56), end, half_width=rng.uniform(0.075, 0.095))
        self._stops = bool(rng.random() < 0.5)
        self._meeting = end - rng.uniform(0.12, 0.18)
        speed = rng.uniform(0.07, 0.12)
        barrier = self._meeting + (rng.uniform(-0.03, 0.03) if self._stops else 0.09)
        start = (
            x + rng.uniform(-0.03, 0.03),
            self._meeting - rng.uniform(0.10, 0.24),
            self._belt_top + self.thing.half_height + 0.001,
        )
        kind = one_of(rng, GOAL_KINDS)
        low, high = (0.27, -0.22 if sign < 0 else -0.10), (x - 0.18, 0.14 if sign < 0 else 0.32)
        self.goals, goal = draw_goals(rng, kind, low, high, without=[self.thing.colour])
        self.centre = self.goals[0].centre
        when = one_of(rng, ("when it has stopped", "once it rests") if self._stops else ("while it moves", "in motion"))
        self.instruction = get_and_set(rng, self.thing.words, f"{one_of(rng, _FROM_BELT)} {when}", goal)
        scene = table_xml() + belt + "".join(each.xml() for each in self.goals)
        scene += object_xml(start, rng.uniform(-0.7, 0.7), self.thing.geoms)
        return World(
            scene, self.thing.graspable, head=HeadCamera(), belt=Belt(speed, barrier), arm_offset=arm_offset(rng)
        )

    def judge(self) -> dict[str, bool]:
        return {"off_the_belt": self.lifted(self._belt_top), "set_down": self.put_down()}

    def demonstrate(self, script: Script) -> Iterator[Command]:
        world, side = self.world, self.side
        x, _, z = world.object_position()
        if self._stops:
            yield from script.reach(side, (x, self._meeting, z + 0.11), script.top_grasp())
            yield from script.wait_until(lambda: world.object_speed() < 0.01)
        else:
            yield from script.reach(side, (x, self._meeting, z + 0.11), noise=0.7)
            yield from script.wait_until(lambda: world.object_position()[1] > self._meeting - 0.05, noise=0.5)
            yield from script.reach(side, (x, self._meeting, z), speed=1.6, noise=GRASPING)
            yield from script.claw(side, 1.0, noise=GRASPING)
            if world.holds(side):
                yield from script.reach(side, (x, self._meeting, z + 0.11), speed=1.6, noise=0.3)
            else:
                yield from script.claw(side, 0.0)
        if world.holds(side):
            yield from script.reach(side, self.halfway(), noise=0.5)
        else:
            yield from script.pick(side, self.halfway())
        yield from script.put(side, self.goal_place())
        yield from script.wait(5)
