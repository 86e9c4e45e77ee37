"""The caches below a folder, whoever filled them, and how one is removed.

Only folders that this project made are found: named by the hash of the key that lies in them.
"""

import json
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from kuavo_train.data.images.episode_cache import DIGITS, digest_of, disk_bytes
from kuavo_train.data.images.part import DATASET, KEY

KINDS = ("frames", "features", "contexts")
NAME = rf"[a-z0-9_]+-(?P<digest>[0-9a-f]{{{DIGITS}}})(\.\d+-of-\d+)?"
LEFT_AFTER_S = 3600.0  # so old, what is hidden is no cache that is being made or removed


@dataclass(frozen=True)
class StoredCache:
    """
    Attributes:
        dataset: hash of the dataset it is of.
        root: where that lay; None of a cache of before this was written down.
        encoded: whether an encoder made it.
    """

    path: Path
    dataset: str
    root: Path | None
    encoded: bool

    @property
    def name(self) -> str:
        """Below `data.cache_root`, without what tells a part."""
        return f"{self.path.parent.name}/{self.path.name.partition('.')[0]}"

    @property
    def bytes(self) -> int:
        return disk_bytes(self.path)


def stored_caches(folder: Path) -> list[StoredCache]:
    return [cache for kind in KINDS for path in sorted((folder / kind).glob("*")) if (cache := _recognised(path))]


def leftovers(folder: Path) -> Iterator[Path]:
    """Hidden folders of caches that a kill left half made or half removed."""
    for kind in KINDS:
        for path in sorted((folder / kind).glob(".*")):
            ours = re.fullmatch(rf"\.{NAME}-[0-9a-f]{{32}}", path.name)
            if ours and path.is_dir() and time.time() - path.stat().st_mtime > LEFT_AFTER_S:
                yield path


def remove(path: Path) -> None:
    """Out of sight first, so that a kill leaves no half of a cache that is taken for whole."""
    hidden = path if path.name.startswith(".") else path.rename(path.with_name(f".{path.name}-{uuid4().hex}"))
    shutil.rmtree(hidden)


def _recognised(path: Path) -> StoredCache | None:
    named = re.fullmatch(NAME, path.name)
    if named is None or path.is_symlink() or not path.is_dir():
        return None
    try:
        key = json.loads((path / KEY).read_text())
        dataset = key["dataset"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if digest_of(key) != named["digest"]:
        return None
    try:
        root = Path(json.loads((path / DATASET).read_text())["root"])
    except (OSError, ValueError, KeyError, TypeError):
        root = None
    return StoredCache(path, dataset, root, "encoder" in key)
