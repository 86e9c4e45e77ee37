"""What a strategy may add to the tasks' own loss."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from kuavo_train.data.batch import Prepared

Outputs = Mapping[str, Any] | None
"""What a policy's forward returns beside the loss, of a kind of its own; None of Diffusion."""


class ExtraLoss(Protocol):
    def of_batch(self, batch: Prepared, outputs: Outputs) -> Tensor | None:
        """A differentiable scalar that is added to the loss of a batch; None for nothing.

        Args:
            batch: as the policy was given it.
            outputs: what its forward returned beside the loss.
        """

    def add_gradient(self) -> dict[str, float]:
        """Add to the gradient of the parameters what no batch has a part in; returns what to report of the step."""


class NoExtraLoss:
    """Also what a loss of one kind begins with: it says only what it adds."""

    def of_batch(self, batch: Prepared, outputs: Outputs) -> Tensor | None:
        return None

    def add_gradient(self) -> dict[str, float]:
        return {}


class ExtraLosses:
    """Those of several strategies at once."""

    def __init__(self, losses: Sequence[ExtraLoss]):
        self.losses = losses

    def of_batch(self, batch: Prepared, outputs: Outputs) -> Tensor | None:
        found = [extra for loss in self.losses if (extra := loss.of_batch(batch, outputs)) is not None]
        return sum(found[1:], found[0]) if found else None

    def add_gradient(self) -> dict[str, float]:
        return {name: value for loss in self.losses for name, value in loss.add_gradient().items()}
