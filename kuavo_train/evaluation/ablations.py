"""A policy with something taken away at evaluation: how much does it contribute?

    roll_out(Ablated(policy, "language"), environment, seeds)

Weights, noise and layouts stay what they are. A policy that was never trained without the thing meets something new, so
a loss says that it leans on it, not that a policy trained without it would do as badly.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from lerobot.utils.constants import OBS_IMAGES

from kuavo_train.evaluation.robot_policy import Policy
from kuavo_train.wrapper.policy.robot_io import Actions, Observation


class Ablatable(Policy, Protocol):
    """What can be ablated; see `SmolVLAPolicyWrapper`."""

    def predict_chunk(self, observation: Observation) -> Actions: ...
    def forget(self) -> None: ...


def _no_instruction(_policy: Ablatable, observation: Observation) -> Observation:
    return {**observation, "instruction": ""}


def _forget(policy: Ablatable, observation: Observation) -> Observation:
    policy.forget()
    return observation


def _show_one_camera(_policy: Ablatable, observation: Observation) -> Observation:
    others = [key for key in observation if key.startswith(OBS_IMAGES)][1:]
    return {**observation, **{camera: np.zeros_like(observation[camera]) for camera in others}}


ABLATIONS: dict[str, tuple[str, Callable[[Ablatable, Observation], Observation]]] = {
    "language": ("no instruction", _no_instruction),
    "memory": ("memory forgotten before every query", _forget),
    "cameras": ("all cameras but the first black", _show_one_camera),
}
"""Name → what it does, in words and in deed."""


@dataclass(frozen=True)
class Ablated:
    """`policy` without what `ablation`, one of `ABLATIONS`, takes away."""

    policy: Ablatable
    ablation: str

    @property
    def n_action_steps(self) -> int:
        return self.policy.n_action_steps

    def reset(self, indices: Sequence[int] | None = None, *, seeds: Sequence[int] | None = None) -> None:
        self.policy.reset(indices, seeds=seeds)

    def select_action(self, observation: Observation) -> Actions:
        return self.policy.select_action(self._change(observation))

    def predict_chunk(self, observation: Observation) -> Actions:
        return self.policy.predict_chunk(self._change(observation))

    def due(self) -> Sequence[int]:
        return self.policy.due()

    def memory_norms(self) -> np.ndarray | None:
        return self.policy.memory_norms()

    def forget(self) -> None:
        self.policy.forget()

    def _change(self, observation: Observation) -> Observation:
        return ABLATIONS[self.ablation][1](self.policy, observation)
