"""What a training step holds in memory beside weights, gradients and the optimizer's state, found out in advance.

The policy goes forward on tensors without values, of which there are shapes and types alone (torch's FakeTensor). So
nothing is allocated and nothing drawn, and the device's own kernels say what they keep. What is held between forward
and backward grows in proportion to the samples:

    held = fixed + per_sample · samples

`fixed` is above all what autocast keeps of the weights, in bfloat16. A strategy's own loss is not in it, nor what the
backward pass holds for a moment. That pass is not taken: over such tensors it starts threads of autograd's, after which
no process that learns can be forked.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from lerobot.policies.pretrained import PreTrainedPolicy
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lerobot_policy_smolvla_memory.modeling_smolvla_memory import SmolVLAMemoryPolicy


@dataclass(frozen=True)
class StepMemory:
    """Bytes.

    Attributes:
        samples: of a batch.
        fixed, per_sample: of `held`.
    """

    samples: int
    fixed: int
    per_sample: int

    @property
    def held(self) -> int:
        """Between forward and backward."""
        return self.fixed + self.per_sample * self.samples


def can_be_followed(policy: PreTrainedPolicy) -> TypeGuard[SmolVLAMemoryPolicy]:
    """Not another policy, nor LeRobot's own forward: they look at values on the way."""
    return isinstance(policy, SmolVLAMemoryPolicy) and policy.config.fast_forward


def step_memory(
    policy: SmolVLAMemoryPolicy,
    sample: Mapping[str, Tensor],
    *,
    samples: int,
    queries: int,
    autocast: Callable[[], AbstractContextManager],
) -> StepMemory:
    """Of a step on so many samples, clips of K `queries`.

    Args:
        sample: a batch of one row, as it comes out of the preprocessor; its values do not matter.
        autocast: the context of a training step.
    """
    # A process's first backward pass starts a thread per device, after which nothing that is forked may learn; and fake
    # tensors pretend that there is a GPU. So that pass is now.
    torch.zeros(1, requires_grad=True).sum().backward()
    uncompiled = torch.compiler.set_stance("force_eager")  # compiling looks at values
    with torch.random.fork_rng(), uncompiled, _as_it_was(policy):
        drawn = policy.draw_training(1, next(iter(sample.values())).device)

        def held(rows: int) -> int:
            batch, arguments = _of_rows(rows, sample), _of_rows(rows, drawn)
            with LiveBytes() as live, autocast():
                _loss, _outputs = policy.train()(batch, **arguments, queries=queries)
                return live.now

        with detect_fake_mode(list(policy.parameters())) or FakeTensorMode(allow_non_fake_inputs=True):
            shorter, longer = held(samples), held(samples + queries)
    per_sample = round((longer - shorter) / queries)
    return StepMemory(samples, shorter - per_sample * samples, per_sample)


def _of_rows(rows: int, tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    """As many times as many of each of the tensors' rows, of any value."""
    return {
        name: torch.empty((rows * len(tensor), *tensor.shape[1:]), dtype=tensor.dtype, device=tensor.device)
        for name, tensor in tensors.items()
    }


class LiveBytes(TorchDispatchMode):
    """Counts the storages made inside it as long as they are there: `now`, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.known: dict[int, weakref.finalize] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if not function.is_view:  # of something that is there
            for tensor in tree_leaves(result):
                if isinstance(tensor, Tensor):
                    self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        place, size = storage._cdata, storage.nbytes()
        if place in self.known:
            return
        self.known[place] = weakref.finalize(storage, self._forget, place, size)
        self.now += size

    def _forget(self, place: int, size: int) -> None:
        del self.known[place]
        self.now -= size


@contextmanager
def _as_it_was(policy: nn.Module) -> Iterator[None]:
    """Afterwards the policy has its buffers again, and its mode."""
    training, buffers = policy.training, [(module, dict(module._buffers)) for module in policy.modules()]
    try:
        yield
    finally:
        for module, before in buffers:
            module._buffers.update(before)
        policy.train(training)
