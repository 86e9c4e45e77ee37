"""The one space of state and action, by name, that all tasks share."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kuavo_train.data.recordings.joint_groups import columns_by_group
from kuavo_train.data.task import Task


@dataclass(frozen=True)
class FeatureSpace:
    """The union over tasks of state and action dimensions, by name, in order of first appearance."""

    state_names: tuple[str, ...]
    action_names: tuple[str, ...]

    @classmethod
    def of(cls, tasks: Sequence[Task]) -> "FeatureSpace":
        return cls(
            tuple(dict.fromkeys(name for task in tasks for name in task.state_names)),
            tuple(dict.fromkeys(name for task in tasks for name in task.action_names)),
        )

    def state_columns(self, task: Task) -> np.ndarray:
        """[S_task] place in the union of each of the task's own dimensions."""
        return np.array([self.state_names.index(name) for name in task.state_names])

    def action_columns(self, task: Task) -> np.ndarray:
        return np.array([self.action_names.index(name) for name in task.action_names])

    def action_groups(self) -> dict[str, np.ndarray]:
        """Columns of each joint group that is there; what is in a group has one unit."""
        return columns_by_group(self.action_names)
