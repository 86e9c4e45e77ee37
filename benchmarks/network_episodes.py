"""Episodes over the network and in process, and what the two have in common: see serving_episodes."""

import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from tqdm import tqdm

from benchmarks.measuring import as_markdown, circumstances
from benchmarks.robot_process import read, write
from benchmarks.robot_python import CLIENT_NEEDS, can_import, environment, interpreters, version_of
from benchmarks.server_process import PATIENCE, served
from benchmarks.serving_episodes import Options
from kuavo_client import pack, unpack
from kuavo_train.errors import RunError, require
from kuavo_train.evaluation.checkpoints import Contestant
from kuavo_train.evaluation.delayed import Delayed
from kuavo_train.evaluation.environment import Environment, evaluation_seeds
from kuavo_train.evaluation.environment_pool import Seen, seen_in
from kuavo_train.evaluation.options import Options as EvaluateOptions
from kuavo_train.evaluation.robot_policy import Policy
from kuavo_train.evaluation.rollout import observation_of, roll_out
from kuavo_train.metrics.intervals import wilson
from kuavo_train.runs.files import now, write_json
from kuavo_train.wrapper.policy.robot_io import Actions, Observation

REPOSITORY = Path(__file__).resolve().parents[1]
LOOP = "loop"  # kuavo_client's own, which waits


@dataclass(frozen=True)
class Played:
    """An episode: what the robot was told, T of [A], and whether the job was done."""

    actions: list[np.ndarray]
    success: bool


@dataclass
class Row:
    """Of one job and one way to hand over.

    Attributes:
        ticks: in the episodes in process.
        equal: of these, ticks whose actions are the same to the bit over the network.
        apart: greatest difference of an action until an episode first differs, and in that tick; in robot units.
        served, in_process: seeds of the layouts that were done.
    """

    task: str
    handover: str
    delay_ms: float
    layouts: int = 0
    ticks: int = 0
    equal: int = 0
    equal_episodes: int = 0
    apart: float = 0.0
    served: list[int] = field(default_factory=list)
    in_process: list[int] = field(default_factory=list)

    def add(self, seed: int, served: Played, in_process: Played) -> None:
        same = [np.array_equal(*each) for each in zip(served.actions, in_process.actions, strict=False)]
        whole = all(same) and len(served.actions) == len(in_process.actions)
        self.layouts += 1
        self.ticks += len(in_process.actions)
        self.equal += sum(same)
        self.equal_episodes += whole
        if False in same:
            first = same.index(False)
            self.apart = max(self.apart, float(np.abs(served.actions[first] - in_process.actions[first]).max()))
        self.served += [seed] if served.success else []
        self.in_process += [seed] if in_process.success else []

    def shown(self) -> dict[str, Any]:
        between = wilson(len(self.served), self.layouts)
        return {
            "job": self.task,
            "hand-over": self.handover,
            "delay": f"{self.delay_ms:g} ms",
            "episodes equal to the bit": f"{self.equal_episodes} of {self.layouts}",
            "ticks equal": f"{self.equal} of {self.ticks}",
            "first difference": f"{self.apart:.1e}" if self.apart else "none",
            "success in process": f"{len(self.in_process)}/{self.layouts}",
            "success over the network": f"{len(self.served)}/{self.layouts} ({between.low:.0%} to {between.high:.0%})",
        }


class Recorded:
    """A policy that drives one robot at a time, and what it was told to do in each episode, by seed."""

    def __init__(self, policy: Policy):
        self._policy = policy
        self.actions: dict[int, list[np.ndarray]] = {}
        self._episode: list[np.ndarray] = []

    @property
    def n_action_steps(self) -> int:
        return self._policy.n_action_steps

    def reset(self, indices: Sequence[int] | None = None, *, seeds: Sequence[int] | None = None) -> None:
        self._policy.reset(indices, seeds=seeds)
        if indices and seeds:
            self._episode = self.actions.setdefault(seeds[0], [])

    def due(self) -> Sequence[int]:
        return self._policy.due()

    def memory_norms(self) -> np.ndarray | None:
        return self._policy.memory_norms()

    def select_action(self, observation: Observation) -> Actions:
        actions = self._policy.select_action(observation)
        self._episode.append(actions[0])
        return actions


def in_process(policy: Policy, place: Environment, seeds: Sequence[int]) -> dict[int, Played]:
    """Raises `RunError`: an environment failed."""
    recorded = Recorded(policy)
    rollouts = roll_out(recorded, place, seeds, parallel=1, workers=1, progress=False)
    if rollouts.failures:
        raise RunError(rollouts.summary)
    return {each.seed: Played(recorded.actions[each.seed], each.success) for each in rollouts.episodes}


def over_the_network(
    python: str | Path, how: str, address: str, place: Environment, world: gymnasium.Env, seed: int, delay: int = 0
) -> Played:
    """An episode of the robot's process.

    Args:
        how: what robot_process.py calls it.
        delay: ticks from a look to its answer, with a hand-over.

    Raises:
        RunError: the process ended before the episode did.
    """
    seen = seen_in(*world.reset(seed=seed))
    task = observation_of([seen], place.task)["task"]
    file = REPOSITORY / "benchmarks" / "robot_process.py"
    command = [python, file, how, address, task if isinstance(task, str) else task[0], str(seed), str(delay)]
    environ = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    actions: list[np.ndarray] = []
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environ) as robot:
        assert robot.stdin is not None
        assert robot.stdout is not None
        ended = False
        while not ended:
            try:
                said = unpack(read(robot.stdout))
            except EOFError as error:
                raise RunError(f"the robot's process ended after {len(actions)} ticks: {how}, seed {seed}") from error
            if "observe" in said:
                write(robot.stdin, pack(_shown(seen)))
                continue
            actions.append(said["act"])
            observation, reward, terminated, truncated, info = world.step(said["act"])
            seen = seen_in(observation, info, reward=float(reward), ended=bool(terminated or truncated))
            ended = seen.ended or len(actions) == place.max_steps
            write(robot.stdin, pack({"ended": ended}))
        if robot.wait(PATIENCE) != 0:
            raise RunError(f"the robot's process failed at its end: {how}, seed {seed}")
    return Played(actions, bool(seen.info.get("is_success", False)))


def _shown(seen: Seen) -> dict[str, np.ndarray]:
    pictures = {f"observation.images.{camera}": picture for camera, picture in seen.pictures.items()}
    return {**pictures, "observation.state": seen.state}


@contextmanager
def robot_python(given: str | None) -> Iterator[tuple[str | Path, str]]:
    """An interpreter that has what kuavo_client needs, and its version."""
    python = given or interpreters()[0]
    version = version_of(python)
    if can_import(python, CLIENT_NEEDS):
        yield python, version
        return
    with tempfile.TemporaryDirectory() as folder:
        yield environment(python, Path(folder) / "env", *CLIENT_NEEDS), version


def compare(options: Options) -> int:
    """Plays, writes the JSON and prints the table; the exit status.

    Raises:
        ConfigError, RunError: what is not there, or fails.
    """
    contestant = Contestant.open("served", str(options.checkpoint))
    asked = EvaluateOptions(
        {"served": str(contestant.folder)}, seed=options.seed, device=options.device, max_steps=options.max_steps
    )
    policy, seeds = contestant.policy(asked), evaluation_seeds(options.n_episodes, seed=options.seed)
    for kind in options.handover:
        require(kind != "rtc" or policy.hands_over, "handover", f"be wait or blend for {policy.policy_type}", kind)
    ticks = math.ceil(options.delay_ms * policy.known.fps / 1000)
    ways = [*([LOOP] if options.standing else []), *options.handover]
    tasks = options.tasks or tuple(task.name for task in policy.known.tasks)
    places = {task: contestant.environment(task, asked) for task in tasks}
    one_at_a_time = ("batch=1", f"seed={options.seed}", f"device={options.device}")
    rows: list[Row] = []
    with (
        robot_python(options.robot_python) as (python, version),
        served(f"checkpoint={contestant.folder}", *one_at_a_time) as server,
        tqdm(total=2 * len(tasks) * len(ways) * len(seeds), unit="episode") as bar,
    ):
        for task, place in places.items():
            world = place.make()
            for way in ways:
                bar.set_description(f"{task}, {way}")
                expected = in_process(policy if way == LOOP else Delayed(policy, way, ticks), place, seeds)
                bar.update(len(seeds))
                rows.append(Row(task, *(("wait", 0.0) if way == LOOP else (way, options.delay_ms))))
                for seed in seeds:
                    acted = over_the_network(python, way, server.address, place, world, seed, ticks)
                    rows[-1].add(seed, acted, expected[seed])
                    bar.update()
                _store(options, version, seeds, rows)
            world.close()
    print(as_markdown([row.shown() for row in rows]))
    print(f"robot: Python {version}; server and world: Python {sys.version.split()[0]}; {options.output}")
    return 0


def _store(options: Options, version: str, seeds: Sequence[int], rows: Sequence[Row]) -> None:
    """After every part, so that one that is cut off leaves what it has found."""
    about = {
        **circumstances(),
        "command": " ".join(["python -m benchmarks.serving_episodes", *sys.argv[1:]]),
        "created": now(),
        "robot_python": version,
        "seeds": [seeds[0], seeds[-1]],
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.output, {**about, "rows": [asdict(row) for row in rows]})
