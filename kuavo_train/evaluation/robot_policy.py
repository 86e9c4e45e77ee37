"""What drives a robot in closed loop."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np


class Policy(Protocol):
    """What is rolled out; see `SmolVLAPolicyWrapper`."""

    @property
    def n_action_steps(self) -> int: ...
    def reset(self, indices: Sequence[int] | None = None, *, seeds: Sequence[int] | None = None) -> None: ...
    def select_action(self, observation: Mapping[str, Any]) -> Any: ...
    def memory_norms(self) -> np.ndarray | None: ...
