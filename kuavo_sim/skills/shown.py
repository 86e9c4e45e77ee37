"""Skills with a cue of their own: a post shows which of two goals is meant, until the object is in the hand.

From there on no picture tells it, so they are for a base that has a memory.
"""

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar

import numpy as np

from kuavo_sim.motions import Command, Script
from kuavo_sim.robot import HeadCamera
from kuavo_sim.scene import GREY, TABLE_TOP, Colour, World, object_xml, table_xml
from kuavo_sim.skills.skill import HALFWAY_HEIGHT, Skill
from kuavo_sim.skills.things import COLOURS, GOAL_KINDS, Goal, clutter_xml, draw_goals, draw_thing, onto
from kuavo_sim.skills.words import get_and_set, one_of
from kuavo_sim.tasks.task import arm_offset, near

LIGHTS = ("yellow", "violet", "orange", "turquoise", "pink")  # in none of them does a job show a cue
_FROM_TABLE = ("from the table", "off the table", "from the bench", "")
_RADIUS, _HALF_HEIGHT = 0.026, 0.06  # m, of a post
_BEHIND = 0.05  # m, of a post from the edge of its goal
# m: how far the goals lie to the side of each other, the object from the middle between them, and from a post.
_SIDE_BY_SIDE, _OFF_MIDDLE, _OFF_POST = 0.17, 0.12, 0.09


class _Shown(Skill):
    """As the robot sees them, the goal on the right is meant with cue 0, the one on the left with cue 1."""

    subgoals = ("taken", "put_where_shown")
    cues = ("right", "left")
    ways: ClassVar[tuple[str, ...]]  # to say which goal is meant

    def build(self, rng: np.random.Generator) -> World:
        sign = self.draw_side(rng)
        self.thing = draw_thing(rng)
        place = np.array([rng.uniform(0.42, 0.52), sign * rng.uniform(0.08, 0.36)])
        self.goals = self._draw_pair(rng, sign, place)
        self.centre = self.goals[self.cue or 0].centre
        self._between = np.array([*_middle(self.goals), HALFWAY_HEIGHT])
        goal = onto(rng, self.goals[0].kind, self.called())
        where = one_of(rng, self.ways).format(goal=goal)
        self.instruction = get_and_set(rng, self.thing.words, one_of(rng, _FROM_TABLE), where)
        self.light: Colour = COLOURS[one_of(rng, LIGHTS)]
        posts = self.posts(self.goals)
        taken = [place, *posts, *(each.centre for each in self.goals)]
        scene = table_xml() + "".join(each.xml() for each in self.goals)
        scene += "".join(_post_xml(number, post) for number, post in enumerate(posts))
        scene += clutter_xml(rng, (0.30, -0.5), (0.70, 0.5), taken, without=[self.thing.colour])
        start = (place[0], place[1], TABLE_TOP + self.thing.half_height + 0.001)
        scene += object_xml(start, rng.uniform(-0.8, 0.8), self.thing.geoms)
        return World(scene, self.thing.graspable, head=HeadCamera(), arm_offset=arm_offset(rng))

    def _draw_pair(self, rng: np.random.Generator, sign: int, place: np.ndarray) -> list[Goal]:
        """Two goals, from the right to the left, clear of an object at `place` [2]."""
        kind = one_of(rng, GOAL_KINDS)
        without = [self.thing.colour, *(COLOURS.keys() - LIGHTS)]
        while True:
            low, high = (0.27, sign * -0.16), (0.37, sign * 0.34)
            drawn, _ = draw_goals(rng, kind, low, high, taken=[place], without=without, second=1.0)
            goals = sorted(drawn, key=lambda goal: goal.centre[1])
            if (
                len(goals) == 2
                and goals[1].centre[1] - goals[0].centre[1] > _SIDE_BY_SIDE
                and not near(place, _middle(goals), _OFF_MIDDLE)
                and not any(near(place, post, _OFF_POST) for post in self.posts(goals))
            ):
                return goals

    @abstractmethod
    def posts(self, goals: list[Goal]) -> list[np.ndarray]:
        """Where posts stand, [2] each."""

    @abstractmethod
    def called(self) -> str | None:
        """The colour that words give the goals."""

    @abstractmethod
    def lit(self) -> dict[int, Colour]:
        """Post → colour, of those that shine while the cue is shown."""

    def judge(self) -> dict[str, bool]:
        for number, goal in enumerate(self.goals):
            if self.stands_on(goal, goal.centre) and self.choice is None:
                self.choice = number
        return {"taken": self.world.held, "put_where_shown": self.choice is not None and self.choice == self.cue}

    def deciding(self) -> bool:
        return self.world.held and near(self.world.tool_position(self.side), self._between, 0.03)

    def paint(self) -> None:
        lit = {} if self.reached["taken"] else self.lit()
        for number in range(len(self.posts(self.goals))):
            self.world.paint(f"post{number}", lit.get(number, GREY))

    def demonstrate(self, script: Script) -> Iterator[Command]:
        grip = (0, 0, max(0.0, self.thing.half_height - 0.035))
        lift_to = (*self.world.object_position()[:2], HALFWAY_HEIGHT)
        yield from script.pick(self.side, lift_to, grip=grip)
        yield from script.carry_to_decision(self.side, self._between)
        yield from script.put(self.side, self.goal_place())
        yield from script.wait(5)


class PutWhereShown(_Shown):
    """The goals are alike, with a post behind each, and the one that is meant has its post lit."""

    name = "put_where_shown"
    ways = ("{goal} with the lit post", "{goal} that its post points out", "{goal} beside the shining post")

    def _draw_pair(self, rng: np.random.Generator, sign: int, place: np.ndarray) -> list[Goal]:
        right, left = super()._draw_pair(rng, sign, place)
        return [right, replace(left, colour=right.colour)]

    def posts(self, goals: list[Goal]) -> list[np.ndarray]:
        return [goal.centre + np.array([goal.half + _BEHIND, 0.0]) for goal in goals]

    def called(self) -> str:
        return self.goals[0].colour[0]

    def lit(self) -> dict[int, Colour]:
        return {} if self.cue is None else {self.cue: self.light}


class PutInShownColour(_Shown):
    """The goals are of two colours, and a post between them shines in that of the one that is meant."""

    name = "put_in_shown_colour"
    ways = ("{goal} of the post's colour", "{goal} in the colour that the post shows", "{goal} that matches the post")

    def posts(self, goals: list[Goal]) -> list[np.ndarray]:
        return [_middle(goals) + np.array([goals[0].half + _BEHIND, 0.0])]

    def called(self) -> None:
        return None

    def lit(self) -> dict[int, Colour]:
        return {} if self.cue is None else {0: self.goals[self.cue].colour[1]}


def _middle(goals: list[Goal]) -> np.ndarray:
    """[2] between two of them."""
    return (goals[0].centre + goals[1].centre) / 2


def _post_xml(number: int, place: np.ndarray) -> str:
    return (
        f'<geom name="post{number}" type="cylinder" pos="{place[0]:.5f} {place[1]:.5f} {TABLE_TOP + _HALF_HEIGHT:.5f}" '
        f'size="{_RADIUS} {_HALF_HEIGHT}" rgba="0 0 0 1" contype="0" conaffinity="0"/>'
    )
