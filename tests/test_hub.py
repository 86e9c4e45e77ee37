"""Datasets that come from the hub, and what is said when they do not."""

import fnmatch
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from lerobot.datasets.utils import MISSING_VERSION_TAG_MESSAGE

from kuavo_train.config import RunConfig
from kuavo_train.data.recordings import hub
from kuavo_train.data.recordings.hub import HubOrigin, fetch, remedy
from kuavo_train.data.task import Task, open_task
from kuavo_train.errors import ConfigError, said

LEFT = "observation.images.wrist_cam_l"
COMMIT = "c0ffee"


class FakeHub:
    """One repository, `team/moving_grasp`, and what was fetched from it."""

    def __init__(self, content: Path):
        self.content, self.fetched = content, []

    def repo_info(self, repo_id: str, *, repo_type: str, revision: str) -> SimpleNamespace:
        assert (repo_id, repo_type) == ("team/moving_grasp", "dataset")
        return SimpleNamespace(sha=COMMIT if revision in ("v3.0", "second", COMMIT) else "0ther")

    def snapshot_download(self, repo_id: str, *, revision: str, local_dir: Path, allow_patterns: list[str], **_: Any):
        assert revision == COMMIT
        for path in sorted(path for path in self.content.rglob("*") if path.is_file()):
            name = path.relative_to(self.content).as_posix()
            if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                self.fetched.append(name)
                (local_dir / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, local_dir / name)


@pytest.fixture
def fake(datasets: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub(datasets / "moving_grasp")
    monkeypatch.setattr(hub, "HfApi", lambda: fake)
    monkeypatch.setattr(hub, "snapshot_download", fake.snapshot_download)
    monkeypatch.setattr(hub, "get_safe_version", lambda repo_id, version: version)
    return fake


@pytest.fixture
def opened(configs: list[RunConfig], tmp_path: Path) -> Callable[..., Task]:
    def open_it(cameras: list[str] | None = None, **stage: Any) -> Task:
        about = {"root": str(tmp_path / "fetched"), "repo_id": "team/moving_grasp", **stage}
        data = replace(configs[0].data, cameras=cameras or configs[0].data.cameras)
        return open_task(replace(configs[0].stage, **about), data)

    return open_it


def test_what_is_used_is_fetched_of_one_commit_and_once(opened: Callable[..., Task], fake: FakeHub) -> None:
    task = opened([LEFT], revision="second")
    videos = [name for name in fake.fetched if name.startswith("videos/")]
    assert videos == [f"videos/{LEFT}/chunk-000/file-000.mp4"]
    assert task.origin == HubOrigin("team/moving_grasp", "second", COMMIT)
    assert json.loads((task.root / hub.RECORD).read_text())["commit"] == COMMIT
    fake.fetched.clear()
    assert opened([LEFT], revision="second").origin == task.origin
    assert opened([LEFT], revision=COMMIT).origin == task.origin
    assert fake.fetched == []
    (task.root / "data" / "chunk-000" / "file-000.parquet").unlink()  # an interrupted download goes on
    opened(revision="second")
    assert fake.fetched == [
        "data/chunk-000/file-000.parquet",
        *(f"videos/observation.images.{camera}/chunk-000/file-000.mp4" for camera in ("head_cam_h", "wrist_cam_r")),
    ]


def test_a_dataset_that_was_fetched_from_elsewhere_is_refused(opened: Callable[..., Task], fake: FakeHub) -> None:
    opened(revision="second")
    with pytest.raises(ConfigError, match=r"revision must be 'second', what was fetched there \(.*\), got 'main'"):
        opened(revision="main")
    with pytest.raises(ConfigError, match=r"repo_id must be 'team/moving_grasp', what was fetched there"):
        opened(repo_id="team/other", revision="second")
    with pytest.raises(ConfigError, match="revision must come with the repo_id that it is of, got 'main'"):
        opened(repo_id=None, revision="main")


def answer(status: int) -> httpx.Response:
    return httpx.Response(status, request=httpx.Request("GET", "https://hub/api/datasets/team/nothing"))


def unreachable() -> Exception:
    """As the hub's library tells it: the reason is two causes down."""
    error = LocalEntryNotFoundError("")
    error.__cause__ = httpx.ConnectError("[Errno -2] Name or service not known")
    return error


ANSWERS: list[tuple[str, Exception, str]] = [
    ("no such repository", RepositoryNotFoundError("\n\nNot found", response=answer(404)), "Not found.*hf auth login"),
    ("terms to accept", GatedRepoError("Restricted", response=answer(403)), "Restricted.*accept its terms"),
    ("no such revision", RevisionNotFoundError("gone", response=answer(404)), "gone.*set revision to a branch, a tag"),
    ("no network", unreachable(), "ConnectError: .*Name or service not known; check the network.*hf_endpoint="),
    ("no version", RuntimeError(MISSING_VERSION_TAG_MESSAGE), "must be tagged with a codebase.*set revision: main"),
    ("a full disk", OSError(28, "No space left on device"), "No space left on device; free room"),
    ("nothing said", ValueError(), "got ValueError; "),
    ("out of order", httpx.HTTPStatusError("", request=answer(503).request, response=answer(503)), "try again later"),
]


@pytest.mark.parametrize(("what", "error", "message"), ANSWERS, ids=[what for what, *_ in ANSWERS])
def test_an_error_of_the_hub_says_why_and_what_to_do(
    fake: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, error: Exception, message: str
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "snapshot_download", refuse)
    with pytest.raises(ConfigError, match=message) as refused:
        fetch(HubOrigin("team/nothing", "main", COMMIT), tmp_path, ["meta/**"], "dataset here")
    text = str(refused.value)
    assert text.startswith("dataset here must be there or be had from the hub as team/nothing at revision main, got ")
    assert "\n" not in text
    assert remedy(error) in text


def test_an_error_without_words_is_told_by_what_it_came_from() -> None:
    silent = ValueError()
    silent.__context__ = OSError("the cable is out")
    assert said(silent) == "OSError: the cable is out"
    assert said(ValueError()) == "ValueError"
