"""A policy whose answers take time, while the simulated robot goes on moving: with the hand-over that robots run.

    roll_out(Delayed(policy, "blend", delay=2), environment, seeds)

The delay is counted in ticks of the simulation, so that an episode does not depend on the machine it is played on. With
`wait` and no delay it is the policy as it is.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from lerobot.utils.constants import OBS_STATE

from kuavo_client import Handover
from kuavo_train.evaluation.smoothness import HELD
from kuavo_train.wrapper.policy.episode import RobotEpisode
from kuavo_train.wrapper.policy.robot_io import Actions, Observation
from kuavo_train.wrapper.policy.smolvla import Look, Plan, Query, SmolVLAPolicyWrapper


@dataclass
class _Robot:
    """Of the batch. `command` is the last one; `answer` is under way until tick `due_at`."""

    handover: Handover
    episode: RobotEpisode
    seen: deque[Observation]
    tick: int = 0
    chunk: int = HELD
    due_at: int = 0
    answer: Plan | None = None
    command: np.ndarray | None = None
    held: bool = field(default=True)


class Delayed:
    """
    Args:
        handover: wait, blend or rtc, see kuavo_client.
        delay: ticks from a look to its answer.
    """

    def __init__(self, policy: SmolVLAPolicyWrapper, handover: str, delay: int):
        self._policy, self._kind, self._delay = policy, handover, delay
        self._robots: list[_Robot] = []
        self._seeds: list[int] = []

    @property
    def n_action_steps(self) -> int:
        return self._policy.n_action_steps

    def reset(self, indices: Sequence[int] | None = None, *, seeds: Sequence[int] | None = None) -> None:
        """As `SmolVLAPolicyWrapper.reset`."""
        if indices is None:
            self._seeds, self._robots = list(seeds or ()), []
            return
        for index, seed in zip(indices, indices if seeds is None else seeds, strict=True):
            self._seeds[index] = seed
            if self._robots:
                self._robots[index] = self._begin(seed)

    def memory_norms(self) -> np.ndarray | None:
        """They are told of the policy as it is."""
        return None

    def select_action(self, observation: Observation) -> Actions:
        """The commands of this tick, of B robots."""
        size = len(observation[OBS_STATE])
        self._seeds = self._seeds or list(range(size))
        self._robots = self._robots or [self._begin(seed) for seed in self._seeds]
        looks: dict[int, Look] = {}
        for place, robot in enumerate(self._robots):
            robot.seen.append(_of_robot(observation, place, size))
            _take_up(robot)
            if robot.handover.due:
                looks[place] = self._policy.look(_stacked(robot.seen, self._policy.frames))
        queries = {place: self._ask(self._robots[place], look) for place, look in looks.items()}
        for (place, look), plan in zip(looks.items(), self._policy.plan(list(queries.values())), strict=True):
            robot = self._robots[place]
            robot.answer, robot.due_at = plan, robot.tick + self._delay
            if robot.command is None:
                robot.command = _pose(look, robot.seen[-1][OBS_STATE])
        commands = [self._next(robot) for robot in self._robots]
        return np.stack(commands) if len({len(command) for command in commands}) == 1 else commands

    def due(self) -> Sequence[int]:
        """All: when an answer lets a robot look again is known in that tick alone."""
        return range(len(self._robots))

    def chunks(self) -> list[int]:
        """Of each robot, the number of the chunk that its last command is of; `HELD` where its pose was held."""
        return [HELD if robot.held else robot.chunk for robot in self._robots]

    def _begin(self, seed: int) -> _Robot:
        handover = Handover(self._kind, self._policy.n_action_steps)
        return _Robot(handover, RobotEpisode(seed), deque(maxlen=self._policy.frames))

    def _ask(self, robot: _Robot, look: Look) -> Query:
        said = robot.handover.look(self._delay)
        executed = said.get("executed", 0)
        robot.episode = robot.episode.moved(executed)
        return Query(look, robot.episode, executed, said.get("delay"))

    def _next(self, robot: _Robot) -> np.ndarray:
        _take_up(robot)
        robot.tick += 1
        action = robot.handover.action()
        robot.held = action is None
        if action is not None:
            robot.command = action
        assert robot.command is not None, "its first look was answered or is under way"
        return robot.command


def _take_up(robot: _Robot) -> None:
    """The answer to its last look, where it is there by now."""
    if robot.answer is not None and robot.tick >= robot.due_at:
        robot.handover.arrived(robot.answer.actions)
        robot.episode, robot.answer = robot.answer.episode, None
        robot.chunk += 1


def _of_robot(observation: Observation, place: int, size: int) -> dict[str, object]:
    task = observation["task"]
    rows = {key: value[place] for key, value in observation.items() if key != "task"}
    return {**rows, "task": task if isinstance(task, str) else task[place]}


def _stacked(seen: Sequence[Observation], frames: int) -> Observation:
    """What a policy that looks at several frames is shown, the oldest first; before an episode its first one again."""
    if frames == 1:
        return seen[-1]
    history = [seen[0]] * (frames - len(seen)) + list(seen)
    stacked = {key: np.stack([each[key] for each in history]) for key in seen[-1] if key != "task"}
    return {**stacked, "task": seen[-1]["task"]}


def _pose(look: Look, state: np.ndarray) -> np.ndarray:
    """[A] the joints told to be where they are; a base is told nothing."""
    there: Mapping[str, float] = dict(zip(look.task.state_names, np.asarray(state).tolist(), strict=True))
    return np.array([there.get(name, 0.0) for name in look.task.action_names], np.float32)
