"""What of each task is kept for replay: chosen when its own stage has ended, taken over by the stages after it."""

from collections.abc import Mapping, Sequence

from kuavo_train.config import RunConfig, StageConfig
from kuavo_train.data.replay.buffer import Kept, choose, kept_count
from kuavo_train.data.replay.exported_file import KEY, ExportedTask
from kuavo_train.data.task import Task
from kuavo_train.errors import ConfigError, require
from kuavo_train.reading import read_json
from kuavo_train.runs.run_folder import StageFolder, stage_folder
from kuavo_train.stage.facts import KeptFacts
from kuavo_train.stage.lineage import Start, stages_before


def kept_of_earlier(
    config: RunConfig, curriculum: Sequence[StageConfig], tasks: Sequence[Task], start: Start
) -> dict[str, Kept]:
    """Task learnt before → what of it may be replayed; nothing where all is.

    What preflight looks at before the earlier stages are there, is what they will choose, but by losses.

    Raises:
        ConfigError: an earlier stage has no record of its choice, or one for other settings or data, or an exported
            file lacks some of what the stage needs.
    """
    for task in tasks:
        if isinstance(task, ExportedTask):
            _check_exported(task, config)
    if not config.replay.keeps_part:
        return {}
    earlier = {stage.name: stage_folder(config, stage) for stage in stages_before(config, curriculum)}
    chosen = {}
    for task in tasks:
        if task.name in earlier:
            folder = earlier[task.name]
            if start.before is not None or folder.buffer.is_file():
                chosen[task.name] = _read(folder, task, config)
            elif isinstance(task, ExportedTask) and task.kept is not None:
                chosen[task.name] = task.kept
            elif config.replay.select != "loss":
                chosen[task.name] = choose(task, config.replay, config.seed)
    return chosen


def _read(folder: StageFolder, task: Task, config: RunConfig) -> Kept:
    if not folder.buffer.is_file():
        raise ConfigError(
            f"{folder.buffer} must be there for replay.buffer={config.replay.buffer}; delete {folder.path} to run that "
            "stage again"
        )
    kept = Kept.from_json(read_json(folder.buffer, keys=Kept.names()))
    if isinstance(task, ExportedTask):  # what was chosen from is not there to choose again
        kept.check_settings(config.replay, config.seed, str(folder.buffer))
        rule = f"hold of {task.name} what is kept of it by {folder.buffer}; export it again"
        require(task.kept == kept, f"{KEY}={task.file}", rule, task.kept and list(task.kept.episodes))
    else:
        kept.check(task, config.replay, config.seed, str(folder.buffer))
    return kept


def _check_exported(task: ExportedTask, config: RunConfig) -> None:
    where, there = f"{KEY}={task.file}", set(task.header.episodes)
    all_kept = f"hold all {len(task.train_episodes)} training episodes of {task.name} where replay.buffer is null"
    require(config.replay.keeps_part or task.kept is None, where, all_kept, task.kept and list(task.kept.episodes))
    held_out = [*task.held_out_episodes, *task.choosing_episodes]
    rule = f"hold the episodes of {task.name} that are held out or set apart ({held_out}); export it again"
    require(there.issuperset(held_out), where, rule, sorted(there))


def kept_of_all(config: RunConfig, tasks: Sequence[Task], known: Mapping[str, Kept]) -> dict[str, KeptFacts]:
    """Of every task, also of those that are still to be learnt; nothing where all is kept."""
    if not config.replay.keeps_part:
        return {}
    return {task.name: _facts(config, task, known.get(task.name)) for task in tasks}


def _facts(config: RunConfig, task: Task, kept: Kept | None) -> KeptFacts:
    if kept is None and config.replay.select == "loss":
        return {
            "episodes": kept_count(config.replay.buffer, len(task.train_episodes)),
            "of_episodes": len(task.train_episodes),
            "frames": None,
            "of_frames": task.train_frames,
            "unit": config.replay.unit,
            "chosen": "loss",
        }
    kept = kept or choose(task, config.replay, config.seed)
    return {
        "episodes": len(kept.episodes),
        "of_episodes": kept.of_episodes,
        "frames": kept.frames,
        "of_frames": kept.of_frames,
        "unit": config.replay.unit,
        "chosen": ", by ".join([config.replay.select, *([kept.found["phases"]] if "phases" in kept.found else [])]),
    }
