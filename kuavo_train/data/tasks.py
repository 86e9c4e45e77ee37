"""One task: its LeRobot dataset, its episode split, its instruction, its features by name.

Tables (state, action, episode bounds) are held in memory; frames come from cache.py. Rows are the dataset's
own `index`, so row r of a task is frame `index == r` of its LeRobotDataset.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.utils.constants import ACTION, DEFAULT_FEATURES, OBS_STATE

from kuavo_train.config import ConfigError, DataConfig, StageConfig

BASE_NAMES = ("cmd_pos_x", "cmd_pos_y", "cmd_pos_yaw", "ctrl_change_cmd")


@dataclass(frozen=True)
class Task:
    """A task's demonstrations, opened.

    Attributes:
        state, action: [N, S] and [N, A] float32 in robot units (rad, claws in [0, 1], m).
        episode, frame: [N] episode of each row and its place in it.
        bounds: [E, 2] first row and one past the last row of each episode.
        cameras: name in the policy → name in the dataset, in the policy's order.
    """

    name: str
    index: int
    instruction: str
    root: Path
    meta: LeRobotDatasetMetadata
    state_names: tuple[str, ...]
    action_names: tuple[str, ...]
    state: np.ndarray
    action: np.ndarray
    episode: np.ndarray
    frame: np.ndarray
    bounds: np.ndarray
    train_episodes: tuple[int, ...]
    held_out_episodes: tuple[int, ...]
    cameras: dict[str, str]

    @property
    def unused(self) -> tuple[str, ...]:
        """Features of the dataset beside the robot's state and actions that no part of this project reads."""
        used = {OBS_STATE, ACTION, *self.cameras.values(), *DEFAULT_FEATURES}
        return tuple(key for key in self.meta.features if key not in used)

    def camera_size(self, camera: str) -> tuple[int, int]:
        """(height, width) of the dataset's pictures, of a camera by its name in the policy."""
        shape = self.meta.features[self.cameras[camera]]["shape"]
        height, width = shape[1:] if shape[0] in (1, 3) else shape[:2]  # either order is found in datasets
        return int(height), int(width)

    @cached_property
    def train_rows(self) -> np.ndarray:
        """Rows of the training episodes, ascending."""
        return self.rows_of(self.train_episodes)

    def rows_of(self, episodes: Sequence[int]) -> np.ndarray:
        if not episodes:
            return np.empty(0, dtype=np.int64)
        return np.concatenate([np.arange(*self.bounds[episode]) for episode in episodes])

    @cached_property
    def content_hash(self) -> str:
        """sha256 of the dataset's metadata and tables, and of its videos' names and sizes."""
        digest = hashlib.sha256()
        for path in sorted(path for path in self.root.rglob("*") if path.is_file()):
            relative = path.relative_to(self.root).as_posix()
            if relative.startswith(("meta/", "data/")):
                digest.update(relative.encode() + path.read_bytes())
            elif relative.startswith(("videos/", "images/")):
                digest.update(f"{relative}:{path.stat().st_size}".encode())
        return digest.hexdigest()


def open_task(stage: StageConfig, config: DataConfig) -> Task:
    """Open the dataset of `stage` and split its episodes.

    Raises:
        ConfigError: no dataset there, features or cameras missing, names that do not fit shapes, values that
            are not finite, too few episodes.
    """
    root = Path(stage.root)
    where = f"stage {stage.index} ({stage.name}): dataset {root}"
    if not (root / "meta" / "info.json").is_file():
        raise ConfigError(f"{where} does not exist; record it, or set stage.root or data.root to its folder")
    dataset = LeRobotDataset(
        f"local/{stage.name}", root=root, video_backend=config.video_backend, download_videos=False
    )
    meta = dataset.meta
    for key in (OBS_STATE, ACTION):
        if key not in meta.features:
            raise ConfigError(f"{where} has no feature {key}; it has {', '.join(meta.features)}")
    table = dataset.hf_dataset.with_format("numpy", columns=[OBS_STATE, ACTION, "episode_index", "frame_index"])[:]
    state, action = (np.asarray(np.stack(table[key]), dtype=np.float32) for key in (OBS_STATE, ACTION))
    state_names = _feature_names(meta, OBS_STATE, state.shape[1], where)
    action_names = _feature_names(meta, ACTION, action.shape[1], where)
    for key, names, values in ((OBS_STATE, state_names, state), (ACTION, action_names, action)):
        bad = np.argwhere(~np.isfinite(values))
        if len(bad):
            row, column = bad[0]
            raise ConfigError(
                f"{where}: {key} must be finite, got {values[row, column]} for {names[column]} in episode "
                f"{table['episode_index'][row]}, frame {table['frame_index'][row]} ({len(bad)} such values)"
            )
    bounds = np.stack([meta.episodes["dataset_from_index"], meta.episodes["dataset_to_index"]], axis=1).astype(np.int64)
    train, held_out = split_episodes(
        stage.name, _usable_episodes(stage, len(bounds), where), config.held_out_episodes, config.split_seed
    )
    return Task(
        name=stage.name,
        index=stage.index,
        instruction=instruction_text(stage),
        root=root,
        meta=meta,
        state_names=state_names,
        action_names=action_names,
        state=state,
        action=action,
        episode=np.asarray(table["episode_index"], dtype=np.int64),
        frame=np.asarray(table["frame_index"], dtype=np.int64),
        bounds=bounds,
        train_episodes=train,
        held_out_episodes=held_out,
        cameras=_map_cameras(stage, meta, config.cameras, where),
    )


def instruction_text(stage: StageConfig) -> str:
    """The instruction in one line, as the policy reads it in training and on the robot."""
    return " ".join(stage.instruction.split())


def split_episodes(
    task: str, episodes: Iterable[int], held_out: int, seed: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(training, held-out) episodes: held out are those whose seeded hash of (task, episode) is smallest.

    The order of hashes does not depend on the other episodes, so a longer dataset changes the split little.
    """
    episodes = list(episodes)
    if len(episodes) <= held_out:
        raise ConfigError(
            f"data.held_out_episodes must be less than the {len(episodes)} episodes of {task}, got {held_out}"
        )
    by_hash = sorted(episodes, key=lambda episode: hashlib.sha256(f"{seed}/{task}/{episode}".encode()).digest())
    return tuple(sorted(by_hash[held_out:])), tuple(sorted(by_hash[:held_out]))


def _usable_episodes(stage: StageConfig, total: int, where: str) -> range:
    if stage.episodes is None:
        return range(total)
    first, last = stage.episodes
    if last >= total:
        raise ConfigError(
            f"{where}: stage.episodes must end before {total}, the number of episodes, got {stage.episodes}"
        )
    return range(first, last + 1)


def _feature_names(meta: LeRobotDatasetMetadata, key: str, width: int, where: str) -> tuple[str, ...]:
    names = meta.features[key].get("names")
    if isinstance(names, dict):  # older converters write {"motors": [...]}
        names = [name for group in names.values() for name in group]
    if not names or len(names) != width or len(set(names)) != width:
        raise ConfigError(
            f"{where}: {key} must name each of its {width} dimensions once, got {len(names or [])} names: {names}; "
            "correct `names` in meta/info.json"
        )
    return tuple(names)


def _map_cameras(
    stage: StageConfig, meta: LeRobotDatasetMetadata, cameras: Sequence[str], where: str
) -> dict[str, str]:
    in_policy = {policy: dataset for dataset, policy in stage.cameras.items()}
    mapped = {camera: in_policy.get(camera, camera) for camera in cameras}
    missing = [name for name in mapped.values() if name not in meta.camera_keys]
    if missing:
        raise ConfigError(
            f"{where}: cameras must include {', '.join(missing)}, got {', '.join(meta.camera_keys)}; "
            "correct data.cameras or map them with stage.cameras"
        )
    return mapped


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
        """Columns of each joint group that is there: left_arm, right_arm, claws, base, other."""
        return columns_by_group(self.action_names)


def columns_by_group(names: Sequence[str]) -> dict[str, np.ndarray]:
    """Joint group → places in `names`, groups in order of first appearance."""
    groups: dict[str, list[int]] = {}
    for column, name in enumerate(names):
        groups.setdefault(joint_group(name), []).append(column)
    return {group: np.array(columns) for group, columns in groups.items()}


def joint_group(name: str) -> str:
    if name.startswith("zarm_l"):
        return "left_arm"
    if name.startswith("zarm_r"):
        return "right_arm"
    if name.endswith("_claw"):
        return "claws"
    return "base" if name in BASE_NAMES else "other"
