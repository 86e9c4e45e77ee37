"""Skills of the moving base: drive to a rack and pick there; turn with an object in the hand and put it down."""

from collections.abc import Iterator

import numpy as np

from kuavo_sim.motions import Command, Script
from kuavo_sim.robot import HeadCamera
from kuavo_sim.scene import TABLE_TOP, World, object_xml, rotation, table_xml
from kuavo_sim.skills.skill import Skill
from kuavo_sim.skills.things import GOAL_KINDS, clutter_xml, draw_goals, draw_thing
from kuavo_sim.skills.words import one_of, sentence
from kuavo_sim.tasks.task import arm_offset

_STANDING_OFF = 0.57  # of a rack's middle from the base that works at it
_DRIVE_FORMS = (
    "Drive up to the rack and lift {thing}",
    "Go to the shelf and take {thing}",
    "Roll forward to the rack, then get {thing}",
    "Approach the shelf and collect {thing}",
)
_TURN_FORMS = (
    "Turn {way} and put {thing} {goal}",
    "Face {way} and set {thing} down {goal}",
    "Rotate {way}, drive up and leave {thing} {goal}",
    "With {thing} in hand turn {way} and deposit it {goal}",
)
_WAYS = {1: ("to the left", "left"), -1: ("to the right", "right"), 2: ("around", "about")}


class DriveAndPick(Skill):
    name = "drive_and_pick"
    subgoals = ("arrived", "lifted_there")
    time_limit = 80
    mobile = True

    def build(self, rng: np.random.Generator) -> World:
        sign = self.draw_side(rng)
        self.thing = draw_thing(rng)
        rack_x = _STANDING_OFF + rng.uniform(0.24, 0.48)
        beside = rng.uniform(0.14, 0.24)
        place = np.array([rack_x - rng.uniform(0.06, 0.16), sign * beside + rng.uniform(-0.08, 0.08)])
        start = (rng.uniform(-0.06, 0.06), rng.uniform(-0.06, 0.06), rng.uniform(-0.10, 0.10))
        self._stand = np.array([rack_x - _STANDING_OFF, place[1] - sign * beside, 0.0])
        self.goals = []
        self.instruction = sentence(one_of(rng, _DRIVE_FORMS).format(thing=self.thing.words))
        scene = table_xml("rack", rack_x, half_depth=rng.uniform(0.22, 0.26), half_width=rng.uniform(0.40, 0.55))
        scene += clutter_xml(rng, (rack_x - 0.1, -0.35), (rack_x + 0.2, 0.35), [place], without=[self.thing.colour])
        at = (place[0], place[1], TABLE_TOP + self.thing.half_height + 0.001)
        scene += object_xml(at, rng.uniform(-0.6, 0.6), self.thing.geoms)
        return World(
            scene,
            self.thing.graspable,
            head=HeadCamera(),
            mobile=True,
            arm_offset=arm_offset(rng),
            base_pose=start,
        )

    def judge(self) -> dict[str, bool]:
        base = self.world.base_pose()
        arrived = bool(np.abs(base - self._stand)[:2].max() < 0.08)
        return {"arrived": arrived, "lifted_there": self.lasts("up", self.lifted(TABLE_TOP + 0.03))}

    def demonstrate(self, script: Script) -> Iterator[Command]:
        yield from script.drive(*self._stand)
        grip = (0, 0, max(0.0, self.thing.half_height - 0.035))
        lift_to = self.world.object_position() + np.array([-0.06, 0.0, 0.20])
        yield from script.pick(self.side, lift_to, grip=grip)
        yield from script.wait(5)


class TurnAndPut(Skill):
    """The object is in the hand from the beginning, and the rack to the left, to the right, or behind."""

    name = "turn_and_put"
    subgoals = ("turned", "put_down_there")
    time_limit = 90
    mobile = True

    def build(self, rng: np.random.Generator) -> World:
        sign = self.draw_side(rng)
        self.thing = draw_thing(rng, one_of(rng, ("box", "cylinder")))
        way = (1, -1, 2)[int(rng.integers(3))]
        self._yaw = np.pi * (1.0 if way == 2 else way / 2)
        distance = rng.uniform(0.24, 0.46)  # that the base drives after it has turned
        rack_x = _STANDING_OFF + distance
        start = (rng.uniform(-0.05, 0.35), rng.uniform(-0.05, 0.05), rng.uniform(-0.08, 0.08))
        kind = one_of(rng, GOAL_KINDS)
        low, high = (distance + 0.30, sign * -0.10), (distance + 0.46, sign * 0.28)
        self.goals, goal = draw_goals(rng, kind, low, high, without=[self.thing.colour])
        there = rotation("z", self._yaw)[:2, :2]
        self.centre = there @ self.goals[0].centre
        self._stand = np.array([*(there @ [distance, 0.0]), self._yaw])
        words = {"thing": self.thing.words, "way": one_of(rng, _WAYS[way]), "goal": goal}
        self.instruction = sentence(one_of(rng, _TURN_FORMS).format(**words))
        furniture = table_xml("rack", rack_x, half_depth=rng.uniform(0.22, 0.26), half_width=rng.uniform(0.40, 0.55))
        furniture += "".join(each.xml() for each in self.goals)
        scene = f'<body name="there" euler="0 0 {self._yaw:.9f}">{furniture}</body>'
        scene += object_xml((3.0, 3.0, self.thing.half_height), 0.0, self.thing.geoms)
        world = World(
            scene,
            self.thing.graspable,
            head=HeadCamera(),
            mobile=True,
            arm_offset=arm_offset(rng),
            base_pose=start,
        )
        world.put_in_hand(self.side)
        return world

    def judge(self) -> dict[str, bool]:
        world = self.world
        turned = world.held and abs(world.base_pose()[2] - self._yaw) < 0.1
        return {"turned": turned, "put_down_there": self.put_down()}

    def demonstrate(self, script: Script) -> Iterator[Command]:
        yield from script.drive(0.10 if abs(self._yaw) > 3 else 0.0, 0.0, self._yaw)
        yield from script.drive(*self._stand)
        yield from script.put(self.side, self.goal_place(), orientation=rotation("z", self._yaw))
        yield from script.wait(5)
