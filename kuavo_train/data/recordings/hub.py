"""Datasets of the hub, and what to do about what the hub answers."""

import errno
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from lerobot.datasets.dataset_metadata import CODEBASE_VERSION
from lerobot.datasets.utils import CompatibilityError, get_safe_version

from kuavo_train.errors import ConfigError, require, said

RECORD = "fetched_from.json"
"""Beside a dataset: where on the hub it came from. Further files are of the same commit."""


@dataclass(frozen=True)
class HubOrigin:
    """Where on the hub a dataset is from.

    Attributes:
        revision: a branch, a tag or a commit; None is the tag of the format that LeRobot reads.
        commit: what that was when the dataset was fetched; None where it was not fetched from here.
    """

    repo_id: str
    revision: str | None = None
    commit: str | None = None


def origin_of(root: Path, repo_id: str | None, revision: str | None, where: str) -> HubOrigin | None:
    """Of a dataset whose task names a repository of the hub; None for others.

    Raises:
        ConfigError: what lies at `root` was fetched from elsewhere.
    """
    if repo_id is None:
        return None
    try:
        fetched = HubOrigin(**json.loads((root / RECORD).read_text()))
    except (OSError, ValueError, TypeError):
        return HubOrigin(repo_id, revision)
    for key, wanted in (("repo_id", repo_id), ("revision", revision)):
        there = getattr(fetched, key)
        rule = f"be {there!r}, what was fetched there (move it away, or give another stage.root)"
        require(wanted in (there, fetched.commit), f"{where}: {key}", rule, wanted)
    return fetched


def fetch(origin: HubOrigin, root: Path, files: Sequence[str], where: str) -> HubOrigin:
    """Fetch `files` of a dataset, names or patterns, into `root`; all that is fetched there is of one commit.

    Raises:
        ConfigError: says what was requested, what the hub answered, and what to do.
    """
    try:
        commit = origin.commit or _commit(origin)
        fetched = HubOrigin(origin.repo_id, origin.revision, commit)
        root.mkdir(parents=True, exist_ok=True)
        (root / RECORD).write_text(json.dumps(asdict(fetched), indent=1))
        snapshot_download(
            origin.repo_id, repo_type="dataset", revision=commit, local_dir=root, allow_patterns=list(files)
        )
    except Exception as error:  # whatever the hub's library, LeRobot and the disk raise
        wanted = origin.repo_id if origin.revision is None else f"{origin.repo_id} at revision {origin.revision}"
        raise ConfigError(
            f"{where} must be there or be had from the hub as {wanted}, got {one_line(error)}; {remedy(error)}"
        ) from error
    return fetched


def _commit(origin: HubOrigin) -> str:
    revision = origin.revision or get_safe_version(origin.repo_id, CODEBASE_VERSION)
    commit = HfApi().repo_info(origin.repo_id, repo_type="dataset", revision=revision).sha
    assert commit is not None, "the hub names the commit of every revision"
    return commit


def one_line(error: BaseException) -> str:
    """What an error of the hub says, without its line breaks."""
    return " ".join(said(error, limit=600).split())


def remedy(error: BaseException) -> str:
    """What to do about an error of the hub."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    responses = (getattr(each, "response", None) for each in chain)
    status = next((response.status_code for response in responses if response is not None), None)

    def any_is(*kinds: type[BaseException]) -> bool:
        return any(isinstance(each, kinds) for each in chain)

    if any_is(GatedRepoError):
        return "accept its terms on its page of the hub, and log in: hf auth login, or HF_TOKEN"
    if any_is(RepositoryNotFoundError):
        return "check its name; for a private one log in: hf auth login, or HF_TOKEN"
    if any_is(RevisionNotFoundError):
        return "set revision to a branch, a tag or a commit that it has"
    if any_is(HFValidationError):
        return "give it as OWNER/NAME"
    if any(getattr(each, "errno", None) in (errno.ENOSPC, errno.EDQUOT) for each in chain):
        return "free room on the disk"
    if constants.HF_HUB_OFFLINE or any_is(OfflineModeIsEnabled):
        return "set offline=false (HF_HUB_OFFLINE=0) to use the hub, or copy it here"
    if any_is(CompatibilityError):
        return f"convert it, or set revision to one of the format {CODEBASE_VERSION}"
    if any("tagged with a codebase version" in str(each) for each in chain):
        return f"set revision: main in the task's file, if what is there is of the format {CODEBASE_VERSION}"
    if status in (401, 403):
        return "log in: hf auth login, or HF_TOKEN"
    if status is not None:
        return "try again later, or copy it here"
    if any_is(LocalEntryNotFoundError, ConnectionError, TimeoutError) or any(
        type(each).__module__.partition(".")[0] in ("httpx", "httpcore", "requests") for each in chain
    ):
        return f"check the network to {constants.ENDPOINT}, name a mirror (hf_endpoint=https://…), or copy it here"
    return "copy it here, or correct what it is fetched by"
