"""The data of a stage's tasks, opened: recordings, or what an exported file holds in their place."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kuavo_train.config import RunConfig, StageConfig
from kuavo_train.data.checkpoint_tasks import trained_space
from kuavo_train.data.feature_space import FeatureSpace
from kuavo_train.data.images.frames import DecodedFrames
from kuavo_train.data.normalization import Normalization, fit_normalization, normalization_from_checkpoint
from kuavo_train.data.replay.exported_file import KEY, ExportedTask, exported_tasks
from kuavo_train.data.task import Task, examine_task
from kuavo_train.errors import require
from kuavo_train.stage.findings import Findings
from kuavo_train.stage.lineage import stages_before


@dataclass(frozen=True)
class OpenedData:
    """
    Attributes:
        tasks: those that could be opened, in the order of learning.
        frames: task → its pictures, decoded; not of those that are exported.
        exported: those of `tasks` that are read from a file in place of their recording.
        image_shapes: camera → (3, H, W), the same for all tasks or a problem.
    """

    tasks: list[Task]
    frames: dict[str, DecodedFrames]
    exported: dict[str, ExportedTask]
    image_shapes: Mapping[str, tuple[int, ...]]
    normalization: Normalization


def open_data(config: RunConfig, curriculum: Sequence[StageConfig], findings: Findings) -> OpenedData:
    """The data of all tasks, and the run's statistics of them.

    Raises:
        NotReady: nothing more can be looked at without what cannot be opened.
    """
    data, before = config.data, [stage.name for stage in stages_before(config, curriculum)]
    held = findings.need(findings.attempt(exported_tasks, data, curriculum, before))
    findings.look_at_datasets(curriculum, held)
    opened = [held.get(stage.name) or examine_task(stage, data, findings.problems) for stage in curriculum]
    whole = [task for task in opened if task]
    frames = {
        task.name: DecodedFrames(task, image_size=data.image_size, video_backend=data.video_backend)
        for task in whole
        if task.name not in held
    }
    tasks = [task for each in whole if (task := findings.attempt(_set_apart, config, each))]
    shapes = {name: found for name, each in frames.items() if (found := findings.attempt(each.checked_shapes))}
    shapes |= {name: {c: tuple(shape) for c, shape in each.header.image_shapes.items()} for name, each in held.items()}
    findings.look_at_tasks(tasks, shapes, data.claw_limits)
    # Of what is set apart too: otherwise a strategy that needs it could not be compared with one that does not.
    normalization = findings.need(findings.attempt(_shared_normalization, config, whole) if whole else None)
    for task in tasks:
        findings.attempt(normalization.check_covers, task)
    exported = {task.name: task for task in tasks if isinstance(task, ExportedTask)}
    return OpenedData(tasks, frames, exported, findings.need(next(iter(shapes.values()), None)), normalization)


def _set_apart(config: RunConfig, task: Task) -> Task:
    """The task as this run trains on it. Raises `ConfigError` where nothing of it would be left."""
    count = config.choosing_episodes
    return task.with_choosing_episodes(count, config.data.split_seed) if count else task


def _shared_normalization(config: RunConfig, tasks: list[Task]) -> Normalization:
    """The run's statistics: fixed by its first stage (which writes them when it begins), only read by the others."""
    path, source = config.run_folder / "normalization.json", config.data.normalization
    if path.is_file():
        return Normalization.load(path)
    rule = f"go with a run that has its statistics, in {path}: they are of all training episodes, the file has a part"
    require(config.data.replay_file is None, KEY, rule, config.data.replay_file)
    if source == "pretrained":
        checkpoint = Path(str(config.policy.get("pretrained_path")))
        return normalization_from_checkpoint(checkpoint, FeatureSpace.of(tasks), trained_space(checkpoint))
    return fit_normalization(tasks if source == "joint" else tasks[:1], source)
