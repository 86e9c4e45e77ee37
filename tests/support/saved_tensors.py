"""What autograd keeps of a forward until the backward pass, counted by the storages that it holds."""

from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakSet

import torch
from torch import Tensor, nn


class Kept:
    """A tensor that autograd has saved, as long as something needs it."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


class SavedTensors:
    """
    Args:
        module: whose parameters are there anyway.
    """

    def __init__(self, module: nn.Module):
        self.known = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
        self.kept: WeakSet[Kept] = WeakSet()

    @contextmanager
    def counted(self) -> Iterator[None]:
        def pack(tensor: Tensor) -> Kept:
            self.kept.add(kept := Kept(tensor))
            return kept

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
            yield

    @property
    def bytes(self) -> int:
        """Of all that is kept now; what shares a storage counts once."""
        storages = [kept.tensor.untyped_storage() for kept in self.kept]
        sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
        return sum(size for pointer, size in sizes.items() if pointer not in self.known)
