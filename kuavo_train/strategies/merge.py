"""Merging: `strategy=merge`, or `merge={alphas: […]}` beside another.

A stage's result lies between the weights it began with and those it ended with, for each module where `alphas` finds
it best.
"""

from collections.abc import Mapping

from tqdm import tqdm

from kuavo_train.config import MergeConfig
from kuavo_train.runs.files import write_json
from kuavo_train.strategies.alphas import choose_alphas, copy_weights
from kuavo_train.strategies.strategy import StageView, Strategy
from kuavo_train.training.checkpoint import Checkpoint, load_weights


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
        rounds = choose_alphas(view.policy, old, new, self.settings, view.choosing_losses, progress=view.is_main)
        chosen, losses = rounds["chosen"], view.losses()
        if view.is_main:
            write_json(view.folder.path / "merge.json", rounds)
            tqdm.write(f"merged with alpha {', '.join(f'{alpha:g} of {name}' for name, alpha in chosen.items())}")
        about = {"merged": {"alphas": chosen, "old": view.before.hash, "new": best.hash}}
        return view.save_result(_name(chosen), about, best.step), sum(losses.values()) / len(losses)


def _name(chosen: Mapping[str, float]) -> str:
    """Of the checkpoint: `merged-0.5`, or `merged-expert-0.5-projections-1-memory-0.2`."""
    alphas = [f"{alpha:g}" for alpha in chosen.values()]
    if len(set(alphas)) == 1:
        return f"merged-{alphas[0]}"
    return "-".join(["merged", *(f"{name}-{alpha}" for name, alpha in zip(chosen, alphas, strict=True))])
