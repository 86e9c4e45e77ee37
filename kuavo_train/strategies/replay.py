"""Replay: every stage mixes its own task with the earlier ones, by the shares of its file in configs/tasks."""

from kuavo_train.strategies.strategy import Strategy


class Replay(Strategy):
    """Its samples are all there is to it: `mixture: replay`."""
