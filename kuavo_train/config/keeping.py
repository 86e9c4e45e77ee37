"""How earlier tasks are kept: what is replayed, the gate on forgetting, and the strategies' own settings."""

from dataclasses import dataclass, fields

from kuavo_train.errors import ConfigError, one_of, require
from kuavo_train.metrics.verdict import RetentionLimits


@dataclass(frozen=True)
class ReplayConfig:
    """How much of an earlier task's training data is kept for replay, and which part of it."""

    buffer: float | None = None  # share of its training episodes that is kept; null or 1: all
    unit: str = "episode"  # what is kept: episode (whole ones), frame (single ones; the share is of frames then)
    select: str = "random"  # which are kept: random, phase (balanced over phases of the job), loss (known least)
    share: float | None = None  # of a stage's samples, all earlier tasks alike; None: the shares in the tasks' files

    def __post_init__(self) -> None:
        share = self.share
        require(share is None or 0 < share < 1, "replay.share", "be a share in (0, 1), or null", share)
        buffer = self.buffer
        require(buffer is None or 0 < buffer <= 1, "replay.buffer", "be a share in (0, 1], or null", buffer)
        one_of("replay.unit", self.unit, ("episode", "frame"))
        one_of("replay.select", self.select, ("random", "phase", "loss"))
        rule = "be random or phase with replay.unit=frame, since losses are of episodes"
        require(self.unit == "episode" or self.select != "loss", "replay.select", rule, self.select)

    @property
    def keeps_part(self) -> bool:
        """Whether anything is left out."""
        return self.buffer is not None and self.buffer < 1


@dataclass(frozen=True)
class ForgettingConfig(RetentionLimits):
    """Limits of the verdict, and the gate; change is relative to the held-out loss when the task was learnt."""

    budget: float | None = None  # change an earlier task may show for certain, at any validation; None: no gate
    on_exceed: str = "warn"  # what then: warn, stop (the stage), raise_replay (of that task)
    raise_factor: float = 2.0  # by which a raise multiplies the task's share
    raise_limit: float = 0.4  # share beyond which no task's is raised
    new_task_floor: float = 0.3  # share that the task being learnt keeps

    @property
    def limits(self) -> RetentionLimits:
        """Those of the verdict, alone."""
        return RetentionLimits(**{each.name: getattr(self, each.name) for each in fields(RetentionLimits)})

    def __post_init__(self) -> None:
        try:
            super().__post_init__()
        except ValueError as error:
            raise ConfigError(f"forgetting.{error}") from error
        if self.budget is not None:
            require(self.budget >= 0, "forgetting.budget", "not be negative", self.budget)
        one_of("forgetting.on_exceed", self.on_exceed, ("warn", "stop", "raise_replay"))
        require(self.raise_factor > 1, "forgetting.raise_factor", "be more than 1", self.raise_factor)
        for name in ("raise_limit", "new_task_floor"):
            require(0 < getattr(self, name) < 1, f"forgetting.{name}", "be in (0, 1)", getattr(self, name))


@dataclass(frozen=True)
class EwcConfig:
    """Elastic weight consolidation: a penalty on changes of the weights that earlier tasks depend on."""

    strength: float  # λ
    batches: int  # training batches of a finished stage that the Fisher information is estimated on

    def __post_init__(self) -> None:
        require(self.strength >= 0, "ewc.strength", "not be negative", self.strength)
        require(self.batches >= 1, "ewc.batches", "be at least 1", self.batches)


@dataclass(frozen=True)
class DistillConfig:
    """The policy of before a stage as its teacher: a loss on velocities that differ from the teacher's."""

    weight: float  # of that loss; the tasks' own has 1

    def __post_init__(self) -> None:
        require(self.weight >= 0, "distill.weight", "not be negative", self.weight)


@dataclass(frozen=True)
class MergeConfig:
    """After a stage, weights between its first and its last: (1 − alpha) × old + alpha × new."""

    alphas: list[float]  # those tried; kept is the one of least loss, over all tasks seen
    per_module: bool = True  # an alpha each for expert, projections and memory; false: one for all
    episodes: int | None = None  # a task, set apart from training to choose alphas on; null: as many as are held out

    def __post_init__(self) -> None:
        valid = bool(self.alphas) and all(0 <= alpha <= 1 for alpha in self.alphas)
        require(valid, "merge.alphas", "be one or more numbers in [0, 1]", self.alphas)
        valid = self.episodes is None or self.episodes >= 1
        require(valid, "merge.episodes", "be at least 1, or null", self.episodes)

    @property
    def chooses(self) -> bool:
        """Whether there is anything to choose."""
        return len(set(self.alphas)) > 1


@dataclass(frozen=True)
class AdaptersConfig:
    """A low-rank adapter for each task but the first, chosen by the instruction; all other weights stay."""

    rank: int = 16  # of the two matrices beside each layer of expert and projections
    start: str = "nearest"  # what one begins as: nearest (of the task with the most similar instructions), zero

    def __post_init__(self) -> None:
        require(self.rank >= 1, "adapters.rank", "be at least 1", self.rank)
        one_of("adapters.start", self.start, ("nearest", "zero"))
