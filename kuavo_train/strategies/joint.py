"""Joint training: all tasks in one stage. Nothing can be forgotten: the upper bound."""

from collections.abc import Mapping

from kuavo_train.config import RunConfig
from kuavo_train.data.replay import proportional_shares
from kuavo_train.strategies.strategy import Strategy


class Joint(Strategy):
    def shares(self, config: RunConfig, frames: Mapping[str, int]) -> dict[str, float]:
        """Every task is passed as often as in a stage of its own."""
        return proportional_shares({task: config.passes[task] * frames[task] for task in config.learns})
