"""What a strategy may add to the tasks' own loss."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from kuavo_train.data.batch import Batch, Prepared
from kuavo_train.training.state import State

Outputs = Mapping[str, Any] | None
"""What a policy's forward returns beside the loss, of a kind of its own; None of Diffusion."""


class ExtraLoss(Protocol):
    def of_batch(self, prepared: Prepared, outputs: Outputs, batch: Batch) -> Tensor | None:
        """A differentiable scalar that is added to the loss of a batch; None for nothing.

        Args:
            prepared: the batch as the policy was given it.
            outputs: what its forward returned beside the loss.
            batch: as it was dealt: where its samples are from, and which are the queries of one clip.
        """

    def add_gradient(self) -> dict[str, float]:
        """Add to the gradient of the parameters what no batch has a part in; returns what to report of the step."""

    def state_dict(self) -> State:
        """What goes from one step to the next and a resume needs, under names that no other loss has."""

    def load_state_dict(self, state: State) -> None:
        """Takes what `state_dict` of all losses together has returned."""


class NoExtraLoss:
    """Also what a loss of one kind begins with: it says only what it adds."""

    def of_batch(self, prepared: Prepared, outputs: Outputs, batch: Batch) -> Tensor | None:
        return None

    def add_gradient(self) -> dict[str, float]:
        return {}

    def state_dict(self) -> State:
        return {}

    def load_state_dict(self, state: State) -> None:
        pass


class ExtraLosses:
    """Those of several strategies at once."""

    def __init__(self, losses: Sequence[ExtraLoss]):
        self.losses = losses

    def of_batch(self, prepared: Prepared, outputs: Outputs, batch: Batch) -> Tensor | None:
        found = [extra for loss in self.losses if (extra := loss.of_batch(prepared, outputs, batch)) is not None]
        return sum(found[1:], found[0]) if found else None

    def add_gradient(self) -> dict[str, float]:
        return {name: value for loss in self.losses for name, value in loss.add_gradient().items()}

    def state_dict(self) -> State:
        return {name: value for loss in self.losses for name, value in loss.state_dict().items()}

    def load_state_dict(self, state: State) -> None:
        for loss in self.losses:
            loss.load_state_dict(state)
