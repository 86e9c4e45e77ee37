"""Closed loop: a policy drives a robot in any gymnasium environment, episode by episode.

    environment = Environment("kuavo_sim:kuavo_sim/Weighing-v0", "weighing", {"image_size": 64})
    rollouts = roll_out(policy, environment, evaluation_seeds(50))
    rollouts.successes, rollouts.trials

The policy is what a robot process would hold (`SmolVLAPolicyWrapper`): the same processors, the same queues, and its
memory reset where an episode begins. It is asked for several robots at once. An episode is a function of the
checkpoint, the environment and its seed, wherever in the batch it is played, up to the rounding of batched arithmetic.

Environments observe `{"pixels": {camera: [H, W, 3] uint8}, "agent_pos": [S]}`, LeRobot's convention, and tell success
as `info["is_success"]`. What else kuavo_sim tells is taken where it is there: sub-goals, progress, cue, choice.
"""

import io
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from lerobot.utils.constants import OBS_IMAGES, OBS_STATE
from PIL import Image
from tqdm import tqdm

from kuavo_sim import ENVIRONMENT_IDS, EVALUATION_SEED_START
from kuavo_train.config import RolloutConfig, SimulationConfig, StageConfig
from kuavo_train.errors import ConfigError, one_of
from kuavo_train.evaluation.robots import STEP_TIMEOUT, Act, Begin, Environment, Failure, Robots, Seen

SEEDS_PER_EVALUATION = 10_000


def evaluation_seeds(episodes: int, *, seed: int = 0) -> list[int]:
    """Seeds disjoint from all demonstrations', and from those of another evaluation's `seed`.

    Raises:
        ValueError: more episodes than one evaluation has seeds.
    """
    if not 1 <= episodes <= SEEDS_PER_EVALUATION:
        raise ValueError(f"episodes must be in [1, {SEEDS_PER_EVALUATION}], got {episodes}")
    start = EVALUATION_SEED_START + SEEDS_PER_EVALUATION * seed
    return list(range(start, start + episodes))


def environment_of(
    stage: StageConfig, instruction: str, simulation: SimulationConfig | None, rollout: RolloutConfig
) -> Environment:
    """Where a task is rolled out: the environment it names, or kuavo_sim as its demonstrations were recorded.

    Args:
        instruction: what the policy is told there.

    Raises:
        ConfigError: there is none.
    """
    where = f"stage {stage.index} ({stage.name}):"
    limit = {"max_steps": rollout.max_steps}
    if stage.environment is not None:
        return Environment(stage.environment, instruction, stage.environment_settings, **limit)
    if simulation is None or stage.simulation_task is None:
        rule = "name one to roll out in, or rollout.episodes be 0 for those who have only data"
        raise ConfigError(f"{where} environment must {rule}, got {stage.environment!r}")
    one_of(f"{where} simulation_task", stage.simulation_task, ENVIRONMENT_IDS)
    keep = ("image_size", "renderer", "phase_visible")
    settings = {key: getattr(simulation, key) for key in keep}
    return Environment(f"kuavo_sim:{ENVIRONMENT_IDS[stage.simulation_task]}", instruction, settings, **limit)


class Policy(Protocol):
    """What is rolled out; see `SmolVLAPolicyWrapper`."""

    @property
    def n_action_steps(self) -> int: ...
    def reset(self, indices: Sequence[int] | None = None, *, seeds: Sequence[int] | None = None) -> None: ...
    def select_action(self, observation: Mapping[str, Any]) -> Any: ...
    def memory_norms(self) -> np.ndarray | None: ...


@dataclass(frozen=True)
class Trace:
    """One episode, step by step, for those who want to see it.

    Attributes:
        pictures: T of camera → a JPEG of what the policy saw; whole, the pictures of some episodes fill a memory.
        memory_norms: T of [tokens]; empty without memory.
    """

    pictures: list[dict[str, bytes]] = field(default_factory=list)
    memory_norms: list[np.ndarray] = field(default_factory=list)


@dataclass(frozen=True)
class Episode:
    """How an episode went. With an `error` it was not played to its end, and is no trial.

    Attributes:
        progress: share of the sub-goals reached, in [0, 1]; where the environment tells none, 1 for success.
        reward: the sum over its steps.
        subgoals: sub-goal → the step that reached it, None where none did.
        cue, choice: what was demanded, what the policy acted on; None where there is no such thing.
        chosen_at: the step in which it acted on it.
        roughness: mean absolute second difference of the joint commands, in rad per step².
    """

    seed: int
    success: bool
    progress: float
    reward: float
    steps: int
    subgoals: dict[str, int | None]
    cue: int | None
    choice: int | None
    roughness: float
    chosen_at: int | None = None
    error: str | None = None
    trace: Trace | None = field(default=None, repr=False, compare=False)

    @property
    def right_branch(self) -> bool | None:
        """Whether it acted on the right cue; None where it never came to act on one."""
        return None if self.choice is None else self.choice == self.cue

    def record(self) -> dict[str, Any]:
        """For JSON."""
        known = {key: value for key, value in vars(self).items() if key != "trace"}
        return {**known, "right_branch": self.right_branch}


@dataclass(frozen=True)
class Rollouts:
    """The episodes of a task, in the order of their seeds."""

    environment: Environment
    n_action_steps: int
    episodes: tuple[Episode, ...]

    def without_traces(self) -> "Rollouts":
        return replace(self, episodes=tuple(replace(episode, trace=None) for episode in self.episodes))

    @property
    def played(self) -> list[Episode]:
        return [episode for episode in self.episodes if episode.error is None]

    @property
    def failures(self) -> list[Episode]:
        """Episodes whose environment failed."""
        return [episode for episode in self.episodes if episode.error is not None]

    @property
    def trials(self) -> int:
        return len(self.played)

    @property
    def successes(self) -> int:
        return sum(episode.success for episode in self.played)

    @property
    def progress(self) -> float | None:
        """Mean share of the sub-goals reached."""
        return float(np.mean([episode.progress for episode in self.played])) if self.played else None

    @property
    def funnel(self) -> dict[str, int]:
        """Sub-goal → how many episodes reached it, in the order in which they are to be reached."""
        names = dict.fromkeys(name for episode in self.played for name in episode.subgoals)
        return {name: sum(episode.subgoals.get(name) is not None for episode in self.played) for name in names}

    @property
    def branches(self) -> tuple[int, int]:
        """(right, acted on): episodes that acted on the right cue, out of those that acted on one."""
        acted = [episode.right_branch for episode in self.played if episode.right_branch is not None]
        return sum(acted), len(acted)

    @property
    def summary(self) -> str:
        """In a line, for the terminal."""
        right, acted = self.branches
        parts = [f"{self.successes} of {self.trials} episodes succeeded"]
        parts += [", ".join(f"{name} {count}" for name, count in self.funnel.items())] if self.funnel else []
        parts += [f"right branch {right} of {acted}"] if acted else []
        if self.failures:
            parts.append(f"{len(self.failures)} environments failed: {self.failures[0].error}")
        return "; ".join(parts)

    @classmethod
    def joined(cls, parts: Sequence["Rollouts"]) -> "Rollouts":
        """Those of several processes, of one environment."""
        episodes = sorted((episode for part in parts for episode in part.episodes), key=lambda episode: episode.seed)
        return cls(parts[0].environment, parts[0].n_action_steps, tuple(episodes))

    def cells(self) -> dict[str, Any]:
        """For a line of validation.jsonl, and so for the matrices; nothing when no episode could be played."""
        if not self.trials:
            return {}
        right, acted = self.branches
        return {
            "success": {"successes": self.successes, "trials": self.trials},
            "progress": self.progress,
            "funnel": self.funnel,
            "branches": {"right": right, "acted": acted},
            "n_action_steps": self.n_action_steps,
        }

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "environment": asdict(self.environment),
            "n_action_steps": self.n_action_steps,
            "successes": self.successes,
            "trials": self.trials,
            "progress": self.progress,
            "episodes": [episode.record() for episode in self.episodes],
        }


def roll_out(
    policy: Policy,
    environment: Environment,
    seeds: Sequence[int],
    *,
    parallel: int = 8,
    workers: int | None = None,
    traces: bool = False,
    progress: bool = True,
    timeout: float = STEP_TIMEOUT,
) -> Rollouts:
    """Let `policy` play an episode for every seed.

    Args:
        parallel: robots at a time, the batch of the policy.
        workers: processes that their environments are spread over; None for one per CPU.
        traces: keep what was seen and remembered, of all episodes.
        timeout: seconds after which an environment that does not answer has failed.

    An episode whose environment fails is reported with the reason; the others go on. What the policy raises is raised.
    """
    places = range(min(parallel, len(seeds)))
    waiting, playing, ended = deque(seeds), dict[int, _Game](), dict[int, Episode]()
    policy.reset(seeds=[0 for _ in places])
    bar = tqdm(total=len(seeds), desc=f"rolling out {environment.name}", unit="episode", disable=not progress)
    with Robots(environment, places=len(places), workers=workers, timeout=timeout) as robots, bar:

        def carry_out(orders: Mapping[int, Begin | Act]) -> None:
            for place, answer in robots.advance(orders).items():
                playing[place].take(answer)
                if playing[place].over:
                    game = playing.pop(place)
                    ended[game.seed] = game.episode()
                    bar.set_postfix_str(
                        f"{sum(episode.success for episode in ended.values())} succeeded", refresh=False
                    )
                    bar.update()

        while waiting or playing:
            begun = {place: waiting.popleft() for place in places if place not in playing and waiting}
            playing |= {place: _Game(seed, environment.max_steps, traced=traces) for place, seed in begun.items()}
            policy.reset(list(begun), seeds=list(begun.values()))
            carry_out({place: Begin(seed) for place, seed in begun.items()})
            if not playing:
                continue
            anyone = next(iter(playing.values()))  # the batch keeps its size: what idle places see does not matter
            observation = observation_of([playing.get(place, anyone).seen for place in places], environment.task)
            actions, norms = policy.select_action(observation), policy.memory_norms() if traces else None
            for place, game in playing.items():
                game.note(actions[place], None if norms is None else norms[place])
            carry_out({place: Act(actions[place]) for place in playing})
    return Rollouts(environment, policy.n_action_steps, tuple(ended[seed] for seed in seeds))


class _Game:
    """An episode being played."""

    def __init__(self, seed: int, max_steps: int | None, *, traced: bool):
        self.seed, self._max_steps = seed, max_steps
        self._trace = Trace() if traced else None
        self._actions: list[np.ndarray] = []
        self._rewards: list[float] = []
        self._subgoals: dict[str, int | None] = {}
        self._chosen_at: int | None = None
        self._seen: Seen | None = None
        self._error: str | None = None

    @property
    def seen(self) -> Seen:
        assert self._seen is not None, "it has begun"
        return self._seen

    @property
    def over(self) -> bool:
        timed_out = self._max_steps is not None and len(self._rewards) >= self._max_steps
        return self._error is not None or self.seen.ended or timed_out

    def note(self, action: np.ndarray, memory_norms: np.ndarray | None) -> None:
        """What the policy does next."""
        self._actions.append(action)
        if self._trace is not None:
            self._trace.pictures.append({camera: _jpeg(picture) for camera, picture in self.seen.pictures.items()})
            if memory_norms is not None:
                self._trace.memory_norms.append(memory_norms)

    def take(self, answer: Seen | Failure) -> None:
        """What comes of it; first, what the episode begins with."""
        if isinstance(answer, Failure):
            self._error = answer.reason
            return
        if self._seen is not None:
            self._rewards.append(answer.reward)
        self._seen = answer
        if self._chosen_at is None and answer.info.get("choice") is not None:
            self._chosen_at = len(self._rewards)
        for name, reached in answer.info.get("subgoals", {}).items():
            if self._subgoals.get(name) is None:
                self._subgoals[name] = len(self._rewards) if reached else None

    def episode(self) -> Episode:
        info = {} if self._seen is None else self._seen.info
        success = bool(info.get("is_success", False))
        return Episode(
            seed=self.seed,
            success=success,
            progress=float(info.get("progress", success)),
            reward=sum(self._rewards),
            steps=len(self._rewards),
            subgoals=self._subgoals,
            cue=info.get("cue"),
            choice=info.get("choice"),
            roughness=_roughness(self._actions),
            chosen_at=self._chosen_at,
            error=self._error,
            trace=self._trace,
        )


def _jpeg(picture: np.ndarray) -> bytes:
    """[H, W, 3] uint8, hardly changed: for eyes, not for policies."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "jpeg", quality=95, subsampling=0)
    return file.getvalue()


def _roughness(actions: Sequence[np.ndarray]) -> float:
    """T of [A] → mean of |a(t+1) − 2 a(t) + a(t−1)|; 0 for fewer than three actions."""
    return float(np.abs(np.diff(np.stack(actions), 2, axis=0)).mean()) if len(actions) > 2 else 0.0


def observation_of(seen: Sequence[Seen], task: str) -> dict[str, Any]:
    """What the policy is shown, of B robots: each camera [B, H, W, 3], the state [B, S], and the task of all."""
    cameras = {
        f"{OBS_IMAGES}.{camera}": np.stack([each.pictures[camera] for each in seen]) for camera in seen[0].pictures
    }
    return {**cameras, OBS_STATE: np.stack([each.state for each in seen]), "task": task}
