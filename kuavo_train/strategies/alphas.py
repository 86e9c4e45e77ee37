"""Weights between two ends, and where between them a policy is best.

θ(α) = (1 − α) θ_old + α θ_new, as in model patching (Ilharco et al. 2022, arXiv 2208.05592): α = 1 keeps all that was
learnt, a smaller α gives some of it back for what the old weights could do. Each module has an α of its own, as in
RETAIN (arXiv 2512.08333). Only parameters that trained are moved; frozen ones are the same at both ends.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from tqdm import tqdm

from kuavo_train.config import MergeConfig
from kuavo_train.reading import Json
from kuavo_train.training.parameter_groups import parameter_groups, trainable_parameters

ONE_MODULE = {"state_proj": "projections", "action_proj": "projections"}
"""Parameter group → the module that it is a part of; other groups are modules of their own."""


def copy_weights(policy: nn.Module) -> dict[str, Tensor]:
    """The values of the trained parameters, by name."""
    return {name: parameter.detach().clone() for name, parameter in trainable_parameters(policy).items()}


def module_of_parameters(policy: nn.Module) -> dict[str, str]:
    """Trained parameter → the module that it belongs to."""
    groups, trained = parameter_groups(policy), trainable_parameters(policy)
    return {name: ONE_MODULE.get(group, group) for group, names in groups.items() for name in names if name in trained}


def set_merged_weights(
    policy: nn.Module, old: Mapping[str, Tensor], new: Mapping[str, Tensor], alphas: Mapping[str, float]
) -> None:
    """Give the trained parameters of `policy` their values at their module's α; exactly `old` at 0 and `new` at 1."""
    modules = module_of_parameters(policy)
    with torch.no_grad():
        for name, parameter in trainable_parameters(policy).items():
            parameter.copy_(torch.lerp(old[name], new[name], alphas[modules[name]]))


def choose_alphas(
    policy: nn.Module,
    old: Mapping[str, Tensor],
    new: Mapping[str, Tensor],
    settings: MergeConfig,
    measure: Callable[[], Mapping[str, float]],
    *,
    progress: bool = False,
) -> Json:
    """Try every α for all modules, then for one after the other, and leave `policy` at the least mean loss.

    Args:
        measure: task → loss of `policy` as it stands, over all tasks seen; not called where there is nothing to choose.

    Returns:
        What merge.json holds.
    """
    modules = list(dict.fromkeys(module_of_parameters(policy).values()))
    chosen = dict.fromkeys(modules, settings.alphas[0])
    apart = [[module] for module in modules] if settings.per_module and len(modules) > 1 else []
    together = [modules, *apart] if settings.chooses else []
    known: dict[tuple[float, ...], Json] = {}
    rounds: list[Json] = []
    with tqdm(total=len(together) * len(settings.alphas), desc="merge", leave=False, disable=not progress) as bar:
        for moved in together:
            sweep = []
            for alpha in settings.alphas:
                alphas = chosen | dict.fromkeys(moved, alpha)
                if (point := tuple(alphas.values())) not in known:
                    set_merged_weights(policy, old, new, alphas)
                    losses = dict(measure())
                    known[point] = {"loss": sum(losses.values()) / len(losses), "losses": losses}
                sweep.append({"alpha": alpha, **known[point]})
                bar.update()
            stays = chosen[moved[0]]  # where others are no better
            best = min(sweep, key=lambda entry: (entry["loss"], entry["alpha"] != stays))
            chosen |= dict.fromkeys(moved, best["alpha"])
            rounds.append({"modules": "all" if moved is modules else moved[0], "chosen": best["alpha"], "sweep": sweep})
    set_merged_weights(policy, old, new, chosen)
    return {"chosen": chosen, "rounds": rounds}
