"""How much the loss depends on each weight: the diagonal of the Fisher information, kept from stage to stage."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kuavo_train.data.batch import Batch
from kuavo_train.runs.files import in_one_move
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


def measure_importance(
    policy: nn.Module, clips: Iterable[Batch], *, forward: Callable[[Batch], Tensor], seed: int
) -> Importance:
    """The diagonal Fisher information of the trained parameters at their present values.

    F_i is the mean over clips of (∂ loss / ∂ θ_i)²: the empirical Fisher, the flow-matching loss of a demonstrated clip
    standing for its negative log-likelihood. Gradients are squared clip by clip, for in a batch they would cancel.

    Args:
        clips: what is dealt together: one sample, or the consecutive queries of one stream.
        forward: the loss of a clip, with the memory of those before it.
        seed: of noise and flow time; training's random state is not touched.
    """
    parameters = trainable_parameters(policy)
    fisher = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    was_training, count = policy.training, 0
    policy.eval()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for batch in clips:
            policy.zero_grad(set_to_none=True)
            forward(batch).backward()
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
