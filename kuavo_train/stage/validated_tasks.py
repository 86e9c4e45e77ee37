"""The tasks of a run with the episodes that it validates: chosen when a task is first validated, and kept."""

from collections.abc import Sequence
from dataclasses import replace

from kuavo_train.config import RunConfig
from kuavo_train.data.task import Task
from kuavo_train.data.validated import validated_part
from kuavo_train.reading import ANOTHER_RUN
from kuavo_train.runs.stored_run import read_run_record


def validated_tasks(config: RunConfig, tasks: Sequence[Task], stride: int) -> list[Task]:
    """Those of tasks that the run has on record stay as they are there, whatever later stages would choose.

    A run without any checkpoint begins anew, perhaps with other settings.
    """
    path, begun = config.run_folder / "run.json", any(config.run_folder.glob("stage*_*/checkpoints/[!.]*"))
    record = read_run_record(path, remedy=ANOTHER_RUN) if begun and path.is_file() else None
    known = {task.name: task.dataset.validated_episodes for task in (record.tasks if record else ())}
    chosen = validated_part(config, tasks, stride)
    return [_validated(task, known.get(task.name, chosen[task.name])) for task in tasks]


def _validated(task: Task, episodes: tuple[int, ...]) -> Task:
    """Nothing is on record where all are validated, as runs have it that were begun before a part could be."""
    return replace(task, validated_episodes=() if set(episodes) == set(task.held_out_episodes) else episodes)
