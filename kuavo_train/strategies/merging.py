"""Merging: a stage's result is a point on the line between the weights it began with and those it ended with.

θ(α) = (1 − α) θ_old + α θ_new, as in model patching (Ilharco et al. 2022, arXiv 2208.05592): α = 1 keeps all that was
learnt, a smaller α gives some of it back for what the old weights could do. Only parameters that trained are moved;
frozen ones are the same at both ends.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kuavo_train.training.parameter_groups import trainable_parameters


def copy_weights(policy: nn.Module) -> dict[str, Tensor]:
    """The values of the trained parameters, by name."""
    return {name: parameter.detach().clone() for name, parameter in trainable_parameters(policy).items()}


def set_merged_weights(policy: nn.Module, old: Mapping[str, Tensor], new: Mapping[str, Tensor], alpha: float) -> None:
    """Give the trained parameters of `policy` their values at α; exactly `old` at 0 and `new` at 1."""
    with torch.no_grad():
        for name, parameter in trainable_parameters(policy).items():
            parameter.copy_(torch.lerp(old[name], new[name], alpha))


def sweep_merges(
    policy: nn.Module,
    old: Mapping[str, Tensor],
    new: Mapping[str, Tensor],
    alphas: Sequence[float],
    validate: Callable[[], Mapping[str, float]],
) -> dict[str, Any]:
    """Try every α and leave `policy` at the one with the least mean loss; what merge.json holds.

    Args:
        validate: task → held-out loss of `policy` as it stands, over all tasks seen.
    """
    sweep: list[dict[str, Any]] = []
    for alpha in alphas:
        set_merged_weights(policy, old, new, alpha)
        losses = dict(validate())
        sweep.append({"alpha": alpha, "loss": sum(losses.values()) / len(losses), "losses": losses})
    best = min(sweep, key=lambda entry: entry["loss"])
    set_merged_weights(policy, old, new, best["alpha"])
    return {"chosen": best["alpha"], "loss": best["loss"], "sweep": sweep}
