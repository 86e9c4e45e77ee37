"""How episodes in closed loop went."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np

from kuavo_train.evaluation.environment import Environment
from kuavo_train.evaluation.smoothness import Smoothness
from kuavo_train.reading import Json
from kuavo_train.runs.records import ClosedLoop


@dataclass(frozen=True)
class Trace:
    """One episode, step by step, for those who want to see it or play it again.

    Attributes:
        pictures: T of camera → a JPEG of what the policy saw; whole, the pictures of some episodes fill a memory. Empty
            where only what is needed to play it again was kept.
        memory_norms: T of [tokens]; empty without memory.
        actions: T of [A], as they were carried out.
        instruction: the environment's own words for this episode; None where it has none.
    """

    pictures: list[dict[str, bytes]] = field(default_factory=list)
    memory_norms: list[np.ndarray] = field(default_factory=list)
    actions: list[np.ndarray] = field(default_factory=list)
    instruction: str | None = None


@dataclass(frozen=True)
class Episode:
    """How an episode went. With an `error` it was not played to its end, and is no trial.

    Attributes:
        progress: share of the sub-goals reached, in [0, 1]; where the environment reports none, 1 for success.
        reward: the sum over its steps.
        subgoals: sub-goal → the step that reached it, None where none did.
        cue, choice: what was demanded, what the policy acted on; None where there is no such thing.
        chosen_at: the step in which it acted on it.
        smoothness: arms, claws and base, each apart; empty where it was not measured.
        held: steps in which no action was there, and the pose was held.
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
    smoothness: dict[str, Smoothness] = field(default_factory=dict)
    held: int = 0
    chosen_at: int | None = None
    error: str | None = None
    trace: Trace | None = field(default=None, repr=False, compare=False)

    @property
    def right_branch(self) -> bool | None:
        """Whether it acted on the right cue; None where it never came to act on one."""
        return None if self.choice is None else self.choice == self.cue

    def to_json(self) -> Json:
        known = {key: value for key, value in vars(self).items() if key != "trace"}
        known["smoothness"] = {group: asdict(each) for group, each in self.smoothness.items()}
        return {**known, "right_branch": self.right_branch}


def picked(episodes: Sequence[Episode], count: int) -> list[tuple[str, Episode]]:
    """(rank, episode) of `count` episodes, evenly spread from the best to the worst; a single one is the typical.

    Better is success, then more progress, then fewer steps.
    """
    ranked = sorted(episodes, key=lambda episode: (not episode.success, -episode.progress, episode.steps))
    last = len(ranked) - 1
    if last < 0 or count < 1:
        return []
    places = [last // 2] if count == 1 else sorted({last * number // (count - 1) for number in range(count)})
    names = {last // 2: "typical", last: "worst", 0: "best"}
    return [(names.get(place, f"rank {place + 1}"), ranked[place]) for place in places]


def best_and_typical(episodes: Sequence[Episode]) -> list[tuple[str, Episode]]:
    """(rank, episode) of the best one, and of the one in the middle of the order of `picked`; of fewer than three, the
    best alone.
    """
    return [(rank, episode) for rank, episode in picked(episodes, 3) if rank in ("best", "typical")]


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

    def closed_loop(self) -> ClosedLoop | None:
        """In total; None when no episode could be played."""
        if not self.trials:
            return None
        right, acted = self.branches
        return ClosedLoop(self.successes, self.trials, self.progress, self.funnel, right, acted, self.n_action_steps)

    def to_json(self) -> Json:
        """As in rollouts.jsonl, which `PlayedEpisode` reads."""
        return {
            "environment": asdict(self.environment),
            "n_action_steps": self.n_action_steps,
            "successes": self.successes,
            "trials": self.trials,
            "progress": self.progress,
            "episodes": [episode.to_json() for episode in self.episodes],
        }
