"""Sequential fine-tuning: every stage sees its own task alone. The baseline that forgets."""

from kuavo_train.strategies.strategy import Strategy


class Sequential(Strategy):
    """Its samples are all there is to it: `mixture: own_task`."""
