"""Which phase of its job each frame of a demonstration belongs to.

A recording that knows its sub-goals says it (`subgoal_frames` in kuavo_sim_episodes.jsonl, for every training
episode). Elsewhere phases are read off the actions: a new one begins where a claw closes or opens, and where the arms
change between slow and fast.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kuavo_train.data.recordings.joint_groups import columns_by_group
from kuavo_train.data.task import Task
from kuavo_train.errors import ConfigError
from kuavo_train.reading import Json

SIDE_DATA = "kuavo_sim_episodes.jsonl"
CLOSES, OPENS = 0.6, 0.4
"""Parts of its range at which a claw counts as closed, and as open again; what lies between changes nothing."""
SMOOTHED = 5
"""Frames that a speed is the mean of."""


@dataclass(frozen=True)
class Phases:
    """
    Attributes:
        source: `sub-goals` or `actions`.
        of_row: [N] int64, phases of the training rows from 0 on; −1 elsewhere.
    """

    source: str
    of_row: np.ndarray

    @property
    def count(self) -> int:
        return int(self.of_row.max()) + 1


def phases_of(task: Task) -> Phases:
    """Raises `ConfigError` where the recording's sub-goals cannot be read."""
    subgoals = _subgoal_frames(task)
    if all(episode in subgoals for episode in task.train_episodes):
        return Phases("sub-goals", _numbered(task, [_reached(subgoals[e], n) for e, n in _lengths(task)]))
    return Phases("actions", _numbered(task, _from_actions(task)))


def _lengths(task: Task) -> list[tuple[int, int]]:
    """(episode, frames) of the training episodes."""
    return [(episode, int(np.diff(task.bounds[episode]).item())) for episode in task.train_episodes]


def _numbered(task: Task, labels: Sequence[np.ndarray]) -> np.ndarray:
    """[N] the labels of each training episode's frames, as numbers from 0 without gaps."""
    of_row = np.full(len(task.episode), -1, dtype=np.int64)
    of_row[task.train_rows] = np.unique(np.concatenate(labels), return_inverse=True)[1]
    return of_row


def _subgoal_frames(task: Task) -> dict[int, list[int]]:
    """Episode → first frame that shows each sub-goal; nothing for a dataset without."""
    path = task.root / SIDE_DATA
    if not path.is_file():
        return {}
    try:
        entries: list[Json] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
        return {
            int(entry["episode_index"]): [int(frame) for frame in entry["subgoal_frames"].values()]
            for entry in entries
            if entry.get("subgoal_frames")
        }
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"{path} must hold episode_index and subgoal_frames in each line, for replay.select=phase, got "
            f"{type(error).__name__}: {error}"
        ) from error


def _reached(subgoals: Sequence[int], length: int) -> np.ndarray:
    """[length] how many sub-goals each frame shows."""
    return (np.arange(length)[:, None] >= np.array(subgoals)).sum(axis=1)


def _from_actions(task: Task) -> list[np.ndarray]:
    """Of each training episode [length]: twice the switches of claws so far, plus 1 where the arms are fast.

    Switches beyond what half of the episodes have count as the last of those: rare ones are no phase of their own.
    """
    groups = columns_by_group(task.action_names)
    claws = groups.pop("claws", np.empty(0, dtype=np.int64))
    arms = [columns for group, columns in groups.items() if group.endswith("_arm")] or list(groups.values())
    arm_columns = np.concatenate(arms) if arms else np.empty(0, dtype=np.int64)
    values = task.action[task.train_rows]
    low, high = values[:, claws].min(axis=0), values[:, claws].max(axis=0)
    switches, speeds = [], []
    for episode in task.train_episodes:
        action = task.action[task.rows_of([episode])]
        switches.append(_switches((action[:, claws] - low) / np.maximum(high - low, 1e-6)))
        speeds.append(_speed(action[:, arm_columns]))
    usual = int(np.median([each[-1] for each in switches]))
    typical = np.median(np.concatenate(speeds))
    return [
        2 * np.minimum(switched, usual) + (speed > typical) for switched, speed in zip(switches, speeds, strict=True)
    ]


def _switches(claws: np.ndarray) -> np.ndarray:
    """[T] how often any claw has closed or opened by then, of openings [T, C] in parts of their range."""
    side = np.where(claws > CLOSES, 1, np.where(claws < OPENS, -1, 0))
    last = np.maximum.accumulate(np.where(side != 0, np.arange(len(side))[:, None], 0), axis=0)
    held = np.take_along_axis(side, last, axis=0)  # 0 only before a claw was on any side
    changed = (held[1:] != held[:-1]) & (held[:-1] != 0)
    return np.concatenate([[0], changed.sum(axis=1).cumsum()])


def _speed(joints: np.ndarray) -> np.ndarray:
    """[T] mean absolute change per frame of joints [T, J], smoothed; 0 without joints."""
    if joints.shape[1] == 0 or len(joints) < 2:
        return np.zeros(len(joints))
    change = np.abs(np.diff(joints, axis=0, prepend=joints[:1])).mean(axis=1)
    width = min(SMOOTHED, len(change))
    return np.convolve(change, np.ones(width) / width, mode="same")
