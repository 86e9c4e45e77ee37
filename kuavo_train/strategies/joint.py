"""Joint training: all tasks in one stage, each passed as often as in a stage of its own. The upper bound."""

from kuavo_train.strategies.strategy import Strategy


class Joint(Strategy):
    """Its samples are all there is to it: `mixture: all_tasks`. Nothing is learnt later, so nothing is forgotten."""
