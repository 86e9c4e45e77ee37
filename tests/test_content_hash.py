"""A dataset is known by its content, which is read again only where a file has changed."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from kuavo_train.data.recordings import content_hash as module
from kuavo_train.data.recordings.content_hash import content_hash


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("meta/info.json", "data/chunk-000/file-000.parquet", "videos/head/file-000.mp4", "notes.txt"):
        path = tmp_path / "weighing" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"content of {name}")
    return tmp_path / "weighing"


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every dataset that was read; its files count as settled at once."""
    read: list[Any] = []
    anew = module._hash
    monkeypatch.setattr(module, "SETTLED_S", -60.0)
    monkeypatch.setattr(module, "_hash", lambda files: (read.append(files), anew(files))[1])
    return read


def test_it_is_of_metadata_and_tables_and_of_names_and_sizes_of_videos(root: Path) -> None:
    digest = hashlib.sha256()
    for name in ("data/chunk-000/file-000.parquet", "meta/info.json"):
        digest.update(name.encode() + (root / name).read_bytes())
    digest.update(b"videos/head/file-000.mp4:35")
    assert content_hash(root) == digest.hexdigest()


def test_a_second_start_reads_nothing_and_a_changed_file_is_read(root: Path, hashed: list[Any]) -> None:
    first = content_hash(root)
    assert (content_hash(root), len(hashed)) == (first, 1)
    (root / "notes.txt").write_text("more")
    assert (content_hash(root), len(hashed)) == (first, 1)
    about = (root / "meta/info.json").stat()
    (root / "meta/info.json").write_text("CONTENT OF META/INFO.JSON")
    os.utime(root / "meta/info.json", ns=(about.st_atime_ns, about.st_mtime_ns))  # as a copy with its times kept
    second = content_hash(root)
    assert second != first
    (root / "videos/head/file-000.mp4").write_text("longer than before, by some bytes")
    assert len({first, second, content_hash(root)}) == 3


def test_a_file_that_may_change_again_within_its_time_is_not_trusted(
    root: Path, hashed: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SETTLED_S", 2.0)
    assert content_hash(root) == content_hash(root)
    assert len(hashed) == 2
    monkeypatch.setattr(module, "SETTLED_S", -60.0)
    assert content_hash(root) == content_hash(root)
    assert len(hashed) == 3


@pytest.mark.parametrize("spoilt", ["", "[]", '{"listing": '])
def test_a_record_that_is_spoilt_or_cannot_be_written_costs_time_alone(
    root: Path, hashed: list[Any], spoilt: str
) -> None:
    first = content_hash(root)
    record = root.parent / ".cache" / "hashes" / "weighing.json"
    assert json.loads(record.read_text())["content"] == first
    record.write_text(spoilt)
    assert (content_hash(root), len(hashed)) == (first, 2)
    record.unlink()
    record.parent.rmdir()
    record.parent.write_text("in the way")
    assert (content_hash(root), len(hashed)) == (first, 3)
