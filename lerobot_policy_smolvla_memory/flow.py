"""Flow matching: what a training step draws, what the policy answers, and the mean over what was a question."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NotRequired, TypedDict

import torch
import torch.nn.functional as F
from lerobot.utils.constants import ACTION
from torch import Tensor

from lerobot_policy_smolvla_memory.configuration_smolvla_memory import ACTION_DIM_IS_PAD, ACTION_IS_PAD, QUERY_IS_PAD


@dataclass(frozen=True)
class Flow:
    """What a policy answers at noisy actions, and what it was to answer. D draws of a row, A padded dimensions.

    Attributes:
        noisy: actions [B × D, T, A]. time: [B × D], or [B × D, T] where the steps of a chunk are not all as noisy.
        target, velocity: [B × D, T, A]; the velocity carries gradients.
        reduce: losses [B × D, T, A] → their mean over valid entries.
    """

    noisy: Tensor
    time: Tensor
    target: Tensor
    velocity: Tensor
    reduce: Callable[[Tensor], Tensor]

    def loss(self, velocity: Tensor) -> Tensor:
        """Mean squared distance of the policy's velocity from another one, over what its own loss is a mean of."""
        return self.reduce(F.mse_loss(velocity, self.velocity, reduction="none"))


class TrainingDraws(TypedDict):
    """What a training step draws at random, as `SmolVLAMemoryPolicy.forward` takes it: [B × D, …] each."""

    noise: Tensor
    time: Tensor
    clean: NotRequired[Tensor]


Count = Callable[[Tensor], Tensor]


def at_least_one(count: Tensor) -> Tensor:
    """Of valid entries: a mean over none of them is 0."""
    return count.clamp_min(1)


def mean_of_valid(
    losses: Tensor,
    batch: dict[str, Tensor],
    reduction: str,
    given: Tensor | None = None,
    *,
    everywhere: Count = at_least_one,
) -> Tensor:
    """losses [B × D, T, A] → the mean of the valid ones, over all ("mean") or per row of the batch ("none": [B]).

    Args:
        given: [B × D, T] true for steps that were no question.
        everywhere: as in `forward`, for the mean over all.
    """
    rows = len(batch[ACTION])
    entries = {"mean": (0, 1, 2), "none": (1, 2)}[reduction]
    padding = [
        batch[key].view(shape)
        for key, shape in (
            (ACTION_IS_PAD, (rows, losses.shape[1], 1)),
            (ACTION_DIM_IS_PAD, (rows, 1, -1)),
            (QUERY_IS_PAD, (-1, 1, 1)),
        )
        if key in batch
    ]
    if not padding and given is None:
        reduced = losses.mean(entries)
    else:
        valid = torch.ones(rows, *losses.shape[1:], dtype=torch.bool, device=losses.device)
        for padded in padding:
            valid &= ~padded
        valid = valid.repeat_interleave(len(losses) // rows, dim=0)
        if given is not None:
            valid &= ~given[:, :, None]
        count = everywhere if reduction == "mean" else at_least_one
        reduced = (losses * valid).sum(entries) / count(valid.sum(entries))
    return reduced if reduction == "mean" else reduced.unflatten(0, (rows, -1)).mean(dim=1)


def integrate(velocity: Callable[[Tensor, Tensor], Tensor], noise: Tensor, steps: int) -> Tensor:
    """Noise [B, T, A] along the flow to actions, in so many equal steps: LeRobot's `euler_integrate`, to the bit.

    LeRobot's makes the time of a step on the host and moves it to the device; here nothing is moved.

    Args:
        velocity: of the flow at noisy actions [B, T, A] and a time [B].
    """
    dt = -1.0 / steps
    x_t = noise
    for step in range(steps):
        time = torch.full((), 1.0 + step * dt, dtype=torch.float32, device=noise.device)
        x_t = x_t + dt * velocity(x_t, time.expand(len(noise)))
    return x_t
