"""The strategies of a run: the one that `strategy` names, and what else has settings, as one."""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import fields

import draccus

from kuavo_train.config import RunConfig
from kuavo_train.errors import ConfigError, require
from kuavo_train.metrics.intervals import Scores
from kuavo_train.runs.run_folder import StageFolder
from kuavo_train.strategies.adapters import Adapters
from kuavo_train.strategies.distill import Distill
from kuavo_train.strategies.ewc import Ewc
from kuavo_train.strategies.forgetting_gate import ForgettingGate
from kuavo_train.strategies.merge import Merge
from kuavo_train.strategies.strategy import Action, StageView, Strategy
from kuavo_train.training.checkpoint import Checkpoint
from kuavo_train.training.extra_loss import ExtraLoss, ExtraLosses

BESIDE = {"ewc": Ewc, "distill": Distill, "merge": Merge, "adapters": Adapters}
"""Section of the configuration → the strategy that it turns on, beside whichever is named."""


def chosen_strategy(config: RunConfig) -> Strategy:
    """Raises `ConfigError` for a strategy that is not there, or settings that it does not have."""
    others = [kind(getattr(config, key)) for key, kind in BESIDE.items() if getattr(config, key) is not None]
    named = _named(config.strategy)
    gate = [] if config.forgetting.budget is None else [ForgettingGate(config.forgetting)]
    mine = [] if named in BESIDE.values() else [named(_settings(named, config))]
    return Together([*mine, *others, *gate])


def _named(name: str) -> type[Strategy]:
    module, _, kind = name.partition(":")
    module, kind = (module, kind) if kind else (f"kuavo_train.strategies.{name}", name.title().replace("_", ""))
    rule = f"strategy must be the name of a file in kuavo_train/strategies, or module:Class, got {name!r}"
    try:
        found = getattr(importlib.import_module(module), kind)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{rule}: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Strategy)):
        raise ConfigError(f"{rule}, which is no Strategy")
    return found


def _settings(kind: type[Strategy], config: RunConfig) -> object:
    known = ", ".join(field.name for field in fields(kind.Settings))
    rule = f"be one of {known}" if known else "not be there, since the strategy has no settings"
    for name, value in config.strategy_settings.items():  # a dataclass without fields would take any name
        require(name in known.split(", "), f"strategy_settings.{name} of strategy={config.strategy}", rule, value)
    try:
        return draccus.decode(kind.Settings, config.strategy_settings)
    except draccus.ParsingError as error:
        if isinstance(error.__cause__, ConfigError):
            raise error.__cause__ from error
        raise ConfigError(f"strategy_settings of {config.strategy}: {' '.join(str(error).split())}") from error


class Together(Strategy):
    """Several at once: the first one's samples, the sum of their losses, the first action that is one."""

    def __init__(self, parts: Sequence[Strategy]):
        super().__init__()
        self.parts = parts

    def shares(self, config: RunConfig, frames: Mapping[str, int]) -> dict[str, float]:
        return self.parts[0].shares(config, frames)

    def check(self, earlier: Sequence[StageFolder]) -> None:
        for part in self.parts:
            part.check(earlier)

    def extra_loss(self, view: StageView) -> ExtraLoss:
        return ExtraLosses([part.extra_loss(view) for part in self.parts])

    def decide(self, view: StageView, scores: Mapping[str, Scores], *, step: int, epoch: int, over: bool) -> Action:
        actions = [part.decide(view, scores, step=step, epoch=epoch, over=over) for part in self.parts]
        return next((action for action in actions if action.name is not None), Action())

    def result(self, view: StageView, best: Checkpoint, loss: float) -> tuple[Checkpoint, float]:
        for part in self.parts:
            best, loss = part.result(view, best, loss)
        return best, loss

    def end(self, view: StageView) -> None:
        for part in self.parts:
            part.end(view)
