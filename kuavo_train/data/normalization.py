"""The one normalization all stages share.

Statistics are fixed before the first stage, hashed and kept with every checkpoint. A stage that redefined them
would redefine what an action means, which looks like forgetting.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from lerobot.utils.constants import ACTION, OBS_STATE

from kuavo_train.data.feature_space import FeatureSpace
from kuavo_train.data.task import Task
from kuavo_train.errors import ConfigError
from kuavo_train.reading import ANOTHER_RUN, Json, read_json

# A joint that hardly moves must not turn sensor noise into the loudest signal. In rad, m or claw units.
STD_FLOOR = 1e-2


@dataclass(frozen=True)
class Normalization:
    """Mean and standard deviation per named dimension of state and action.

    Attributes:
        source: how it came about: joint, first_stage or pretrained.
        statistics: feature → {"names", "mean", "std", "min", "max", "count"}, lists of one length.
    """

    source: str
    statistics: dict[str, Json]

    @property
    def hash(self) -> str:
        return hashlib.sha256(json.dumps(self.statistics, sort_keys=True).encode()).hexdigest()

    @property
    def space(self) -> FeatureSpace:
        return FeatureSpace(tuple(self.statistics[OBS_STATE]["names"]), tuple(self.statistics[ACTION]["names"]))

    def array(self, feature: str, kind: str) -> np.ndarray:
        """[D] float32, `kind` being mean, std, min or max."""
        return np.asarray(self.statistics[feature][kind], dtype=np.float32)

    def for_lerobot(self) -> dict[str, dict[str, torch.Tensor]]:
        """The statistics as LeRobot's normalizer takes them."""
        kinds = ("mean", "std", "min", "max")
        return {
            feature: {kind: torch.from_numpy(self.array(feature, kind)) for kind in kinds}
            for feature in self.statistics
        }

    def to_json(self) -> Json:
        return {"source": self.source, "hash": self.hash, "statistics": self.statistics}

    @classmethod
    def load(cls, path: Path) -> "Normalization":
        """Raises `ConfigError` when the file is damaged, or was edited: its content no longer has its hash."""
        stored = read_json(path, keys=("source", "statistics", "hash"), remedy=ANOTHER_RUN)
        loaded = cls(stored["source"], stored["statistics"])
        if loaded.hash != stored["hash"]:
            raise ConfigError(
                f"{path}: content must have the hash {str(stored['hash'])[:12]}…, got {loaded.hash[:12]}…; "
                f"{ANOTHER_RUN}"
            )
        return loaded

    def check_covers(self, task: Task) -> None:
        """Refuse a task with dimensions that have no statistics: LeRobot would pass them on unnormalized."""
        for feature, names in ((OBS_STATE, task.state_names), (ACTION, task.action_names)):
            missing = [name for name in names if name not in self.statistics[feature]["names"]]
            if missing:
                raise ConfigError(
                    f"normalization ({self.source}) must cover every dimension of {task.name}'s {feature}, "
                    f"missing {', '.join(missing)}; start a new run with data.normalization=joint"
                )


def fit_normalization(tasks: Sequence[Task], source: str) -> Normalization:
    """Frame-weighted statistics over the training episodes of `tasks`; held-out episodes never enter.

    A dimension's statistics come from the tasks that have it.
    """
    statistics: dict[str, Json] = {}
    for feature in (OBS_STATE, ACTION):
        names = list(dict.fromkeys(name for task in tasks for name in _table(task, feature)[0]))
        # One at a time: all dimensions of millions of frames would take gigabytes.
        of_each = [_statistics(_pooled(tasks, feature, name)) for name in names]
        statistics[feature] = {"names": names, **{kind: [each[kind] for each in of_each] for kind in of_each[0]}}
    return Normalization(source, statistics)


def _table(task: Task, feature: str) -> tuple[tuple[str, ...], np.ndarray]:
    """Names, and values [N, D]."""
    return (task.state_names, task.state) if feature == OBS_STATE else (task.action_names, task.action)


def _pooled(tasks: Sequence[Task], feature: str, name: str) -> np.ndarray:
    """A dimension over the training frames of the tasks that have it."""
    having = [(task, *_table(task, feature)) for task in tasks if name in _table(task, feature)[0]]
    return np.concatenate([values[task.train_rows, names.index(name)] for task, names, values in having])


def _statistics(values: np.ndarray) -> dict[str, float]:
    values = values.astype(np.float64)
    return {
        "mean": _rounded(values.mean()),
        "std": _rounded(max(values.std(), STD_FLOOR)),
        "min": _rounded(values.min()),
        "max": _rounded(values.max()),
        "count": len(values),
    }


def _rounded(value: float) -> float:
    """Nine digits: as many as float32 holds, and the same hash on machines that sum in another order."""
    return float(f"{value:.9g}")


def normalization_from_checkpoint(
    folder: Path, space: FeatureSpace, trained: FeatureSpace | None = None
) -> Normalization:
    """The statistics a LeRobot checkpoint was trained with, for the dimensions of `space`.

    Args:
        trained: the checkpoint's own dimensions, where it names them; those of `space` must be the first of them, as
            its weights know a dimension by its place. None: it has those of `space`.

    Raises:
        ConfigError: the checkpoint stores none, or another number of dimensions, or others.
    """
    from safetensors.torch import load_file

    states = sorted(folder.glob("policy_preprocessor*normalizer*.safetensors"))
    stored = load_file(states[0]) if states else {}
    statistics: dict[str, Json] = {}
    own = space if trained is None else trained
    for feature, names, all_names in (
        (OBS_STATE, space.state_names, own.state_names),
        (ACTION, space.action_names, own.action_names),
    ):
        values = {kind: stored.get(f"{feature}.{kind}") for kind in ("mean", "std", "min", "max")}
        if values["mean"] is None or values["std"] is None or len(values["mean"]) != len(all_names):
            raise ConfigError(
                f"data.normalization=pretrained needs {feature} statistics of {len(all_names)} dimensions in {folder}, "
                f"got {None if values['mean'] is None else len(values['mean'])}; use data.normalization=joint"
            )
        if all_names[: len(names)] != names:
            raise ConfigError(
                f"{feature} must have the dimensions that {folder} was trained with, in their order "
                f"({', '.join(all_names)}), got {', '.join(names)}; start from other weights (base=none)"
            )
        statistics[feature] = {
            "names": list(names),
            **{
                kind: [_rounded(float(x)) for x in (values["mean"] if value is None else value)[: len(names)]]
                for kind, value in values.items()
            },
            "count": [0] * len(names),
        }
        statistics[feature]["std"] = [max(std, STD_FLOOR) for std in statistics[feature]["std"]]
    return Normalization("pretrained", statistics)
