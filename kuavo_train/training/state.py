"""What a resume needs beside weights, as torch saves it."""

from collections.abc import Mapping
from typing import Any

State = Mapping[str, Any]
"""A `state_dict`, as torch types it: tensors, numbers and further ones, which who gave it takes back."""
