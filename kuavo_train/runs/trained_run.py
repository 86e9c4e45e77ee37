"""A trained run opened again, for probes and evaluations: its tasks, its checkpoints, its settings.

run = TrainedRun.open(Path("outputs/embedded"))
task = run.task("weighing")                              # the very data and split it was trained with
policy, preprocessor = run.policy(run.checkpoint(run.stages[-1]))
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.processor import PolicyProcessorPipeline
from omegaconf import OmegaConf

from kuavo_train.compose import resolve, without_data
from kuavo_train.config import RunConfig, StageConfig
from kuavo_train.data.dataset import MixedDataset, frames_of_sample
from kuavo_train.data.images.frames import open_frames
from kuavo_train.data.normalization import Normalization
from kuavo_train.data.task import Task, open_task
from kuavo_train.errors import ConfigError, require
from kuavo_train.reading import Json, read_yaml
from kuavo_train.runs.records import TaskRecord
from kuavo_train.runs.stored_run import StoredRun, StoredStage
from kuavo_train.training.checkpoint import Checkpoint, CheckpointFolder
from kuavo_train.training.optimizer import choose_device
from kuavo_train.wrapper.policy.loading import open_policy, stored_config


def stage_folder_above(checkpoint: Path) -> Path | None:
    """The folder of the stage that a checkpoint, or its pretrained_model, lies in; None where it lies elsewhere."""
    # `absolute`, not `resolve`: run folders may be reached through a link of the user's own
    return next((up for up in checkpoint.absolute().parents if (up / "config.yaml").is_file()), None)


def checkpoint_name(pretrained_model: Path) -> str:
    """That of the folder of its step, where it lies in the one of `best` or `last`."""
    folder = pretrained_model.parent
    return CheckpointFolder(folder.parent).at(folder.name).folder.name


@dataclass(frozen=True)
class TrainedRun:
    """A run folder and what can be opened from it. `stages` are those begun, in the order of training."""

    stored: StoredRun
    normalization: Normalization

    @classmethod
    def open(cls, folder: Path) -> "TrainedRun":
        """Raises RunFolderError or `ConfigError` for a folder that is no run, or not a whole one."""
        stored = StoredRun.open(folder)
        path = folder / "normalization.json"
        require(path.is_file(), str(path), "be there", "no file")
        return cls(stored, Normalization.load(path))

    @property
    def folder(self) -> Path:
        return self.stored.folder

    @property
    def stages(self) -> Sequence[StoredStage]:
        return self.stored.stages

    def config(self, stage: StoredStage) -> RunConfig:
        """The configuration that was in force, with the run where it now is."""
        path = stage.folder / "config.yaml"
        require(path.is_file(), str(path), "be there", "no file")
        # `absolute`, not `resolve`: run folders may be reached through a link of the user's own
        folder = self.folder.absolute()
        settings: Json = read_yaml(path, keys=("stage",))
        try:
            config = resolve(OmegaConf.create(settings))
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error
        data = replace(config.data, root=moved(config.data.root, config.outputs, folder.parent))
        recipe = self._here(config.stage, config.outputs)
        return replace(config, outputs=str(folder.parent), run=folder.name, data=data, stage=recipe)

    def _here(self, stage: StageConfig, outputs: str) -> StageConfig:
        """With its data where it is now. `outputs` are those that the run was trained in."""
        return replace(stage, root=moved(stage.root, outputs, self.folder.absolute().parent))

    @cached_property
    def settings(self) -> RunConfig:
        """Of the last stage: what all stages share."""
        return self.config(self.stages[-1])

    @cached_property
    def curriculum(self) -> list[StageConfig]:
        """The recipe of every task: the one it was learnt with, or what run.json says of its data."""
        return [self._recipe(task) for task in self.stored.tasks]

    def _recipe(self, task: TaskRecord) -> StageConfig:
        for stage in self.stages:
            config = self.config(stage)
            if config.stage.name == task.name:
                return config.stage
        if task.recipe is not None:
            began = read_yaml(self.stages[-1].folder / "config.yaml", keys=("outputs",))["outputs"]
            return self._here(StageConfig(**task.recipe), began)
        # Recorded by an earlier version: nothing of another task's may stand in for what is not known of this one.
        about = {key: getattr(task, key) for key in ("name", "index", "instruction")}
        return replace(without_data(self.settings.stage), **about, root=str(task.dataset.root), replay={task.name: 1.0})

    def recipe(self, name: str) -> StageConfig:
        """Raises `ConfigError` for a task that the run does not have."""
        names = [stage.name for stage in self.curriculum]
        require(name in names, "task", f"be one of the run's ({', '.join(names)})", name)
        return self.curriculum[names.index(name)]

    def task(self, name: str, columns: Json | None = None) -> Task:
        """The task with the data and the split that the run was trained with. Raises `ConfigError` for any other.

        Args:
            columns: those of the cue, in place of the recipe's: "cue_column" → name.
        """
        task = open_task(replace(self.recipe(name), **(columns or {})), self.settings.data)
        dataset = next(entry.dataset for entry in self.stored.tasks if entry.name == name)
        self.normalization.check_covers(task)
        for what, found, known in (
            ("content hash", task.content_hash, dataset.hash),
            ("held-out episodes", list(task.held_out_episodes), list(dataset.held_out_episodes)),
        ):
            require(found == known, f"{what} of {task.root}", f"be what {self.folder} was trained with, {known}", found)
        return task

    @cached_property
    def tasks(self) -> list[Task]:
        """All tasks of the run, in the order of learning."""
        return [self.task(stage.name) for stage in self.curriculum]

    @property
    def learnt(self) -> list[Task]:
        """Those of the finished stages."""
        last = self.stored.finished[-1].index
        return [task for task in self.tasks if self.stored.learnt_in[task.name] <= last]

    def dataset(self, tasks: Sequence[Task], policy_config: PreTrainedConfig) -> MixedDataset:
        """Samples as the policy of that LeRobot config takes them."""
        frames = [open_frames(task, self.settings.data) for task in tasks]
        return MixedDataset(tasks, frames, self.normalization, **frames_of_sample(policy_config))

    def checkpoint(self, stage: StoredStage) -> Checkpoint:
        """What the stage hands on. Raises `ConfigError` when it is damaged or gone."""
        checkpoint = CheckpointFolder(stage.folder / "checkpoints").at("best")
        checkpoint.verify()
        return checkpoint

    @cached_property
    def device(self) -> torch.device:
        return choose_device(self.settings.training.device)

    def autocast(self) -> AbstractContextManager:
        """The precision that the run was validated in."""
        enabled = self.settings.training.mixed_precision == "bf16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled)

    def policy(self, checkpoint: Checkpoint) -> tuple[PreTrainedPolicy, PolicyProcessorPipeline]:
        """The policy of a checkpoint, and its preprocessor, on the run's device."""
        return load_policy(checkpoint.pretrained_model, self.device)


def moved(path: str, was: str, now: Path) -> str:
    """Where what lay below the outputs `was` lies below `now`, where all of them were moved; else as it is."""
    if not Path(path).is_relative_to(was):
        return path
    there = now / Path(path).relative_to(was)
    return str(there) if there.exists() else path


def load_policy(folder: Path, device: torch.device) -> tuple[PreTrainedPolicy, PolicyProcessorPipeline]:
    """A policy and its preprocessor from a `pretrained_model` folder, ready for queries.

    Raises:
        ConfigError: the weights cannot be loaded.
    """
    try:
        policy, (preprocessor, _) = open_policy(folder, stored_config(folder, device.type))
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"checkpoint must load, got {folder}: {str(error)[:500]}") from error
    return policy.to(device).eval(), preprocessor
