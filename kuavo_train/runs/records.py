"""What the files of a run say, as objects: each is written in one place and read in one place, here.

What may be missing is missing here alone: files of earlier versions lack keys, an action error may not be defined, a
task may never have been performed in closed loop. Values are those of the file, unrounded.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Literal, Self

from kuavo_train.metrics.intervals import Interval
from kuavo_train.reading import Json

Kind = Literal["start", "epoch", "end"]
"""When a validation was made: before the first stage, after an epoch, at a stage's end."""

HeldOutMeasure = Literal["loss", "action_error"]
Measure = Literal["loss", "action_error", "success", "progress"]
MEASURES: dict[Measure, bool] = {"loss": False, "action_error": False, "success": True, "progress": True}
"""What performance is measured in, and whether higher is better."""
CLOSED_LOOP: tuple[Measure, ...] = ("success", "progress")
"""Those of episodes that the policy performed itself; the others are of held-out demonstrations."""


class _Record:
    """Read by field: keys that it does not know are left out; a field that the file lacks takes its default."""

    @classmethod
    def from_json(cls, content: Json) -> Self:
        names = [known.name for known in fields(cls)]  # type: ignore[arg-type]
        return cls(**{name: content[name] for name in names if content.get(name) is not None})


@dataclass(frozen=True)
class EpisodeScore(_Record):
    """A held-out episode: means over its queries. `frames` are those that were queried."""

    episode: int
    frames: int | None = None
    loss: float | None = None
    action_error: float | None = None


@dataclass(frozen=True)
class HeldOutScores:
    """What validation measures of a task, on its held-out episodes.

    Attributes:
        loss: the policy's own.
        action_error: mean absolute, normalized; by group in rad, m or claw openings, None where the task lacks it.
        constant_error: the action error of the best constant action.
        draws: (noise, time) pairs that each query's loss is the mean of.
        seconds: how long it took.
    """

    task: str
    loss: float
    action_error: float | None = None
    action_error_by_group: Mapping[str, float | None] = field(default_factory=dict)
    constant_error: float | None = None
    episodes: tuple[EpisodeScore, ...] = ()
    draws: int | None = None
    seconds: float | None = None

    def scores(self, measure: HeldOutMeasure) -> dict[int, float]:
        """Held-out episode → its score; those that have none are left out."""
        found = {each.episode: getattr(each, measure) for each in self.episodes}
        return {episode: score for episode, score in found.items() if score is not None}

    def to_json(self) -> Json:
        return {**asdict(self), "episodes": [asdict(each) for each in self.episodes]}

    @classmethod
    def from_json(cls, content: Json) -> "HeldOutScores":
        return cls(
            task=content["task"],
            loss=content["loss"],
            action_error=content.get("action_error"),
            action_error_by_group=content.get("action_error_by_group") or {},
            constant_error=content.get("constant_error"),
            episodes=tuple(EpisodeScore.from_json(each) for each in content.get("episodes") or ()),
            draws=content.get("draws"),
            seconds=content.get("seconds"),
        )


@dataclass(frozen=True)
class ClosedLoop:
    """A task performed by the policy: how many episodes succeeded, and how far all of them came.

    Attributes:
        progress: mean share of the sub-goals reached.
        funnel: sub-goal → episodes that reached it.
        right, acted: episodes that acted on the right cue, and on any.
    """

    successes: int
    trials: int
    progress: float | None = None
    funnel: Mapping[str, int] = field(default_factory=dict)
    right: int | None = None
    acted: int | None = None
    n_action_steps: int | None = None

    @property
    def success(self) -> float:
        return self.successes / self.trials

    def to_json(self) -> Json:
        return {
            "success": {"successes": self.successes, "trials": self.trials},
            "progress": self.progress,
            "funnel": dict(self.funnel),
            "branches": {"right": self.right, "acted": self.acted},
            "n_action_steps": self.n_action_steps,
        }

    @classmethod
    def from_json(cls, content: Json) -> "ClosedLoop | None":
        """None where no episode was performed."""
        success, branches = content.get("success"), content.get("branches") or {}
        if not success:
            return None
        return cls(
            successes=success["successes"],
            trials=success["trials"],
            progress=content.get("progress"),
            funnel=content.get("funnel") or {},
            right=branches.get("right"),
            acted=branches.get("acted"),
            n_action_steps=content.get("n_action_steps"),
        )


@dataclass(frozen=True)
class PlayedEpisode(_Record):
    """What a report takes of an episode in rollouts.jsonl. With an `error` the environment failed: it is no trial."""

    seed: int
    success: bool
    progress: float | None = None
    error: str | None = None


@dataclass(frozen=True)
class Moment(_Record):
    """When something was measured: in which stage, of which kind, after which epoch and optimizer step."""

    kind: Kind
    step: int
    stage: int | None = None
    stage_name: str | None = None
    epoch: int | None = None

    def to_json(self) -> Json:
        return {key: getattr(self, key) for key in ("stage", "stage_name", "kind", "epoch", "step")}


@dataclass(frozen=True)
class ValidationRecord:
    """A line of validation.jsonl: one task at one moment. `played` are its episodes in rollouts.jsonl."""

    moment: Moment
    seen: bool
    held_out: HeldOutScores
    closed_loop: ClosedLoop | None = None
    played: tuple[PlayedEpisode, ...] = ()

    @property
    def task(self) -> str:
        return self.held_out.task

    @property
    def loss(self) -> float:
        return self.held_out.loss

    @property
    def kind(self) -> Kind:
        return self.moment.kind

    @property
    def step(self) -> int:
        return self.moment.step

    def scores(self, measure: Measure) -> dict[int, float]:
        """Held-out episode → its loss or action error; in closed loop, seed of a layout → how the episode ended."""
        if measure == "loss" or measure == "action_error":
            return self.held_out.scores(measure)
        played = (episode for episode in self.played if episode.error is None)
        return {episode.seed: float(getattr(episode, measure)) for episode in played}

    def cell(self, measure: Measure) -> float | None:
        """Its value in the matrix of performance: the mean over episodes, every episode counting once."""
        if measure == "success":
            return None if self.closed_loop is None else self.closed_loop.success
        scores = self.scores(measure)
        if scores:
            return sum(scores.values()) / len(scores)
        return getattr(self.closed_loop if measure == "progress" else self.held_out, measure, None)

    def curves(self) -> dict[str, float]:
        """Its numbers, by the names of their curves."""
        values: dict[str, float | None] = {"loss": self.loss, "action_error": self.held_out.action_error}
        if self.closed_loop is not None:
            values |= {"progress": self.closed_loop.progress, "success": self.closed_loop.success}
        return {f"validation/{self.task}/{name}": value for name, value in values.items() if value is not None}

    def to_json(self) -> Json:
        closed_loop = {} if self.closed_loop is None else self.closed_loop.to_json()
        return {**self.moment.to_json(), "seen": self.seen, **self.held_out.to_json(), **closed_loop}

    @classmethod
    def from_json(cls, content: Json) -> "ValidationRecord":
        return cls(
            Moment.from_json(content),
            bool(content.get("seen")),
            HeldOutScores.from_json(content),
            ClosedLoop.from_json(content),
        )


def with_played(records: Iterable[ValidationRecord], rollouts: Iterable[Json]) -> list[ValidationRecord]:
    """The records, each with its episodes from the lines of rollouts.jsonl."""
    played = {
        (line["kind"], line["step"], line["task"]): tuple(PlayedEpisode.from_json(each) for each in line["episodes"])
        for line in rollouts
    }
    return [replace(record, played=played.get((record.kind, record.step, record.task), ())) for record in records]


@dataclass(frozen=True)
class GateReading:
    """An earlier task at one validation. `change` is relative: 0.1 = the loss is 10 % above that when learnt."""

    task: str
    change: Interval
    budget: float

    @property
    def exceeded(self) -> bool:
        return self.change.low is not None and self.change.low > self.budget


@dataclass(frozen=True)
class GateRecord:
    """A line of gate.jsonl: a reading, when it was made, and what followed where the budget was exceeded.

    Attributes:
        shares: task → share of the samples from then on, where they were changed.
    """

    reading: GateReading
    step: int
    epoch: int | None = None
    stage: int | None = None
    action: str | None = None
    shares: Mapping[str, float] | None = None

    def to_json(self) -> Json:
        reading, change = self.reading, asdict(self.reading.change)
        return {
            "stage": self.stage,
            "epoch": self.epoch,
            "step": self.step,
            "task": reading.task,
            "change": change,
            "budget": reading.budget,
            "exceeded": reading.exceeded,
            "action": self.action,
            **({"shares": self.shares} if reading.exceeded else {}),
        }

    @classmethod
    def from_json(cls, content: Json) -> "GateRecord":
        reading = GateReading(content["task"], Interval(**content["change"]), content["budget"])
        return cls(
            reading, content["step"], **{key: content.get(key) for key in ("epoch", "stage", "action", "shares")}
        )


@dataclass(frozen=True)
class TrainingRecord(_Record):
    """What a report takes of a line of metrics.jsonl: means over the steps since the line before.

    `loss` is without `penalty`, what elastic weight consolidation adds, and without `distillation`, the distance from
    a teacher's velocities.
    """

    step: int
    epoch: float | None = None
    loss: float | None = None
    penalty: float | None = None
    distillation: float | None = None
    lr: float | None = None
    grad_norm: float | None = None
    samples_per_s: float | None = None


@dataclass(frozen=True)
class Best(_Record):
    """The checkpoint with the least mean held-out loss."""

    step: int | None = None
    loss: float | None = None


@dataclass(frozen=True)
class StageRecord(_Record):
    """stage.json: how far a stage came, and what it ended in. `checkpoint` is below the stage's folder."""

    status: str
    steps: int | None = None
    epochs: int | None = None
    seconds: float | None = None
    result: str | None = None
    best: Best = Best()
    checkpoint: str | None = None
    checkpoint_hash: str | None = None
    stopped: str | None = None

    @classmethod
    def from_json(cls, content: Json) -> "StageRecord":
        return replace(super().from_json(content), best=Best.from_json(content.get("best") or {}))


@dataclass(frozen=True)
class Drawn(_Record):
    """Samples of a task that a stage was trained on, and their share of all."""

    frames: int = 0
    share: float | None = None


@dataclass(frozen=True)
class ReplayAudit(_Record):
    """replay_audit.json: the shares that were declared, and what was really drawn."""

    drawn: Mapping[str, Drawn]
    declared: Mapping[str, float] = field(default_factory=dict)
    total_frames: int | None = None
    held_out_frames_drawn: int | None = None
    dealt_together: int = 1  # frames: counts are exact to so many
    passes: Mapping[str, float] = field(default_factory=dict)
    kept: Mapping[str, Json] = field(default_factory=dict)  # task → what of it was kept, of how much; without: all
    frames_drawn_not_kept: int | None = None

    @classmethod
    def from_json(cls, content: Json) -> "ReplayAudit":
        drawn = {task: Drawn.from_json(each) for task, each in content["drawn"].items()}
        return replace(super().from_json(content), drawn=drawn)


@dataclass(frozen=True)
class GroupRecord(_Record):
    """A group of parameters.json; fingerprints from before the stage and after it."""

    group: str
    parameters: int
    trainable: bool
    fingerprint_before: str | None = None
    fingerprint_after: str | None = None
    changed: bool = False

    @property
    def has_changed(self) -> bool:
        """From the fingerprints themselves where both are there, not from what the run says about them."""
        before, after = self.fingerprint_before, self.fingerprint_after
        return self.changed if before is None or after is None else before != after


@dataclass(frozen=True)
class DatasetRecord(_Record):
    """The data of a task in run.json. `origin`: where on the hub it is from; the file says `from`."""

    root: str | None = None
    origin: Json | None = None
    hash: str | None = None
    episodes: int | None = None
    frames: int | None = None
    train_episodes: tuple[int, ...] = ()
    held_out_episodes: tuple[int, ...] = ()
    choosing_episodes: tuple[int, ...] = ()
    validated_episodes: tuple[int, ...] = ()

    @property
    def validated(self) -> tuple[int, ...]:
        """The held-out episodes that losses are of: all, unless some were chosen."""
        return self.validated_episodes or self.held_out_episodes

    def to_json(self) -> Json:
        return {"from" if key == "origin" else key: value for key, value in asdict(self).items()}

    @classmethod
    def from_json(cls, content: Json) -> "DatasetRecord":
        return replace(
            super().from_json(content),
            origin=content.get("from"),
            train_episodes=tuple(content.get("train_episodes") or ()),
            held_out_episodes=tuple(content.get("held_out_episodes") or ()),
            choosing_episodes=tuple(content.get("choosing_episodes") or ()),
            validated_episodes=tuple(content.get("validated_episodes") or ()),
        )


@dataclass(frozen=True)
class TaskRecord(_Record):
    """A task in run.json. `recipe`: the fields of its `StageConfig`; None where an earlier version wrote the run."""

    name: str
    index: int
    instruction: str | None = None
    instructions: tuple[str, ...] = ()
    instructions_of_dataset: bool | None = None
    loss_target: float | None = None
    final_loss_limit: float | None = None
    recipe: Json | None = None
    dataset: DatasetRecord = DatasetRecord()

    def to_json(self) -> Json:
        return {**asdict(self), "instructions": list(self.instructions), "dataset": self.dataset.to_json()}

    @classmethod
    def from_json(cls, content: Json) -> "TaskRecord":
        return replace(
            super().from_json(content),
            instructions=tuple(content.get("instructions") or ()),
            dataset=DatasetRecord.from_json(content.get("dataset") or {}),
        )


@dataclass(frozen=True)
class StatisticsRecord(_Record):
    """The normalization in run.json: what its statistics are from, and their hash."""

    source: str = "unknown"
    hash: str | None = None


@dataclass(frozen=True, kw_only=True)
class RunRecord(_Record):
    """run.json. `tasks` are in the order of learning; `axes` what a study varied beside strategy and seed."""

    run: str
    seed: int | None = None
    profile: str | None = None
    strategy: str | None = None
    strategy_settings: Json = field(default_factory=dict)
    axes: Mapping[str, str] = field(default_factory=dict)
    config_hash: str | None = None
    tasks: tuple[TaskRecord, ...]
    normalization: StatisticsRecord = StatisticsRecord()
    created: str | None = None
    git_commit: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> Json:
        return {**asdict(self), "tasks": [task.to_json() for task in self.tasks]}

    @classmethod
    def from_json(cls, content: Json) -> "RunRecord":
        tasks = sorted((TaskRecord.from_json(each) for each in content["tasks"]), key=lambda task: task.index)
        normalization = StatisticsRecord.from_json(content.get("normalization") or {})
        return replace(super().from_json(content), tasks=tuple(tasks), normalization=normalization)
