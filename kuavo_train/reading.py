"""What a run has written is read again: a damaged file is an error of one line, with what to do."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from kuavo_train.errors import RunFolderError

JsonValue = Any
"""A value of a JSON or YAML file: what it is, whoever reads it knows."""
Json = dict[str, JsonValue]
"""An object of such a file."""

TRAIN_AGAIN = "restore it from a copy, or train the stage again"
ANOTHER_RUN = "restore it from a copy, or choose another run=NAME"


def read_json(path: Path, *, keys: Sequence[str] = (), remedy: str = TRAIN_AGAIN) -> JsonValue:
    """What the file holds; with `keys` an object that has them. Raises `RunFolderError`, which ends in the `remedy`."""
    return _read(path, "JSON", json.loads, keys, remedy)


def read_yaml(path: Path, *, keys: Sequence[str] = (), remedy: str = TRAIN_AGAIN) -> JsonValue:
    """As `read_json`."""
    return _read(path, "YAML", yaml.safe_load, keys, remedy)


def _read(path: Path, kind: str, parse: Callable[[str], JsonValue], keys: Sequence[str], remedy: str) -> JsonValue:
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, yaml.YAMLError) as error:
        raise RunFolderError(f"{path} is not {kind} ({' '.join(str(error).split())}): {remedy}") from error
    missing = [key for key in keys if not isinstance(content, Mapping) or key not in content]
    if missing:
        raise RunFolderError(f"{path} lacks {', '.join(map(repr, missing))}: {remedy}")
    return content
