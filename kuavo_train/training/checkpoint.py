"""Checkpoints that a kill at any instant cannot spoil.

    checkpoints/000500/pretrained_model/   LeRobot's format: weights, config, processors
    checkpoints/000500/training_state/     optimizer, scheduler, progress, adapters
    checkpoints/000500/manifest.json       sha256 of every file, the step, the normalization's hash
    checkpoints/merged-0.6/                weights mixed from those of two stages; like a step, without training_state/
    checkpoints/last, best                 links to one of them; folders that hold the same where there are no links

Written to a hidden folder, flushed to disk, hashed and renamed into place. Copying may turn links into folders, or lose
them: what they stood for is found all the same, and the next save puts links there again.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.processor import PolicyProcessorPipeline
from safetensors.torch import load_model

from kuavo_train.errors import ConfigError
from kuavo_train.reading import Json, read_json
from kuavo_train.training.lora import adapters_merged
from kuavo_train.training.manifest import MANIFEST, manifest_hash
from kuavo_train.training.state import State
from lerobot_policy_smolvla_memory.precision import make_room, stored_dtypes

LINKS = ("last", "best")
FALL_BACK = "delete the checkpoint folder to fall back to the one before"


@dataclass(frozen=True)
class Checkpoint:
    folder: Path
    manifest: Json

    @property
    def step(self) -> int:
        return self.manifest["step"]

    @property
    def pretrained_model(self) -> Path:
        return self.folder / "pretrained_model"

    @property
    def hash(self) -> str:
        return manifest_hash(self.manifest)

    def training_state(self) -> State:
        return torch.load(self.folder / "training_state" / "state.pt", map_location="cpu", weights_only=True)

    def verify(self) -> None:
        """Raises `ConfigError` when a file is missing or differs from its hash."""
        for name, expected in self.manifest["files"].items():
            path = self.folder / name
            found = _sha256(path) if path.is_file() else "no file"
            if found != expected:
                raise ConfigError(
                    f"checkpoint file {path} must have sha256 {expected[:12]}…, got {found[:12]}; "
                    "delete the checkpoint folder to fall back to the one before"
                )


@dataclass(frozen=True)
class Contents:
    """What a checkpoint holds but for its training state.

    Attributes:
        documents: name → text of files that go beside the weights.
        about: what the manifest says beside the step and the hashes.
    """

    policy: PreTrainedPolicy
    processors: Sequence[PolicyProcessorPipeline]
    documents: Mapping[str, str]
    about: Json


class CheckpointFolder:
    """The checkpoints of one stage."""

    def __init__(self, folder: Path):
        self.folder = folder

    def save(
        self,
        step: int,
        contents: Contents,
        training_state: State,
    ) -> Checkpoint:
        """Write the checkpoint of `step` and let `last` point to it. A step already there is kept."""
        checkpoint = self._write(_folder_name(step), step, contents, training_state)
        self.point("last", step)
        return checkpoint

    def save_weights(self, name: str, step: int, contents: Contents) -> Checkpoint:
        """Write a checkpoint that no training resumes from. One already there is kept."""
        return self._write(name, step, contents, None)

    def _write(self, name: str, step: int, contents: Contents, training_state: State | None) -> Checkpoint:
        """Whole or not at all: what is half-written when something fails, such as the disk's room, is removed."""
        if not (self.folder / name / MANIFEST).is_file():
            partial = self.folder / f".{name}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            try:
                self._write_into(partial, step, contents, training_state)
                _remove(self.folder / name)  # a part of a checkpoint, of a copy that was cut off
                partial.rename(self.folder / name)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
            _flush(self.folder)
        return self.at(name)

    def _write_into(self, partial: Path, step: int, contents: Contents, training_state: State | None) -> None:
        model, state = partial / "pretrained_model", partial / "training_state"
        model.mkdir(parents=True)
        with adapters_merged(contents.policy):
            contents.policy.save_pretrained(model)
        for processor in contents.processors:
            processor.save_pretrained(model)
        for file, text in contents.documents.items():
            (model / file).write_text(text)
        if training_state is not None:
            state.mkdir()
            torch.save(training_state, state / "state.pt")
        files = {path.relative_to(partial).as_posix(): _sha256(path) for path in _files(partial)}
        (partial / MANIFEST).write_text(json.dumps({"step": step, **contents.about, "files": files}, indent=1))
        for path in [*_files(partial), *partial.iterdir(), partial]:
            _flush(path)

    def point(self, link: str, target: int | str) -> None:
        """Let `last` or `best` name a checkpoint, in one move.

        On a file system without links it is a folder with the same weights, whose files are hard links where there are
        such. A folder is replaced in two moves; in between `at` finds what it was.
        """
        path, partial, old = self.folder / link, self.folder / f".{link}.partial", self.folder / f".{link}.old"
        _remove(partial)
        try:
            partial.symlink_to(_folder_name(target))
        except (OSError, NotImplementedError):
            _copy_weights(self.folder / _folder_name(target), partial)
        if path.is_dir() and not path.is_symlink():
            _remove(old)
            path.rename(old)
        elif partial.is_dir() and not partial.is_symlink():
            _remove(path)
        os.replace(partial, path)
        _remove(old)

    def at(self, step: int | str) -> Checkpoint:
        """The checkpoint of a step, or of the name that is given to one. Raises `ConfigError` where there is none."""
        name = _folder_name(step)
        places = [self.folder / name, self.folder / f".{name}.old", *self._in_stage_record(name)]
        folder = next((place for place in places if (place / MANIFEST).is_file()), None)
        if folder is None:
            raise ConfigError(f"there must be a checkpoint at {self.folder / name}, got none")
        manifest = (folder / MANIFEST).read_bytes()
        if not folder.is_symlink() and name in LINKS:  # a folder in a link's place: what it holds is that of a step
            steps = [path.parent for path in self.folder.glob(f"[!.]*/{MANIFEST}") if path.parent.name not in LINKS]
            folder = next((each for each in steps if (each / MANIFEST).read_bytes() == manifest), folder)
        keys = ("step", "files")
        return Checkpoint(folder.resolve(), read_json(folder / MANIFEST, keys=keys, remedy=FALL_BACK))

    def _in_stage_record(self, name: str) -> list[Path]:
        """Where a finished stage says that its result is, for a copy that lost the links."""
        stage = self.folder.parent / "stage.json"
        if name != "best" or not stage.is_file():
            return []
        checkpoint = read_json(stage, keys=("status",)).get("checkpoint")
        return [] if checkpoint is None else [self.folder.parent / checkpoint]

    def latest(self) -> Checkpoint | None:
        """The complete checkpoint of the highest step."""
        complete = [path.parent for path in self.folder.glob(f"[0-9]*/{MANIFEST}")]
        return self.at(int(max(complete).name)) if complete else None

    def prune(self, keep: set[int]) -> None:
        """Delete the checkpoints of all other steps, and what killed runs left half-written."""
        for path in self.folder.glob("[0-9]*"):
            if int(path.name) not in keep:
                shutil.rmtree(path)
        for path in self.folder.glob(".[0-9]*.partial"):
            shutil.rmtree(path)


def load_weights(policy: PreTrainedPolicy, checkpoint: Checkpoint) -> None:
    """Give `policy` the weights of a checkpoint of its own kind, exactly."""
    file = str(checkpoint.pretrained_model / "model.safetensors")
    make_room(policy, stored_dtypes(file))
    load_model(policy, file)


def _copy_weights(checkpoint: Path, into: Path) -> None:
    """What opens as a policy, and the manifest: no second copy on the disk where there are hard links."""
    into.mkdir()
    shutil.copytree(checkpoint / "pretrained_model", into / "pretrained_model", copy_function=link_or_copy)
    link_or_copy(checkpoint / MANIFEST, into / MANIFEST)


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """A hard link, where the file system has such."""
    try:
        os.link(source, target)
    except (OSError, NotImplementedError):
        shutil.copy2(source, target)


def _remove(path: Path) -> None:
    """Link, file or folder, if there is any."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _folder_name(checkpoint: int | str) -> str:
    return f"{checkpoint:06d}" if isinstance(checkpoint, int) else checkpoint


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
