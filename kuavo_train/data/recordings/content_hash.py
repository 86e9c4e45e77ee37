"""What a dataset is known by: a hash of its content, read anew only where a file has changed.

Hashing reads all tables, gigabytes of a large dataset, at every start. The hash is kept beside the datasets, in
`.cache/hashes/<dataset>.json`, with sizes and times of the files it is of. Where that folder cannot be written, it is
computed every time.
"""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

from kuavo_train.reading import Json

READ, NAMED = ("meta/", "data/"), ("videos/", "images/")
"""Folders whose files are hashed, and whose files' names and sizes are."""
VERSION = 1  # of what is hashed
SETTLED_S = 2.0  # a file that is younger may change again without another time
CHUNK = 2**20


def content_hash(root: Path) -> str:
    """sha256 of a dataset's metadata and tables, and of its videos' names and sizes."""
    began, files = time.time(), list(_files(root))
    stored = root.absolute().parent / ".cache" / "hashes" / f"{root.absolute().name}.json"
    listing, newest = _listing(files)
    known = _read(stored)
    if known.get("listing") == listing and isinstance(known.get("content"), str):
        return known["content"]
    content = _hash(files)
    if newest < began - SETTLED_S:
        _write(stored, {"listing": listing, "content": content})
    return content


def _files(root: Path) -> Iterator[tuple[str, Path]]:
    """Name in the dataset and path of each, in the order of their names."""
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        name = path.relative_to(root).as_posix()
        if name.startswith((*READ, *NAMED)):
            yield name, path


def _listing(files: list[tuple[str, Path]]) -> tuple[str, float]:
    """A hash of names, sizes and times; the youngest time, in s."""
    digest, newest = hashlib.sha256(f"{VERSION}".encode()), 0.0
    for name, path in files:
        about = path.stat()
        digest.update(f"\n{name}:{about.st_size}".encode())
        if name.startswith(READ):
            digest.update(f":{about.st_mtime_ns}:{about.st_ctime_ns}".encode())
            newest = max(newest, about.st_mtime, about.st_ctime)
    return digest.hexdigest(), newest


def _hash(files: list[tuple[str, Path]]) -> str:
    digest = hashlib.sha256()
    for name, path in files:
        if name.startswith(NAMED):
            digest.update(f"{name}:{path.stat().st_size}".encode())
            continue
        digest.update(name.encode())
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
    return digest.hexdigest()


def _read(path: Path) -> Json:
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _write(path: Path, content: Json) -> None:
    """Whole or not at all; other processes may write the same."""
    partial = path.with_name(f".{path.name}-{uuid4().hex}")
    with contextlib.suppress(OSError):  # it only saves time
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_text(json.dumps(content))
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
