"""What skills have in common: an arm drawn by chance, an object, goals, and words for them."""

import numpy as np

from kuavo_sim.robot import SIDES
from kuavo_sim.skills.things import Goal, Thing
from kuavo_sim.tasks.task import Task

LIFTED = 0.05  # m above where it stood
HALFWAY_HEIGHT = 1.04  # m
CLEAR = 0.07  # m between an object and the hand that has let go of it


class Skill(Task):
    """A movement that jobs are made of, in surroundings that are new in every episode; none of them is a job's.

    Attributes:
        side: of the arm that begins.
        thing: the object.
        goals: the one that is meant, then perhaps another; with a cue, one for each cue.
        centre: [2] of the goal that is meant, in the world's frame.
    """

    instruction = ""  # before the first episode
    words_vary = True
    time_limit = 110
    side: str
    thing: Thing
    goals: list[Goal]
    centre: np.ndarray

    def reset(self, rng: np.random.Generator, cue: int | None) -> None:
        """As of a task; of one seed every skill has another layout."""
        super().reset(np.random.default_rng([int(rng.integers(2**32)), *self.name.encode()]), cue)

    def draw_side(self, rng: np.random.Generator) -> int:
        """+1 for the left arm, −1 for the right, and `side` set to it."""
        sign = int(rng.choice([-1, 1]))
        self.side = "left" if sign > 0 else "right"
        return sign

    def lifted(self, bottom: float) -> bool:
        """Whether it is held clear of a surface of that height."""
        return self.world.held and bool(self.world.object_position()[2] > bottom + self.thing.half_height + LIFTED)

    def put_down(self) -> bool:
        """Whether it stands where it is meant to, and the hands are clear of it."""
        return self.stands_on(self.goals[0], self.centre)

    def stands_on(self, goal: Goal, centre: np.ndarray) -> bool:
        """Whether it stands on that goal, [2] in the world's frame, and the hands are clear of it."""
        place = self.world.object_position()
        clear = all(np.linalg.norm(self.world.tool_position(side) - place) > CLEAR for side in SIDES)
        return self.lasts(goal.name, clear and goal.holds(self.world, centre))

    def halfway(self) -> np.ndarray:
        """[3] of the tool point above the middle between object and goal: what can be seen decides the path."""
        place = self.world.object_position()
        return np.array([*(place[:2] + self.centre) / 2, HALFWAY_HEIGHT])

    def goal_place(self) -> np.ndarray:
        """[3] of the object's centre, a little above standing where it is meant to."""
        play = 0.012 if self.goals[0].kind == "bin" else 0.004
        return np.array([*self.centre, self.goals[0].top + self.thing.half_height + play])
