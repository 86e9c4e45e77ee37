"""Muon: a step of the matrices is an orthogonal one (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

The momentum of a matrix is brought near U Vᵀ of its singular value decomposition U S Vᵀ, so that all directions move as
far, not only the few that dominate the gradient. Scaled to the root mean square of AdamW's steps (0.2, Liu et al. 2025,
arXiv 2502.16982), it takes AdamW's rates. What is no matrix between hidden states is left to AdamW: embeddings, norms,
and what comes from or goes to states and actions.

torch.optim.Muon is the same for matrices alone. It orthogonalizes in bfloat16, which takes a CPU longer than float32.
"""

from collections.abc import Callable, Iterable
from typing import TypedDict, Unpack

import torch
from torch import Tensor

RMS = 0.2  # of a step per rate, as AdamW's
MOMENTUM = 0.95
ITERATIONS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic that is steepest at 0
NARROWEST = 48  # side of a matrix between hidden states; states and actions have 32 dimensions, a vocabulary over 1000
LONGEST_OVER_SHORTEST = 8


class AdamWSettings(TypedDict):
    """As torch's AdamW takes them."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float


class Muon(torch.optim.Optimizer):
    """Muon for matrices between hidden states, AdamW for the rest; both with one rate.

    Args:
        adamw: rate and decay are those of the matrices, too.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], **adamw: Unpack[AdamWSettings]):
        trained = list(parameters)
        matrices = [each for each in trained if between_hidden_states(each)]
        rest = [each for each in trained if not between_hidden_states(each)]
        super().__init__([{"params": each} for each in (matrices, rest) if each], {**adamw})
        self._has_matrices = bool(matrices)
        self._adamw = torch.optim.AdamW(rest, fused=True, **adamw) if rest else None
        if self._adamw is not None:
            self.param_groups[-1] = self._adamw.param_groups[0]
        self._share()

    def _share(self) -> None:
        """AdamW steps the last group of this optimizer, and keeps its state in this one's."""
        if self._adamw is not None:
            self._adamw.param_groups, self._adamw.state = self.param_groups[-1:], self.state

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step; parameters without a gradient stay where they are, and so does their momentum."""
        assert closure is None, "a learner computes the gradient itself"
        if self._has_matrices:
            self._step_matrices(self.param_groups[0])
        if self._adamw is not None:
            self._adamw.step()

    def _step_matrices(self, group: dict) -> None:
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(parameter)
            momentum = state["momentum"].lerp_(parameter.grad, 1 - MOMENTUM)
            step = orthogonalized(torch.lerp(parameter.grad, momentum, MOMENTUM))  # Nesterov's
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(step, alpha=-group["lr"] * RMS * max(parameter.shape) ** 0.5)


def between_hidden_states(parameter: torch.nn.Parameter) -> bool:
    """Whether it is a matrix of which both sides are hidden states, by its shape."""
    if parameter.dim() != 2 or min(parameter.shape) < NARROWEST:
        return False
    return max(parameter.shape) <= LONGEST_OVER_SHORTEST * min(parameter.shape)


def orthogonalized(matrix: Tensor) -> Tensor:
    """[rows, columns] → about its U Vᵀ, by Newton and Schulz's iteration; singular values end between 0.7 and 1.2."""
    x = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
    x = x / x.norm().clamp(min=1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if matrix.shape[0] <= matrix.shape[1] else x.mT
