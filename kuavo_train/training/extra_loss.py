"""What a strategy may add to the tasks' own loss."""

from typing import Protocol


class ExtraLoss(Protocol):
    def add_gradient(self) -> dict[str, float]:
        """Add the loss's gradient to that of the parameters; returns what to log of it."""


class NoExtraLoss:
    def add_gradient(self) -> dict[str, float]:
        return {}
