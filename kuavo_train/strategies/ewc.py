"""What a strategy adds to the tasks' own loss: nothing, or elastic weight consolidation.

Elastic weight consolidation (Kirkpatrick et al. 2017, arXiv 1612.00796) holds every weight near the value θ* it had
when the earlier tasks were learnt, the harder the more their loss depends on it:

    λ/2 Σ_i F_i (θ_i − θ*_i)²

F is the diagonal of the Fisher information, summed over the stages so far; θ* are the weights the last of them ended
with, so that the penalty has one centre however many tasks there were (Huszár 2018, arXiv 1712.03847).
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kuavo_train.data.batch import Batch, preprocess
from kuavo_train.runs.files import in_one_move
from kuavo_train.training.carried_memory import Recurrence
from kuavo_train.training.parameter_groups import trainable_parameters


@dataclass(frozen=True)
class Importance:
    """What elastic weight consolidation keeps of the stages so far, by parameter name.

    Attributes:
        fisher: F, how much the loss depends on each weight. weights: θ*, where they stood.
    """

    fisher: dict[str, Tensor]
    weights: dict[str, Tensor]

    def after(self, earlier: "Importance | None") -> "Importance":
        """This stage's importance together with that of the stages before it."""
        if earlier is None:
            return self
        fisher, weights = dict(earlier.fisher), dict(earlier.weights)
        for name, value in self.fisher.items():
            fisher[name] = fisher[name] + value if name in fisher else value
        return Importance(fisher, weights | self.weights)

    def save(self, path: Path) -> None:
        tensors = {
            f"{kind}/{name}": value.cpu().contiguous()
            for kind in ("fisher", "weights")
            for name, value in getattr(self, kind).items()
        }
        with in_one_move(path) as partial:
            save_file(tensors, partial)

    @classmethod
    def load(cls, path: Path) -> "Importance":
        kinds: dict[str, dict[str, Tensor]] = {"fisher": {}, "weights": {}}
        for key, value in load_file(path).items():
            kind, name = key.split("/", 1)
            kinds[kind][name] = value.float()  # of a run that trained in bfloat16
        return cls(**kinds)


class ElasticPenalty:
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


def measure_importance(
    policy: Any,
    clips: Iterable[Batch],
    *,
    preprocessor: Any,
    recurrence: Recurrence,
    autocast: Callable[[], AbstractContextManager],
    seed: int,
) -> Importance:
    """The diagonal Fisher information of the trained parameters at their present values.

    F_i is the mean over clips of (∂ loss / ∂ θ_i)²: the empirical Fisher, the flow-matching loss of a demonstrated clip
    standing for its negative log-likelihood. Gradients are squared clip by clip, for in a batch they would cancel.

    Args:
        clips: what is dealt together: one sample, or the consecutive queries of one lane.
        seed: of noise and flow time; training's random state is not touched.
    """
    parameters = trainable_parameters(policy)
    fisher = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    was_training, count, device = policy.training, 0, next(policy.parameters()).device
    policy.eval()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for batch in clips:
            policy.zero_grad(set_to_none=True)
            prepared = preprocess(batch, preprocessor, device)
            with autocast():
                loss, outputs = policy(prepared, **recurrence.before(batch))
            recurrence.after(batch, outputs)
            loss.backward()
            count += 1
            for name, parameter in parameters.items():
                if parameter.grad is not None:
                    fisher[name] += parameter.grad.detach() ** 2
    policy.zero_grad(set_to_none=True)
    policy.train(was_training)
    return Importance(
        {name: value / count for name, value in fisher.items()},
        {name: parameter.detach().clone() for name, parameter in parameters.items()},
    )
