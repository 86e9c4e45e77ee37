"""What a robot process gives a policy, and what it gets."""

from collections.abc import Mapping
from typing import Any

import numpy as np

Observation = Mapping[str, Any]
"""LeRobot's key → an array of a picture or of the state, or text, of several robots a list of texts."""
Actions = np.ndarray | list[np.ndarray]
"""[A] or a chunk of [T, A]; of several robots with a leading B, or a list where their tasks differ in dimensions."""
