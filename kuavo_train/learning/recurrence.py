"""The memory that training carries from one optimizer step to the next, detached."""

from typing import Any, Protocol

import torch

from kuavo_train.data.mixture import Batch
from lerobot_policy_smolvla_memory.memory import MemoryState


class Recurrence(Protocol):
    """What a policy's forward takes beside the batch, and what is kept of what it returns."""

    def before(self, batch: Batch) -> dict[str, Any]: ...
    def after(self, batch: Batch, outputs: dict[str, Any]) -> None: ...
    def state_dict(self) -> dict[str, torch.Tensor]: ...
    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None: ...


class NoRecurrence:
    """Every sample on its own."""

    def before(self, batch: Batch) -> dict[str, Any]:
        return {}

    def after(self, batch: Batch, outputs: dict[str, Any]) -> None:
        pass

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        pass


class CarriedMemory:
    """One memory per stream of walks, handed to the clips that continue it.

    Args:
        streams: how many there are.
        depth: K, the queries of a clip; gradients flow through them and no further.
        initial: the memory of `streams` episodes that have not begun.
    """

    def __init__(self, initial: MemoryState, *, depth: int):
        self.depth = depth
        self.states = initial.detach().clone()

    def before(self, batch: Batch) -> dict[str, Any]:
        return {"memory": self.states.select(self._streams(batch)), "queries": self.depth}

    def after(self, batch: Batch, outputs: dict[str, Any]) -> None:
        self.states = self.states.put(self._streams(batch), outputs["memory"].detach())

    def _streams(self, batch: Batch) -> list[int]:
        """The stream of each lane; a batch is lane-major."""
        return batch["stream"][:: self.depth].tolist()

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {name: getattr(self.states, name).cpu() for name in self.states.shapes}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.states = MemoryState(**state).to(self.states.device)
