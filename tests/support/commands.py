"""Commands as a user types them."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
Here = Callable[..., subprocess.CompletedProcess[str]]
"""Of the fixture `here`."""


def command(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", module, *arguments]


def outputs_of(overrides: list[str]) -> Path:
    return Path(next(item.split("=", 1)[1] for item in overrides if item.startswith("outputs=")))
