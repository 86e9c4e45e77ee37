"""Replay: every stage mixes its own task with the earlier ones, by the shares of its file in configs/tasks."""

from collections.abc import Mapping

from kuavo_train.config import RunConfig
from kuavo_train.strategies.strategy import Strategy


class Replay(Strategy):
    def shares(self, config: RunConfig, frames: Mapping[str, int]) -> dict[str, float]:
        return {task: share for task, share in config.stage.replay.items() if share > 0}
