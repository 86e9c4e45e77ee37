"""What every task says about itself: its scene, its cue, when a sub-goal is reached, and how an expert would do it."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar

import numpy as np

from kuavo_sim.motions import Command, Script
from kuavo_sim.scene import World

SETTLED = 3  # control steps that something must stay true before it counts


class Task(ABC):
    """One job, and the state of the current episode of it.

    Attributes:
        cue: which of `cues` this episode demands, or None for a task without.
        reached: sub-goal → whether it has been reached; a sub-goal counts only after those before it.
        choice: which of `cues` the robot acted on, None until it has shown that.
        at_decision_point: whether this is the first step at which the right action depends on the cue. The cue can
            no longer be seen then.
    """

    name: ClassVar[str]
    instruction: str  # of all episodes, or where `words_vary` of this one
    words_vary: ClassVar[bool] = False
    subgoals: ClassVar[tuple[str, ...]]  # in order; the last one is success
    cues: ClassVar[tuple[str, ...]] = ()
    time_limit: ClassVar[int]  # control steps
    mobile: ClassVar[bool] = False

    def __init__(self, *, phase_visible: bool = True):
        self.phase_visible = phase_visible
        self.world: World
        self.cue: int | None = None
        self.reached: dict[str, bool] = {}
        self.choice: int | None = None
        self.at_decision_point = False
        self.steps = 0
        self._decided = False
        self._lasting: dict[str, int] = {}

    def reset(self, rng: np.random.Generator, cue: int | None) -> None:
        """Begin an episode. Draws from `rng` in an order that does not depend on `cue`."""
        self.cue = cue
        self.reached = dict.fromkeys(self.subgoals, False)
        self.choice = None
        self.at_decision_point = self._decided = False
        self.steps = 0
        self._lasting = {}
        self.world = self.build(rng)
        self._judge_and_paint()

    def after_step(self) -> None:
        """Bring sub-goals, choice, decision point and lamps up to date with the physics."""
        self.steps += 1
        self._judge_and_paint()

    @property
    def success(self) -> bool:
        return self.reached[self.subgoals[-1]]

    @property
    def failed(self) -> bool:
        """Whether the robot has acted on the wrong cue, which ends the episode."""
        return self.choice is not None and self.choice != self.cue

    @property
    def progress(self) -> float:
        """Share of the sub-goals reached, in [0, 1]."""
        return sum(self.reached.values()) / len(self.subgoals)

    @abstractmethod
    def build(self, rng: np.random.Generator) -> World:
        """Draw a layout and make its scene."""

    @abstractmethod
    def judge(self) -> dict[str, bool]:
        """For each sub-goal, whether its condition holds now (whatever came before). Sets `choice`."""

    def deciding(self) -> bool:
        """Whether the robot stands now where the cue is needed."""
        return False

    def paint(self) -> None:
        """Set lamps and signs."""
        return

    @abstractmethod
    def demonstrate(self, script: Script) -> Iterator[Command]:
        """The expert's commands, one per control step."""

    def lasts(self, name: str, now: bool, steps: int = SETTLED) -> bool:
        """Whether `now` has been true for `steps` steps in a row; call once per step and name."""
        self._lasting[name] = self._lasting.get(name, 0) + 1 if now else 0
        return self._lasting[name] >= steps

    def _judge_and_paint(self) -> None:
        holds = self.judge()
        for subgoal in self.subgoals:
            if not (self.reached[subgoal] or holds[subgoal]):
                break
            self.reached[subgoal] = True
        self.at_decision_point = not self._decided and self.deciding()
        self._decided = self._decided or self.at_decision_point
        self.paint()


def near(point: np.ndarray, goal, radius: float) -> bool:
    return bool(np.linalg.norm(point - np.asarray(goal)) < radius)


def within(point: np.ndarray, centre, half: float) -> bool:
    """Whether `point` lies over the square of half width `half` (m) about `centre`, height left aside."""
    return bool(np.all(np.abs(point[:2] - np.asarray(centre)[:2]) < half))


def arm_offset(rng: np.random.Generator) -> np.ndarray:
    """Where the arms start, relative to home: [14] rad."""
    return rng.uniform(-0.04, 0.04, size=14)
