"""Files of a run: written in one move, read with errors that name the file and what to do."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from kuavo_train.errors import RunFolderError
from kuavo_train.reading import Json, JsonValue


class JsonLines:
    """An append-only file of one JSON object a line."""

    def __init__(self, path: Path):
        self.path = path

    def append(self, record: Json) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def read(self) -> list[Json]:
        """All lines. Errors as `read_lines`."""
        return read_lines(self.path)

    def forget(self, doubtful: Callable[[Json], bool]) -> None:
        """Drop the records that a resumed stage makes again."""
        if self.path.is_file():
            kept = [record for record in self.read() if not doubtful(record)]
            write_text(self.path, "".join(json.dumps(record) + "\n" for record in kept))


def read_lines(path: Path) -> list[Json]:
    """The objects of a file of JSON lines; none without a file. A last line cut off by a kill is left out.

    Raises:
        RunFolderError: another line is no JSON.
    """
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = text.split("\n")
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise RunFolderError(
                f"{path}: line {number} is not JSON ({error.msg}): repair or delete that line"
            ) from error
    return records


def write_json(path: Path, content: JsonValue) -> None:
    write_text(path, json.dumps(content, indent=1))


def write_text(path: Path, content: str) -> None:
    with in_one_move(path) as partial:
        partial.write_text(content, encoding="utf-8")


def copy_folder(source: Path, into: Path) -> None:
    """Copy a folder in place of what was there, which stays until all is copied."""
    partial = into.with_name(f".{into.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        shutil.copytree(source, partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(into, ignore_errors=True)
    partial.rename(into)


@contextmanager
def in_one_move(path: Path) -> Iterator[Path]:
    """Where to write what becomes `path` when all of it is there: a kill leaves the old file or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
