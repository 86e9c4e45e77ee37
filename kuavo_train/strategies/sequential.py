"""Sequential fine-tuning: every stage sees its own task alone. The baseline that forgets."""

from collections.abc import Mapping

from kuavo_train.config import RunConfig
from kuavo_train.strategies.strategy import Strategy


class Sequential(Strategy):
    def shares(self, config: RunConfig, frames: Mapping[str, int]) -> dict[str, float]:
        return {config.stage.name: 1.0}
