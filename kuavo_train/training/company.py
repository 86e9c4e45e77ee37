"""The processes that share the batches of a step, and come to the numbers of one process with all of the samples.

What a step draws at random is drawn in every process for the whole batch, from the step's own seed, and each takes its
rows of it. A mean is over all that is valid in the whole batch: were it the mean of the processes' means, entries would
count the more the fewer of them are valid beside them. A policy that draws by itself (ACT, Diffusion) has a seed for
each process, and the mean of the means.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypedDict

import torch
from accelerate import Accelerator
from lerobot.policies.pretrained import PreTrainedPolicy
from torch import Tensor

from lerobot_policy_smolvla_memory.flow import Count


class StepArguments(TypedDict, total=False):
    """What a forward takes beside batch and memory, as `SmolVLAMemoryPolicy.forward` says."""

    noise: Tensor
    time: Tensor
    clean: Tensor
    everywhere: Count


class Company(Protocol):
    """Of the processes that take a step together."""

    def begin_step(self, policy: PreTrainedPolicy, rows: Sequence[int], seed: int) -> list[StepArguments]:
        """Seed torch for a step, with the `seed` of all; what the forwards of batches of so many `rows` here take."""

    def mean(self, values: Tensor) -> Tensor:
        """Over the processes."""


class Alone:
    """The policy draws by itself, in its forward."""

    def begin_step(self, policy: PreTrainedPolicy, rows: Sequence[int], seed: int) -> list[StepArguments]:
        torch.manual_seed(seed)
        return [{} for _ in rows]

    def mean(self, values: Tensor) -> Tensor:
        return values


@dataclass(frozen=True)
class Together:
    """Several processes; all call everything, in the same order."""

    accelerator: Accelerator

    def begin_step(self, policy: PreTrainedPolicy, rows: Sequence[int], seed: int) -> list[StepArguments]:
        torch.manual_seed(seed)
        arguments: list[StepArguments] = [{} for _ in rows]
        if hasattr(policy, "draw_training"):
            arguments = [self._draw(policy, count) for count in rows]
        torch.manual_seed(seed + self.accelerator.process_index)
        return arguments

    def _draw(self, policy: PreTrainedPolicy, rows: int) -> StepArguments:
        place, processes = self.accelerator.process_index, self.accelerator.num_processes
        drawn = policy.draw_training(processes * rows, self.accelerator.device)
        own = {name: whole.chunk(processes)[place] for name, whole in drawn.items()}
        return {**own, "everywhere": self._everywhere}  # type: ignore[typeddict-item]

    def _everywhere(self, count: Tensor) -> Tensor:
        return self.accelerator.reduce(count, "sum").clamp_min(1) / self.accelerator.num_processes

    def mean(self, values: Tensor) -> Tensor:
        return self.accelerator.reduce(values, "mean")


def company_of(accelerator: Accelerator) -> Company:
    return Together(accelerator) if accelerator.num_processes > 1 else Alone()
