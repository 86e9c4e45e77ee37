"""What a stage comes from: the stages before it, and the checkpoint that it resumes or begins with."""

from collections.abc import Sequence

from kuavo_train.config import ConfigError, RunConfig, StageConfig
from kuavo_train.data.normalization import Normalization
from kuavo_train.learning.checkpoint import Checkpoint
from kuavo_train.run_folder import StageFolder, stage_folder


def checkpoint_to_resume(config: RunConfig, folder: StageFolder) -> Checkpoint | None:
    """The last checkpoint of an unfinished stage. Raises `ConfigError` for a stage that must not be entered."""
    stage = config.stage
    if folder.status == "finished":
        raise ConfigError(
            f"stage {stage.index} ({stage.name}) is finished in {folder.path}; delete the folder to run it again"
        )
    if config.resume and folder.status != "absent":
        latest = folder.checkpoints.latest()
        return None if latest is None else _checked(latest, config)
    if folder.path.exists() and any(folder.path.iterdir()):
        raise ConfigError(f"{folder.path} must be empty to start into; continue with resume=true, or delete it")
    return None


def stages_before(config: RunConfig, curriculum: Sequence[StageConfig]) -> Sequence[StageConfig]:
    """The stages that learn the tasks before this one's; none before a joint stage."""
    return curriculum[: [other.name for other in curriculum].index(config.learns[0])]


def seen_tasks(config: RunConfig, curriculum: Sequence[StageConfig]) -> list[str]:
    """Tasks learnt up to and including this stage."""
    names = [stage.name for stage in curriculum]
    return names[: names.index(config.learns[-1]) + 1]


def result_before(config: RunConfig, curriculum: Sequence[StageConfig]) -> Checkpoint | None:
    """What the stage before ended in; None for the first stage. Raises `ConfigError` when it is not finished."""
    earlier = stages_before(config, curriculum)
    if not earlier:
        return None
    stage, previous = config.stage, earlier[-1]
    before = stage_folder(config, previous)
    if before.status != "finished":
        resume = " resume=true" if before.status != "absent" else ""
        raise ConfigError(
            f"stage {stage.index} ({stage.name}) must follow a finished stage {previous.index} ({previous.name}), got "
            f"{before.status} in {before.path}; run: python -m kuavo_train "
            f"task=tasks/task{previous.index}_{previous.name} run={config.run}{resume}"
        )
    return _checked(before.checkpoints.at("best"), config)


def _checked(checkpoint: Checkpoint, config: RunConfig) -> Checkpoint:
    """The checkpoint, complete and of this run's normalization. Raises `ConfigError` otherwise."""
    checkpoint.verify()
    path = config.run_folder / "normalization.json"
    expected = Normalization.load(path).hash if path.is_file() else "none"
    if checkpoint.manifest["normalization"] != expected:
        raise ConfigError(
            f"checkpoint {checkpoint.folder} must have the run's normalization {expected[:12]} of {path}, got "
            f"{checkpoint.manifest['normalization'][:12]}; it belongs to another run"
        )
    return checkpoint
