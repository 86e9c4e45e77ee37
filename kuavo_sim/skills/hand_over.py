"""Take a tall object from the table, pass it to the other hand, and stand it on a mark or in a bin."""

from collections.abc import Iterator

import numpy as np

from kuavo_sim.motions import GRASPING, Command, Script
from kuavo_sim.robot import HeadCamera
from kuavo_sim.scene import TABLE_TOP, World, object_xml, rotation, table_xml
from kuavo_sim.skills.skill import Skill
from kuavo_sim.skills.things import clutter_xml, draw_goals, draw_thing
from kuavo_sim.skills.words import one_of, sentence
from kuavo_sim.tasks.task import arm_offset

_LEVEL = {  # the receiving hand points forward and to the other side
    "left": rotation("z", -np.pi / 4) @ rotation("y", -np.pi / 2),
    "right": rotation("z", np.pi / 4) @ rotation("y", -np.pi / 2),
}
_FORMS = (
    "Pass {thing} from the {giver} hand to the {taker} hand and stand it {goal}",
    "Give {thing} to the {taker} hand, which stands it {goal}",
    "With the {giver} hand take {thing}, swap hands, and stand it {goal}",
    "Change {thing} over to the {taker} hand, then stand it {goal}",
)


class HandOver(Skill):
    name = "hand_over"
    subgoals = ("in_one_hand", "in_the_other", "stood_up")
    time_limit = 130

    def build(self, rng: np.random.Generator) -> World:
        sign = self.draw_side(rng)
        self._taker = "right" if self.side == "left" else "left"
        self.thing = draw_thing(rng, "bottle")
        place = np.array([rng.uniform(0.36, 0.48), sign * rng.uniform(0.16, 0.34)])
        low, high = (0.32, -sign * 0.10), (0.42, -sign * 0.26)
        self.goals, goal = draw_goals(rng, "mark", low, high, taken=[place], without=[self.thing.colour], second=0.2)
        self.centre = self.goals[0].centre
        words = {"thing": self.thing.words, "giver": self.side, "taker": self._taker, "goal": goal}
        self.instruction = sentence(one_of(rng, _FORMS).format(**words))
        taken = [place, *(each.centre for each in self.goals)]
        scene = table_xml() + "".join(each.xml() for each in self.goals)
        scene += clutter_xml(rng, (0.30, -0.5), (0.70, 0.5), taken, without=[self.thing.colour])
        start = (place[0], place[1], TABLE_TOP + self.thing.half_height + 0.001)
        scene += object_xml(start, rng.uniform(-0.4, 0.4), self.thing.geoms)
        self._meeting = (rng.uniform(0.33, 0.39), sign * rng.uniform(-0.04, 0.04), rng.uniform(1.03, 1.09))
        return World(scene, self.thing.graspable, head=HeadCamera(), arm_offset=arm_offset(rng))

    def judge(self) -> dict[str, bool]:
        world = self.world
        passed = world.holds(self._taker) and not world.holds(self.side)
        return {
            "in_one_hand": self.lifted(TABLE_TOP),
            "in_the_other": self.lasts("passed", passed),
            "stood_up": self.put_down() and bool(world.object_rotation()[2, 2] > 0.9),
        }

    def demonstrate(self, script: Script) -> Iterator[Command]:
        world, giver, taker = self.world, self.side, self._taker
        outwards = 1 if giver == "left" else -1
        level = _LEVEL[taker]
        upper = self.thing.half_height - 0.012
        yield from script.pick(giver, (0.40, outwards * 0.15, 1.10), grip=(0, 0, upper), above=0.13)
        yield from script.carry(giver, self._meeting, np.eye(3), noise=0.5)
        for _ in range(3):
            grip = world.object_position() - np.array([0, 0, 0.03])
            yield from script.reach(taker, grip + 0.12 * level[:, 2], level, noise=0.5)
            yield from script.reach(taker, grip, level, speed=1.4, noise=GRASPING)
            yield from script.claw(taker, 1.0, noise=GRASPING)
            if world.holds(taker):
                break
            yield from script.claw(taker, 0.0)
        yield from script.claw(giver, 0.0)
        up = world.tool_position(giver) + np.array([0, outwards * 0.03, 0.07])
        yield from script.reach(giver, up, world.tool_rotation(giver), noise=0.3)
        yield from script.reach(giver, (0.30, outwards * 0.36, 1.06))
        yield from script.carry(taker, self.goal_place() + np.array([0, 0, 0.10]), np.eye(3), noise=0.5)
        yield from script.carry(taker, self.goal_place(), np.eye(3), speed=1.4, noise=0.0)
        yield from script.wait(1)
        yield from script.claw(taker, 0.0)
        hand = world.tool_rotation(taker)
        away = world.tool_position(taker) + 0.13 * hand[:, 2] + np.array([0, 0, 0.02])
        yield from script.reach(taker, away, hand, speed=1.4, noise=0.0)
        yield from script.wait(5)
