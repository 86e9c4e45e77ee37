"""Elastic weight consolidation: `strategy=ewc`, or `ewc={strength: …, batches: …}` beside another.

It (Kirkpatrick et al. 2017, arXiv 1612.00796) holds every weight near the value θ* it had when the earlier tasks were
learnt, the harder the more their loss depends on it:

    λ/2 Σ_i F_i (θ_i − θ*_i)²

F is the diagonal of the Fisher information, summed over the stages so far; θ* are the weights the last of them ended
with, so that the penalty has one centre however many tasks there were (Huszár 2018, arXiv 1712.03847).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm

from kuavo_train.config import EwcConfig
from kuavo_train.errors import ConfigError
from kuavo_train.runs.run_folder import StageFolder
from kuavo_train.strategies.importance import Importance, measure_importance
from kuavo_train.strategies.strategy import StageView, Strategy
from kuavo_train.training.extra_loss import ExtraLoss, NoExtraLoss
from kuavo_train.training.parameter_groups import trainable_parameters
from kuavo_train.training.trainer import step_seed


class Ewc(Strategy):
    Settings = EwcConfig

    def check(self, earlier: Sequence[StageFolder]) -> None:
        if earlier and not earlier[-1].importance.is_file():
            path = earlier[-1].path
            raise ConfigError(f"{earlier[-1].importance} must be there for ewc; delete {path} to run it again")

    def extra_loss(self, view: StageView) -> ExtraLoss:
        earlier = _importance_before(view)
        if earlier is None:
            return NoExtraLoss()
        return ElasticPenalty(view.policy, earlier, strength=self.settings.strength)

    def end(self, view: StageView) -> None:
        """By the first process alone, on the first batches of the stage."""
        measured = view.repeatable(lambda: self._measure(view) if view.is_main else None)
        if measured is not None:
            measured.after(_importance_before(view)).save(view.folder.importance)

    def _measure(self, view: StageView) -> Importance:
        clips = tqdm(list(view.first_clips(self.settings.batches)), "importance", leave=False, unit="clip")
        seed = step_seed(view.config.seed, view.config.stage.index)
        return measure_importance(view.policy, clips, forward=view.new_forward(), seed=seed)


def _importance_before(view: StageView) -> Importance | None:
    """What was kept of the stages before; None in the first."""
    return Importance.load(view.earlier[-1].importance) if view.earlier else None


class ElasticPenalty(NoExtraLoss):
    """The penalty on the parameters of `policy` that train; those that `importance` does not know are free.

    Its gradient λ F (θ − θ*) is added as it stands, after the backward pass: exact, in full precision, and nothing that
    several processes would have to agree on.
    """

    def __init__(self, policy: nn.Module, importance: Importance, *, strength: float):
        self.strength = strength
        self.terms = [
            (parameter, *(kind[name].to(parameter.device) for kind in (importance.fisher, importance.weights)))
            for name, parameter in trainable_parameters(policy).items()
            if name in importance.fisher
        ]

    def __call__(self) -> Tensor:
        """The penalty itself, a scalar; differentiable."""
        terms = [(fisher * (parameter - weights) ** 2).sum() for parameter, fisher, weights in self.terms]
        return self.strength / 2 * torch.stack(terms).sum()

    def add_gradient(self) -> dict[str, float]:
        with torch.no_grad():
            for parameter, fisher, weights in self.terms:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                parameter.grad.add_(fisher * (parameter - weights), alpha=self.strength)
            return {"penalty": self().item()}
