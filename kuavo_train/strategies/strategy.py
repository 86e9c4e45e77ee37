"""What a way of keeping earlier tasks may do in a stage: hooks, each of which does nothing by itself.

A strategy is a file: a class that derives from `Strategy` and overrides what it needs, with a dataclass of its own
settings. `strategy=` names it: a module of this package (`replay`: `Replay` in replay.py), or `module:Class`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from lerobot.policies.pretrained import PreTrainedPolicy
from torch import Tensor

from kuavo_train.config import RunConfig
from kuavo_train.data.batch import Batch
from kuavo_train.data.mixture import mixture_of
from kuavo_train.metrics.intervals import Scores
from kuavo_train.reading import Json
from kuavo_train.runs.run_folder import StageFolder
from kuavo_train.training.carried_memory import Recurrence
from kuavo_train.training.checkpoint import Checkpoint
from kuavo_train.training.extra_loss import ExtraLoss, NoExtraLoss


@dataclass(frozen=True)
class NoSettings:
    pass


class Repeatable(Protocol):
    def __call__[T](self, work: Callable[[], T]) -> T: ...


@dataclass(frozen=True)
class StageView:
    """What a strategy sees of its stage. All processes call its hooks, in the same order.

    Attributes:
        policy: with the weights of now, frozen as the stage freezes it.
        folder: where the stage's files go; only the first process, `is_main`, writes them.
        earlier: folders of the stages that learnt the tasks before, in their order.
        before: what the stage before ended in; None for the first stage.
        shares: task → share of the samples, as it is now.
        first_clips: the clips of so many of the stage's first batches, all processes' together, in order.
        new_forward: the loss of a clip, with the memory of the clips that it was given before; begins anew each time.
        new_memory: what a policy of this kind carries from batch to batch of the stage; begins anew each time.
        losses: task → held-out loss of the policy with the weights of now, over all tasks seen.
        choosing_losses: the same on episodes that are neither trained on nor reported, where any are set apart.
        save_result: name, what the manifest says beside, step → a checkpoint of the weights of now, as `best`.
        repeatable: calls what can be done again and writes nothing; a signal to any process ends it in all.
        report: values by name, for the experiment tracker.
    """

    config: RunConfig
    policy: PreTrainedPolicy
    folder: StageFolder
    earlier: Sequence[StageFolder]
    before: Checkpoint | None
    is_main: bool
    shares: Callable[[], Mapping[str, float]]
    first_clips: Callable[[int], Iterator[Batch]]
    new_forward: Callable[[], Callable[[Batch], Tensor]]
    new_memory: Callable[[PreTrainedPolicy], Recurrence]
    losses: Callable[[], Mapping[str, float]]
    choosing_losses: Callable[[], Mapping[str, float]]
    save_result: Callable[[str, Json, int], Checkpoint]
    repeatable: Repeatable
    report: Callable[[dict[str, float], int], None]


@dataclass(frozen=True)
class Action:
    """What a validation leads to: nothing, a warning, the stage's end, or other shares from here on."""

    name: str | None = None
    reason: str = ""
    shares: dict[str, float] | None = None

    @property
    def stop(self) -> str | None:
        return self.reason if self.name == "stop" else None


class Strategy:
    """
    Attributes:
        Settings: dataclass that `strategy_settings` is read into.
    """

    Settings: ClassVar[type] = NoSettings

    def __init__(self, settings: Any = None):  # of the strategy's own class `Settings`
        self.settings = settings

    def shares(self, config: RunConfig, frames: Mapping[str, int]) -> dict[str, float]:
        """Which samples: task → share of the stage's samples, summing to 1; by default what `mixture` says.

        Args:
            frames: task → its training frames, of the whole curriculum.
        """
        return mixture_of(config).shares(frames)

    def check(self, earlier: Sequence[StageFolder]) -> None:
        """Before anything is written: raises `ConfigError` where earlier stages lack what this one needs of them."""

    def extra_loss(self, view: StageView) -> ExtraLoss:
        """What is added to the tasks' own loss, from the stage's first step or from where it is resumed."""
        return NoExtraLoss()

    def decide(self, view: StageView, scores: Mapping[str, Scores], *, step: int, epoch: int, over: bool) -> Action:
        """What follows from a validation.

        Args:
            scores: task → held-out loss of each episode.
            over: the stage has come to its end.
        """
        return Action()

    def result(self, view: StageView, best: Checkpoint, loss: float) -> tuple[Checkpoint, float]:
        """What the stage ends in, and its loss. The policy has the weights of `best`, and shall have the result's."""
        return best, loss

    def end(self, view: StageView) -> None:
        """The result stands: measure and write what later stages need of this one."""
