"""Files of a run, each written in one move."""

import json
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


class JsonLines:
    """An append-only file of one JSON object a line."""

    def __init__(self, path: Path):
        self.path = path

    def append(self, record: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """All complete lines; a last line cut off by a kill is left out."""
        if not self.path.is_file():
            return []
        lines = self.path.read_text().split("\n")
        return [json.loads(line) for line in lines[:-1] if line]

    def forget(self, doubtful: Callable[[dict[str, Any]], bool]) -> None:
        """Drop the records that a resumed stage makes again."""
        if not self.path.is_file():
            return
        kept = [record for record in self.read() if not doubtful(record)]
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(record) + "\n" for record in kept))
        os.replace(partial, self.path)


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=1))


def write_text(path: Path, content: str) -> None:
    """Write in one move, so that a kill leaves the old file or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(content)
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
