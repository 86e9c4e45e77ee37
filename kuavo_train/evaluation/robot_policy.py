"""What drives a robot in closed loop."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from kuavo_train.wrapper.policy.robot_io import Actions, Observation


class Policy(Protocol):
    """What is rolled out; see `SmolVLAPolicyWrapper`."""

    @property
    def n_action_steps(self) -> int: ...
    def reset(self, indices: Sequence[int] | None = None, *, seeds: Sequence[int] | None = None) -> None: ...
    def select_action(self, observation: Observation) -> Actions: ...
    def due(self) -> Sequence[int]: ...
    def memory_norms(self) -> np.ndarray | None: ...
