"""The gate: whether an earlier task has lost more than its budget since it was learnt, and what follows.

A task is over the budget when the data show it: when the lower end of the interval of its held-out loss's relative
change (paired bootstrap over episodes) lies above it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from kuavo_train.config import ForgettingConfig
from kuavo_train.data.mixture import mixture_of
from kuavo_train.data.replay.shares import raised_shares
from kuavo_train.errors import ConfigError
from kuavo_train.metrics.intervals import Interval, Scores, paired_bootstrap
from kuavo_train.metrics.number_format import percent, whole_percent
from kuavo_train.runs.records import GateReading, GateRecord, ValidationRecord
from kuavo_train.runs.run_folder import StageFolder
from kuavo_train.strategies.strategy import Action, StageView, Strategy


@dataclass(frozen=True)
class Gate:
    """Compares validations with the losses of the tasks when they were learnt; without a budget, nothing.

    Attributes:
        learnt: earlier task → loss of each held-out episode at the end of the stage that learnt it.
    """

    learnt: Mapping[str, Scores]
    config: ForgettingConfig

    def read(self, now: Mapping[str, Scores]) -> list[GateReading]:
        """One reading per earlier task.

        Args:
            now: task → loss of each held-out episode.

        Raises:
            ValueError: a task was validated on other episodes than when it was learnt.
        """
        if self.config.budget is None:
            return []
        return [
            GateReading(task, self._change(before, now[task]), self.config.budget)
            for task, before in self.learnt.items()
        ]

    def _change(self, before: Scores, now: Scores) -> Interval:
        level, resamples = self.config.confidence, self.config.resamples
        return paired_bootstrap(before, now, relative=True, level=level, resamples=resamples)

    def act(self, readings: Sequence[GateReading], *, shares: Mapping[str, float], new: str, over: bool) -> Action:
        """What follows from the readings.

        Args:
            shares: of the samples at present. new: the task being learnt.
            over: the stage has come to its end, so that only a warning is left to give.
        """
        exceeding = [reading for reading in readings if reading.exceeded]
        if not exceeding:
            return Action()
        config = self.config
        losses = ", ".join(map(_in_words, exceeding))
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
            for reading in readings:
                record = GateRecord(reading, step, epoch, view.config.stage.index)
                if reading.exceeded:
                    record = replace(record, action=action.name, shares=action.shares)
                view.folder.gate.append(record.to_json())
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


def _in_words(reading: GateReading) -> str:
    low = "" if reading.change.low is None else f" (at least {percent(reading.change.low)})"
    return f"{reading.task} {percent(reading.change.estimate)}{low}"
