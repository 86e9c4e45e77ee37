"""Which held-out episodes a run validates: all of them, or where tasks are many, a fixed part of each task's.

The part is a function of the data and the configuration alone, without clocks: whoever repeats or resumes a run
validates the same episodes, and a task's losses are of the same ones after every stage.
"""

import hashlib
import math
from collections.abc import Sequence

from kuavo_train.config import RunConfig
from kuavo_train.data.task import Task

LEAST = 2
"""Episodes of a task that are validated in any case: fewer give no interval."""


def validated_part(config: RunConfig, tasks: Sequence[Task], stride: int) -> dict[str, tuple[int, ...]]:
    """Task → its held-out episodes that the run validates, as many of each: those whose seeded hash is smallest.

    As many as keep the queries of a stage's validations within `validation.share` of its samples, in the shortest stage
    that the tasks make and once all of them are learnt; `LEAST` in any case. No strategy and no order of the tasks
    changes that. A query takes about as long as a sample (docs/experiments/forgetting.md).

    Args:
        tasks: all that the run learns.
        stride: frames from one query to the next.
    """
    limit, most = config.validation.share, max(len(task.held_out_episodes) for task in tasks)
    ordered = {task.name: _by_hash(task, config.data.split_seed) for task in tasks}
    count = most
    if limit is not None:
        frames = min(len(task.queries_of([*task.train_episodes, *task.choosing_episodes])) for task in tasks)
        samples = min(frames * config.training.epochs, _most_samples(config))
        times = validations(samples / frames, config.validation.every_epochs)
        per_validation = {
            episodes: sum(queries(task, ordered[task.name][:episodes], stride) for task in tasks)
            for episodes in range(1, most + 1)
        }
        within = [episodes for episodes, asked in per_validation.items() if times * asked <= limit * samples]
        count = max([min(LEAST, most), *within])
    return {task: tuple(sorted(episodes[:count])) for task, episodes in ordered.items()}


def validations(epochs: float, every: int) -> int:
    """Of a stage of so many epochs: those on the way, and that of its result."""
    return math.ceil(epochs / every) + 1


def queries(task: Task, episodes: Sequence[int], stride: int) -> int:
    """So many are made in these episodes of a task."""
    return sum(math.ceil((last - first) / stride) for first, last in task.bounds[list(episodes)].tolist())


def _most_samples(config: RunConfig) -> float:
    """That a task's own stage may train on."""
    training = config.training
    if training.max_steps is None:
        return math.inf
    steps = training.max_steps // (len(config.passes) or 1)  # joint training has the steps of all stages
    return steps * training.batch_size * training.gradient_accumulation_steps


def _by_hash(task: Task, seed: int) -> list[int]:
    def key(episode: int) -> bytes:
        return hashlib.sha256(f"validated/{seed}/{task.name}/{episode}".encode()).digest()

    return sorted(task.held_out_episodes, key=key)
