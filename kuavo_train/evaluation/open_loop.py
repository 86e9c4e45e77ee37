"""Policies on demonstrations, without a simulator: how far are the actions they plan from those that were shown?

Every episode is walked at the policy's own pace, memory carried: a look every `n_action_steps` frames. Errors are mean
absolute ones in robot units (rad, claws in [0, 1], the base in m and rad), over the whole chunk planned from each look,
as far as the episode goes. They are averaged within episodes first, so that intervals are over episodes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import batched

import numpy as np
from lerobot.utils.constants import OBS_STATE
from tqdm import tqdm

from kuavo_train.data.images.source import ImageSource
from kuavo_train.data.recordings.joint_groups import columns_by_group
from kuavo_train.data.task import Task
from kuavo_train.evaluation.ablations import Ablatable
from kuavo_train.metrics.intervals import mean_interval, paired_bootstrap
from kuavo_train.reading import Json

Columns = slice | np.ndarray  # of the actions


@dataclass(frozen=True)
class Errors:
    """Of one episode: mean absolute error [T, A] over its queries; NaN where no query's chunk reaches so far."""

    queries: int
    error: np.ndarray


def walk(
    policy: Ablatable,
    task: Task,
    episodes: Sequence[int],
    frames: ImageSource,
    *,
    parallel: int,
    progress: bool = True,
) -> dict[int, Errors]:
    """Episode → errors. `parallel` episodes are walked at a time, each with its own memory and noise."""
    found: dict[int, Errors] = {}
    with tqdm(total=len(episodes), desc=f"walking {task.name}", unit="episode", disable=not progress) as bar:
        for group in batched(episodes, parallel):
            found |= _walk_together(policy, task, group, frames)
            bar.update(len(group))
    return found


def _walk_together(policy: Ablatable, task: Task, episodes: Sequence[int], frames: ImageSource) -> dict[int, Errors]:
    stride = policy.n_action_steps
    queries = {e: np.arange(task.bounds[e, 0], task.bounds[e, 1], stride) for e in episodes}  # rows looked at
    pictures = {
        camera: {e: frames(camera, rows).permute(0, 2, 3, 1).numpy() for e, rows in queries.items()}
        for camera in task.cameras
    }
    policy.reset(seeds=list(episodes))
    errors: dict[int, list[np.ndarray]] = {episode: [] for episode in episodes}
    for number in range(max(map(len, queries.values()))):
        # The batch keeps its size: an episode that is over is shown its last look again, and not listened to.
        at = {episode: min(number, len(rows) - 1) for episode, rows in queries.items()}
        look = {camera: np.stack([of[e][at[e]] for e in episodes]) for camera, of in pictures.items()}
        state = np.stack([task.state[queries[e][at[e]]] for e in episodes])
        instructions = [task.instruction_at(queries[e][at[e]]) for e in episodes]
        chunks = policy.predict_chunk({**look, OBS_STATE: state, "task": instructions})
        for episode, chunk in zip(episodes, chunks, strict=True):
            if number < len(queries[episode]):
                row = queries[episode][number]
                errors[episode].append(_error(chunk, task.action[row : task.bounds[episode, 1]]))
    policy.reset()
    return {e: Errors(len(of_queries), _nanmean(np.stack(of_queries))) for e, of_queries in errors.items()}


def _error(chunk: np.ndarray, shown: np.ndarray) -> np.ndarray:
    """[T, A], NaN beyond the end of what was shown."""
    error = np.full(chunk.shape, np.nan)
    steps = min(len(chunk), len(shown))
    error[:steps] = np.abs(chunk[:steps] - shown[:steps])
    return error


def _nanmean(values: np.ndarray) -> np.ndarray:
    """Mean over the first axis of what is there; NaN where nothing is."""
    there = ~np.isnan(values)
    return np.where(there.any(axis=0), np.nansum(values, axis=0) / np.maximum(there.sum(axis=0), 1), np.nan)


def judge_errors(errors: Mapping[int, Errors], names: Sequence[str], reference: Mapping[int, Errors] | None) -> Json:
    """The numbers of one policy on one task, and how it differs from `reference` on the episodes both walked."""
    groups: dict[str, Columns] = {"all": slice(None), **columns_by_group(names)}
    first = next(iter(errors.values())).error
    return {
        "episodes": sorted(errors),
        "queries": sum(each.queries for each in errors.values()),
        "groups": [
            {
                "name": name,
                "error": asdict(mean_interval(_scores(errors, columns))),
                "difference": None if reference is None else _difference(errors, reference, columns),
                "horizon": [_mean_at(errors, step, columns) for step in range(len(first))],
            }
            for name, columns in groups.items()
        ],
    }


def _scores(errors: Mapping[int, Errors], columns: Columns) -> dict[int, float]:
    return {episode: float(np.nanmean(each.error[:, columns])) for episode, each in errors.items()}


def _difference(errors: Mapping[int, Errors], reference: Mapping[int, Errors], columns: Columns) -> Json | None:
    both = errors.keys() & reference.keys()
    if not both:
        return None
    mine, other = ({e: score for e, score in _scores(of, columns).items() if e in both} for of in (errors, reference))
    return asdict(paired_bootstrap(other, mine))


def _mean_at(errors: Mapping[int, Errors], step: int, columns: Columns) -> float | None:
    """Mean over the episodes in which a chunk reaches so far."""
    values = [np.nanmean(each.error[step, columns]) for each in errors.values() if not np.isnan(each.error[step]).all()]
    return float(np.mean(values)) if values else None
