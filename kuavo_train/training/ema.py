"""An exponential moving average of the weights that train, or none: `training.ema`.

After every step θ̄ ← d θ̄ + (1 − d) θ, with d = min(ema, (1 + n) / (10 + n)) at the n-th step, so that an average over
few steps is not one of the weights that training began with. Training itself goes on from θ and never sees θ̄; what is
validated, rolled out, saved as weights and handed on is θ̄ (Polyak & Juditsky 1992; as in diffusion policies). Buffers,
such as how much a memory weighs that has joined, are training's own.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from kuavo_train.errors import ConfigError
from kuavo_train.training.parameter_groups import trainable_parameters
from kuavo_train.training.state import State


class Average(Protocol):
    """Of the weights that train. Draws nothing at random and changes no weight but where it says so."""

    def update(self) -> None:
        """A step was taken."""

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within it the policy has the averages; afterwards training's own weights again, to the last bit."""

    def keep(self) -> None:
        """The policy has the averages from here on: training is over."""

    def state_dict(self) -> State: ...

    def load_state_dict(self, state: State) -> None:
        """Also gives the policy training's own weights. Raises `ConfigError` for the state of another setting."""


class NoAverage:
    """What is trained is what is handed on."""

    def update(self) -> None:
        pass

    @contextmanager
    def applied(self) -> Iterator[None]:
        yield

    def keep(self) -> None:
        pass

    def state_dict(self) -> State:
        return {}

    def load_state_dict(self, state: State) -> None:
        if state:
            raise ConfigError("training.ema must be as when the stage began, a number, got null; set it back")


class MovingAverage:
    """
    Args:
        decay: in [0, 1), what it comes to.
    """

    def __init__(self, policy: nn.Module, decay: float):
        self.decay, self.steps = decay, 0
        self.parameters = trainable_parameters(policy)
        self.averages = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        self.steps += 1
        torch._foreach_lerp_(list(self.averages.values()), list(self.parameters.values()), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        """Not the values but what holds them: a state that was taken before keeps its values."""
        for name, parameter in self.parameters.items():
            parameter.data, self.averages[name] = self.averages[name], parameter.data

    def keep(self) -> None:
        self._give(self.averages)

    @torch.no_grad()
    def _give(self, weights: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(weights[name])

    def state_dict(self) -> State:
        """To be taken outside of `applied`, and stored before the next step."""
        trained = {name: parameter.detach() for name, parameter in self.parameters.items()}
        return {"steps": self.steps, "averages": dict(self.averages), "trained": trained}

    @torch.no_grad()
    def load_state_dict(self, state: State) -> None:
        if state.keys() != {"steps", "averages", "trained"} or state["averages"].keys() != self.averages.keys():
            raise ConfigError(f"training.ema must be as when the stage began, got {self.decay:g}; set it back")
        self.steps = state["steps"]
        self._give(state["trained"])
        for name, average in self.averages.items():
            average.copy_(state["averages"][name])


def average_of(policy: nn.Module, decay: float | None) -> Average:
    return NoAverage() if decay is None else MovingAverage(policy, decay)


def check_average(policy: nn.Module, decay: float | None) -> None:
    """Raises `ConfigError` where averaged weights would meet statistics of others."""
    running = [
        name
        for name, module in policy.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
    ]
    if decay is not None and running:
        raise ConfigError(
            f"training.ema must be null for a policy with batch normalization, got {decay:g}: the running statistics "
            f"of {running[0]} and {len(running) - 1} more are of the weights that are not averaged"
        )
