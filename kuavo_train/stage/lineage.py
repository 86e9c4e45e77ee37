"""What a stage comes from: the stages before it, and the checkpoint that it resumes or begins with."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kuavo_train.config import RunConfig, StageConfig
from kuavo_train.config_folders import ConfigFolders
from kuavo_train.data.mixture import mixture_of
from kuavo_train.data.normalization import Normalization
from kuavo_train.data.recordings.content_hash import content_hash
from kuavo_train.errors import ConfigError
from kuavo_train.reading import ANOTHER_RUN
from kuavo_train.runs.run_folder import StageFolder, stage_folder
from kuavo_train.runs.settings import differences, refuse, shared_differences
from kuavo_train.runs.stored_run import read_run_record
from kuavo_train.training.checkpoint import Checkpoint
from kuavo_train.training.policy_factory import policy_config_class, policy_defaults


@dataclass(frozen=True)
class Start:
    """What a stage begins with.

    Attributes:
        resumed: its own last checkpoint, where it goes on; None where it begins.
        before: what the stage before ended in; None for the first.
    """

    resumed: Checkpoint | None = None
    before: Checkpoint | None = None

    @property
    def weights(self) -> Checkpoint | None:
        return self.resumed or self.before


def start_of(config: RunConfig, curriculum: Sequence[StageConfig]) -> Start:
    """Raises `ConfigError` for a stage that must not be entered, or not yet."""
    return Start(resumed=checkpoint_to_resume(config, curriculum), before=result_before(config, curriculum))


def check_settings(config: RunConfig, curriculum: Sequence[StageConfig]) -> None:
    """Raises `ConfigError` that names each key in which stage or run was begun otherwise, or an unknown one."""
    folder, stage = stage_folder(config), config.stage
    policy_config_class(config.policy)  # a key that does not exist is no changed setting
    _check_places(config, curriculum)
    latest = folder.checkpoints.latest()
    was = folder.settings if folder.status == "finished" or latest is not None else None
    if was is not None:
        finished = folder.status == "finished"
        found = differences(
            was,
            config,
            policy_defaults=policy_defaults(config.policy["type"]),
            first=not stages_before(config, curriculum),
            finished=finished,
        )
        # Two processes may halve the batch of one: the samples of a step, which the order is cut by, stay the same.
        if latest is not None and latest.manifest.get("samples") == samples_of_batch(config):
            found = [each for each in found if each.key != "training.batch_size"]
        does = "is finished" if finished else "was begun"
        changed = _other_datasets(config, curriculum) if finished else []
        refuse([*found, *changed], f"stage {stage.index} ({stage.name}) {does} in {folder.path} with other settings")
    for path in sorted(config.run_folder.glob("stage*_*")):
        other = StageFolder(path)
        if path != folder.path and other.settings is not None:
            found = shared_differences(other.settings, config, policy_defaults=policy_defaults(config.policy["type"]))
            refuse(found, f"run {config.run} must keep the settings it began with ({path.name}/config.yaml)")
            return


def processes_of(config: RunConfig) -> int:
    """How many train together: those of the command, or as torchrun and accelerate say it to each of theirs."""
    return config.processes if config.processes > 1 else int(os.environ.get("WORLD_SIZE", "1"))


def samples_of_batch(config: RunConfig) -> int:
    """Of all processes together."""
    return config.batch_of_process * processes_of(config)


def _other_datasets(config: RunConfig, curriculum: Sequence[StageConfig]) -> list[str]:
    """What is to be said of the stage's own that lie elsewhere now and are not what the run was trained with."""
    path = config.run_folder / "run.json"
    tasks = read_run_record(path, remedy=ANOTHER_RUN).tasks if path.is_file() else ()
    known = {task.name: task.dataset for task in tasks}
    return [
        f"the dataset of {stage.name} (was {str(was.hash)[:12]}… in {was.root}, is {found[:12]}… in {stage.root})"
        for stage in curriculum
        if stage.name in mixture_of(config).learns
        if (was := known.get(stage.name)) and was.root != str(Path(stage.root)) and Path(stage.root).is_dir()
        if (found := content_hash(Path(stage.root))) != was.hash
    ]


def _check_places(config: RunConfig, curriculum: Sequence[StageConfig]) -> None:
    """Raises `ConfigError` when the run has learnt tasks in another order."""
    of_others = [stage for stage in curriculum if stage.name not in mixture_of(config).learns]
    stages = sorted([config.stage, *of_others], key=lambda stage: stage.index)
    expected = {stage.folder_name for stage in stages}
    for path in sorted(config.run_folder.glob("stage*_*")):
        index, _, name = path.name.removeprefix("stage").partition("_")
        if path.name not in expected and any(str(stage.index) == index or stage.name == name for stage in stages):
            order = ", ".join(stage.folder_name for stage in stages)
            raise ConfigError(
                f"the order of learning must stay what run {config.run} began with ({path.name}), got {order}; "
                "put learn and the task files back, or choose another run=NAME"
            )


def checkpoint_to_resume(config: RunConfig, curriculum: Sequence[StageConfig]) -> Checkpoint | None:
    """The last checkpoint of an unfinished stage. Raises `ConfigError` for a stage that must not be entered."""
    stage, folder = config.stage, stage_folder(config)
    check_settings(config, curriculum)
    if folder.status == "finished":
        raise ConfigError(
            f"stage {stage.index} ({stage.name}) is finished in {folder.path}; delete the folder to run it again"
        )
    if config.resume and folder.status != "absent":
        latest = folder.checkpoints.latest()
        return None if latest is None else _checked(latest, config)
    if folder.holds_files:
        raise ConfigError(f"{folder.path} must be empty to start into; continue with resume=true, or delete it")
    return None


def stages_before(config: RunConfig, curriculum: Sequence[StageConfig]) -> Sequence[StageConfig]:
    """The stages that learn the tasks before those that are new in this one."""
    return curriculum[: [other.name for other in curriculum].index(mixture_of(config).learns[0])]


def seen_tasks(config: RunConfig, curriculum: Sequence[StageConfig]) -> list[str]:
    """Tasks learnt up to and including this stage."""
    names = [stage.name for stage in curriculum]
    return names[: names.index(mixture_of(config).learns[-1]) + 1]


def result_before(config: RunConfig, curriculum: Sequence[StageConfig]) -> Checkpoint | None:
    """What the stage before ended in; None for the first stage. Raises `ConfigError` when it is not finished."""
    earlier = stages_before(config, curriculum)
    if not earlier:
        return None
    stage, previous = config.stage, earlier[-1]
    before = stage_folder(config, previous)
    if before.status != "finished":
        folders = ConfigFolders.of(config)
        resume = " resume=true" if before.status != "absent" else ""
        raise ConfigError(
            f"stage {stage.index} ({stage.name}) must follow a finished stage {previous.index} ({previous.name}), got "
            f"{before.status} in {before.path}; run, with whatever else you set here: python -m kuavo_train "
            f"{' '.join([f'task={folders.choice_of(previous.name)}', f'run={config.run}', *folders.words])} "
            f"profile={config.profile}{_learn_word(config)}{resume}"
        )
    return _checked(before.checkpoints.at("best"), config)


def _learn_word(config: RunConfig) -> str:
    return "" if config.learn is None else f" 'learn=[{','.join(config.learn)}]'"


def _checked(checkpoint: Checkpoint, config: RunConfig) -> Checkpoint:
    """The checkpoint, complete and of this run's normalization. Raises `ConfigError` otherwise."""
    checkpoint.verify()
    path = config.run_folder / "normalization.json"
    expected = Normalization.load(path).hash if path.is_file() else "none"
    if checkpoint.manifest.get("normalization") != expected:
        raise ConfigError(
            f"checkpoint {checkpoint.folder} must have the run's normalization {expected[:12]} of {path}, got "
            f"{str(checkpoint.manifest.get('normalization'))[:12]}; it belongs to another run"
        )
    return checkpoint
