"""The gate: whether an earlier task has lost more than its budget since it was learnt, and what follows.

A task is over the budget when the data show it: when the lower end of the interval of its held-out loss's relative
change (paired bootstrap over episodes) lies above it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kuavo_train.config import ForgettingConfig
from kuavo_train.data.replay import raised_shares
from kuavo_train.metrics.intervals import Interval, Scores, paired_bootstrap
from kuavo_train.metrics.number_format import percent, whole_percent


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
class Action:
    """What the gate asks for: nothing, a warning, the stage's end, or other shares from here on."""

    name: str | None = None
    reason: str = ""
    shares: dict[str, float] | None = None

    @property
    def stop(self) -> str | None:
        return self.reason if self.name == "stop" else None


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
