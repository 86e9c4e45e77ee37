"""The gate: whether an earlier task has lost more than its budget since it was learnt, and what follows.

A task is over the budget when the data show it: when the lower end of the interval of its held-out loss's relative
change (paired bootstrap over episodes) lies above it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kuavo_train.config import ForgettingConfig
from kuavo_train.data.mixture import mixture_of
from kuavo_train.data.replay import raised_shares
from kuavo_train.errors import ConfigError
from kuavo_train.metrics.intervals import Interval, Scores, paired_bootstrap
from kuavo_train.metrics.number_format import percent, whole_percent
from kuavo_train.runs.records import ValidationRecord
from kuavo_train.runs.run_folder import StageFolder
from kuavo_train.strategies.strategy import Action, StageView, Strategy


@dataclass(frozen=True)
class Reading:
    """One task at one validation. `change` is relative: 0.1 = the loss is 10 % above that when learnt."""

    task: str
    change: Interval
    budget: float

    @property
    def exceeded(self) -> bool:
        return self.change.low is not None and self.change.low > self.budget

    def record(self) -> dict[str, Any]:
        """As it stands in gate.jsonl."""
        return {"task": self.task, "change": asdict(self.change), "budget": self.budget, "exceeded": self.exceeded}

    def __str__(self) -> str:
        low = "" if self.change.low is None else f" (at least {percent(self.change.low)})"
        return f"{self.task} {percent(self.change.estimate)}{low}"


@dataclass(frozen=True)
class Gate:
    """Compares validations with the losses of the tasks when they were learnt; without a budget, nothing.

    Attributes:
        learnt: earlier task → loss of each held-out episode at the end of the stage that learnt it.
    """

    learnt: Mapping[str, Scores]
    config: ForgettingConfig

    def read(self, now: Mapping[str, Scores]) -> list[Reading]:
        """One reading per earlier task.

        Args:
            now: task → loss of each held-out episode.

        Raises:
            ValueError: a task was validated on other episodes than when it was learnt.
        """
        if self.config.budget is None:
            return []
        return [
            Reading(task, self._change(before, now[task]), self.config.budget) for task, before in self.learnt.items()
        ]

    def _change(self, before: Scores, now: Scores) -> Interval:
        level, resamples = self.config.confidence, self.config.resamples
        return paired_bootstrap(before, now, relative=True, level=level, resamples=resamples)

    def act(self, readings: Sequence[Reading], *, shares: Mapping[str, float], new: str, over: bool) -> Action:
        """What follows from the readings.

        Args:
            shares: of the samples at present. new: the task being learnt.
            over: the stage has come to its end, so that only a warning is left to give.
        """
        exceeding = [reading for reading in readings if reading.exceeded]
        if not exceeding:
            return Action()
        config = self.config
        losses = ", ".join(map(str, exceeding))
        reason = f"held-out loss since learnt: {losses}; the budget is {whole_percent(exceeding[0].budget)}"
        if over or config.on_exceed == "warn":
            return Action("warn", reason)
        if config.on_exceed == "stop":
            return Action("stop", reason)
        raised = raised_shares(
            shares,
            [reading.task for reading in exceeding],
            new=new,
            factor=config.raise_factor,
            limit=config.raise_limit,
            floor=config.new_task_floor,
        )
        if raised == dict(shares):
            return Action("warn", f"{reason}; its replay share cannot be raised any further")
        return Action("raise_replay", reason, raised)


class ForgettingGate(Strategy):
    """The gate at every validation of a stage, whatever the strategy: `forgetting.budget` sets it."""

    Settings = ForgettingConfig

    def check(self, earlier: Sequence[StageFolder]) -> None:
        self._gate(earlier)

    def decide(self, view: StageView, scores: Mapping[str, Scores], *, step: int, epoch: int, over: bool) -> Action:
        gate = self._gate(view.earlier)
        readings = gate.read(scores)
        action = gate.act(readings, shares=view.shares(), new=mixture_of(view.config).leading, over=over)
        if view.is_main:
            about = {"stage": view.config.stage.index, "epoch": epoch, "step": step}
            for reading in readings:
                taken = {"action": action.name, "shares": action.shares} if reading.exceeded else {"action": None}
                view.folder.gate.append({**about, **reading.record(), **taken})
                view.report({f"gate/{reading.task}/change": reading.change.estimate}, step)
        return action

    def _gate(self, earlier: Sequence[StageFolder]) -> Gate:
        """Raises `ConfigError` where the losses of an earlier task when it was learnt are not there."""
        learnt = {}
        for folder in earlier:
            name = folder.about["name"]
            lines = map(ValidationRecord.from_json, folder.validations.read())
            ends = [line for line in lines if line.kind == "end" and line.task == name]
            if not ends:
                raise ConfigError(
                    f"{folder.path}/validation.jsonl must hold the losses of {name} when it was learnt (kind 'end') "
                    "for the gate; restore it, or set forgetting.budget=null"
                )
            learnt[name] = ends[-1].scores("loss")
        return Gate(learnt, self.settings)
