"""The memory that training carries from one optimizer step to the next, detached."""

from collections.abc import Callable
from typing import Protocol, TypedDict

import torch

from kuavo_train.data.batch import Batch
from lerobot_policy_smolvla_memory.memory import MemoryState

Exchange = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]


class MemoryArguments(TypedDict, total=False):
    """What a forward takes of the memory: that of each clip before its first query, and K."""

    memory: MemoryState
    queries: int


class MemoryOutputs(TypedDict, total=False):
    """What a forward returns of it: that of each clip after its last query."""

    memory: MemoryState


class Recurrence(Protocol):
    """What a policy's forward takes beside the batch, and what is kept of what it returns."""

    def before(self, batch: Batch) -> MemoryArguments: ...
    def after(self, batch: Batch, outputs: MemoryOutputs) -> None: ...
    def state_dict(self) -> dict[str, torch.Tensor]: ...
    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None: ...


class NoRecurrence:
    """Every sample on its own."""

    def before(self, batch: Batch) -> MemoryArguments:
        return {}

    def after(self, batch: Batch, outputs: MemoryOutputs) -> None:
        pass

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        pass


class CarriedMemory:
    """One memory per stream of walks, handed to the clips that continue it.

    Every process holds those of all streams, whichever process a stream's next clip falls to.

    Args:
        initial: the memory of as many episodes that have not begun as there are streams.
        exchange: named tensors of this process, [clips, …] → those of all processes, one after another.
    """

    def __init__(self, initial: MemoryState, *, exchange: Exchange = dict):
        self.exchange = exchange
        self.states = initial.detach().clone()

    def before(self, batch: Batch) -> MemoryArguments:
        return {"memory": self.states.select(batch.streams), "queries": batch.clip}

    def after(self, batch: Batch, outputs: MemoryOutputs) -> None:
        written = outputs["memory"].detach()
        tensors = {name: getattr(written, name) for name in written.shapes}
        streams = torch.tensor(batch.streams, device=written.device)
        everywhere = self.exchange({"streams": streams, **tensors})
        self.states = self.states.put(everywhere.pop("streams"), MemoryState(**everywhere))

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {name: getattr(self.states, name).cpu() for name in self.states.shapes}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """There may be more streams now than were stored: those have not begun."""
        stored = MemoryState(**state).to(self.states.device)
        self.states = self.states.put(list(range(stored.batch_size)), stored)
