"""Merging: `strategy=merge`, or `merge={alphas: […]}` beside another.

A stage's result is a point on the line between the weights it began with and those it ended with.

θ(α) = (1 − α) θ_old + α θ_new, as in model patching (Ilharco et al. 2022, arXiv 2208.05592): α = 1 keeps all that was
learnt, a smaller α gives some of it back for what the old weights could do. Only parameters that trained are moved;
frozen ones are the same at both ends.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm

from kuavo_train.config import MergeConfig
from kuavo_train.reading import Json
from kuavo_train.runs.files import write_json
from kuavo_train.strategies.strategy import StageView, Strategy
from kuavo_train.training.checkpoint import Checkpoint, load_weights
from kuavo_train.training.parameter_groups import trainable_parameters


class Merge(Strategy):
    Settings = MergeConfig

    def result(self, view: StageView, best: Checkpoint, loss: float) -> tuple[Checkpoint, float]:
        """The best point between the weights before the stage and after; in the first stage there is only one."""
        if view.before is None:
            return best, loss
        new = copy_weights(view.policy)
        load_weights(view.policy, view.before)
        old = copy_weights(view.policy)
        load_weights(view.policy, best)
        sweep = sweep_merges(view.policy, old, new, self.settings.alphas, view.losses)
        if view.is_main:
            write_json(view.folder.path / "merge.json", sweep)
            tqdm.write(f"merged with alpha {sweep['chosen']:g}: mean held-out loss {sweep['loss']:.4f}")
        about = {"merged": {"alpha": sweep["chosen"], "old": view.before.hash, "new": best.hash}}
        return view.save_result(f"merged-{sweep['chosen']:g}", about, best.step), sweep["loss"]


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
) -> Json:
    """Try every α and leave `policy` at the one with the least mean loss; what merge.json holds.

    Args:
        validate: task → held-out loss of `policy` as it stands, over all tasks seen.
    """
    sweep: list[Json] = []
    for alpha in alphas:
        set_merged_weights(policy, old, new, alpha)
        losses = dict(validate())
        sweep.append({"alpha": alpha, "loss": sum(losses.values()) / len(losses), "losses": losses})
    best = min(sweep, key=lambda entry: entry["loss"])
    set_merged_weights(policy, old, new, best["alpha"])
    return {"chosen": best["alpha"], "loss": best["loss"], "sweep": sweep}
