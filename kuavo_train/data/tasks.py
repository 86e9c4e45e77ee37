"""One task: its LeRobot dataset, its episode split, its instruction, its features by name.

Tables (state, action, episode bounds) are held in memory; frames come from cache.py. Rows are the dataset's
own `index`, so row r of a task is frame `index == r` of its LeRobotDataset.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from lerobot.datasets.dataset_metadata import CODEBASE_VERSION, LeRobotDatasetMetadata
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.utils.constants import ACTION, DEFAULT_FEATURES, OBS_IMAGES, OBS_STATE

from kuavo_train.config import ConfigError, DataConfig, Problems, StageConfig, require

FULL_TURN = 2 * np.pi  # rad; no joint of an arm turns so far
DEGREE = np.pi / 180
CLAW_MARGIN = 0.05  # of the limits' distance: sensors overshoot
CLAW_SCALES = (1, 100, 140, 255)  # what converters of Kuavo recordings are known to scale the claws to
BASE_GROUPS = {  # each of one unit
    "cmd_pos_x": "base_position",  # m
    "cmd_pos_y": "base_position",
    "cmd_pos_yaw": "base_yaw",  # rad
    "ctrl_change_cmd": "base_mode",  # a switch, 0 or 1
}


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
        return content_hash(self.root)


def content_hash(root: Path) -> str:
    """sha256 of a dataset's metadata and tables, and of its videos' names and sizes."""
    digest = hashlib.sha256()
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        relative = path.relative_to(root).as_posix()
        if relative.startswith(("meta/", "data/")):
            digest.update(relative.encode() + path.read_bytes())
        elif relative.startswith(("videos/", "images/")):
            digest.update(f"{relative}:{path.stat().st_size}".encode())
    return digest.hexdigest()


def open_task(stage: StageConfig, config: DataConfig) -> Task:
    """Open the dataset of `stage` and split its episodes.

    Raises:
        ConfigError: no dataset there, or one of an older format; else all at once: features or cameras missing, names
            that do not fit shapes, values that are not finite or of another scale, too few episodes.
    """
    problems = Problems()
    task = examine_task(stage, config, problems)
    problems.raise_all()
    assert task is not None, "what cannot be opened is a problem"
    return task


def examine_task(stage: StageConfig, config: DataConfig, problems: Problems) -> Task | None:
    """As `open_task`, with what is wrong added to `problems`.

    A task of which only values are wrong is returned all the same, so that the rest can be looked at; None where there
    is nothing to look at.
    """
    root = Path(stage.root)
    where = f"stage {stage.index} ({stage.name}): dataset {root}"
    dataset = problems.attempt(_open_dataset, stage, config, where)
    if dataset is None:
        return None
    meta, table = dataset.meta, dataset.hf_dataset.with_format("numpy")
    places = table.select_columns(["episode_index", "frame_index"])[:]
    episode, frame = (np.asarray(places[key], dtype=np.int64) for key in ("episode_index", "frame_index"))
    bounds = np.stack([meta.episodes["dataset_from_index"], meta.episodes["dataset_to_index"]], axis=1).astype(np.int64)
    split = problems.attempt(_split_usable, stage, len(bounds), config, where)
    used = np.full(len(episode), True) if split is None else np.isin(episode, [*split[0], *split[1]])
    features = {key: problems.attempt(_read_feature, stage, key, table, meta, where) for key in (OBS_STATE, ACTION)}
    for key, feature in features.items():
        if feature is not None:
            names, values = feature[0], feature[1][used]
            problems.attempt(_check_finite, key, names, values, episode[used], frame[used], where)
            problems.attempt(_check_arms, key, names, values, where)
            problems.attempt(_check_claws, key, names, values, config.claw_limits, where)
    cameras = problems.attempt(_map_cameras, stage, meta, config.cameras, where)
    state, action = features[OBS_STATE], features[ACTION]
    if state is None or action is None or cameras is None or split is None:
        return None
    return Task(
        name=stage.name,
        index=stage.index,
        instruction=instruction_text(stage),
        root=root,
        meta=meta,
        state_names=state[0],
        action_names=action[0],
        state=state[1],
        action=action[1],
        episode=episode,
        frame=frame,
        bounds=bounds,
        train_episodes=split[0],
        held_out_episodes=split[1],
        cameras=cameras,
    )


def recorded_fps(stage: StageConfig) -> int | None:
    """Of the dataset, whatever else is wrong with it; None where it does not say."""
    try:
        return json.loads((Path(stage.root) / "meta" / "info.json").read_text()).get("fps")
    except (OSError, ValueError):
        return None


def _open_dataset(stage: StageConfig, config: DataConfig, where: str) -> LeRobotDataset:
    root = Path(stage.root)
    info = root / "meta" / "info.json"
    if not info.is_file() and stage.repo_id is None:
        raise ConfigError(
            f"{where} does not exist; record it (simulated ones: make data), or set stage.root or data.root to its "
            "folder (profile=robot takes data.root from $KUAVO_DATA_ROOT)"
        )
    if info.is_file():
        try:
            version = json.loads(info.read_text()).get("codebase_version")
        except ValueError as error:
            raise ConfigError(f"{where} must have a meta/info.json that can be read, got {error}") from error
        if str(version).split(".")[0] != CODEBASE_VERSION.split(".")[0]:
            raise ConfigError(
                f"{where} must be of LeRobot's format {CODEBASE_VERSION}, got {version}; convert it where it lies: "
                f"python -m lerobot.scripts.convert_dataset_v21_to_v30 --repo-id=local/{stage.name} --root={root} "
                f"--push-to-hub=false (the old one is kept as {root}_old)"
            )
    try:
        return LeRobotDataset(
            stage.repo_id or f"local/{stage.name}",
            root=root,
            video_backend=config.video_backend,
            download_videos=stage.repo_id is not None,
        )
    except Exception as error:  # whatever LeRobot, datasets, pyarrow and the hub raise
        tried = "" if stage.repo_id is None else f" or be had from the hub as {stage.repo_id}"
        raise ConfigError(
            f"{where} must open as a LeRobot dataset{tried}, got {type(error).__name__}: {str(error).splitlines()[0]}"
        ) from error


def _read_feature(
    stage: StageConfig, key: str, table: Dataset, meta: LeRobotDatasetMetadata, where: str
) -> tuple[tuple[str, ...], np.ndarray]:
    """Names, and values [N, D] float32 in robot units."""
    if key not in meta.features:
        raise ConfigError(f"{where} has no feature {key}; it has {', '.join(meta.features)}")
    values = np.asarray(np.stack(table.select_columns([key])[:][key]), dtype=np.float32)
    kind = key.removeprefix("observation.")
    own = stage.state_names if key == OBS_STATE else stage.action_names
    names = _feature_names(meta, own, key, values.shape[1], where)
    factors = {name.split(".", 1)[1]: factor for name, factor in stage.scale.items() if name.startswith(f"{kind}.")}
    for name, factor in factors.items():
        if name not in names:
            raise ConfigError(f"{where}: scale must name dimensions of {kind} ({', '.join(names)}), got {name}")
        values[:, names.index(name)] *= factor
    return names, values


def _check_finite(
    key: str, names: Sequence[str], values: np.ndarray, episode: np.ndarray, frame: np.ndarray, where: str
) -> None:
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        row, column = bad[0]
        raise ConfigError(
            f"{where}: {key} must be finite, got {values[row, column]} for {names[column]} in episode "
            f"{episode[row]}, frame {frame[row]} ({len(bad):,} in episodes "
            f"{', '.join(map(str, np.unique(episode[bad[:, 0]])))}); correct the recording, or use a part of it, "
            "episodes: [first, last] in the task's file"
        )


def _check_arms(key: str, names: Sequence[str], values: np.ndarray, where: str) -> None:
    """Degrees, or a number that some recorder writes for "nothing", would stretch the scale of a joint."""
    kind, groups = key.removeprefix("observation."), columns_by_group(names)
    wrong = []
    for column in np.concatenate([groups.get(group, []) for group in ("left_arm", "right_arm")]).astype(int):
        least, most = np.nanmin(values[:, column]), np.nanmax(values[:, column])
        if max(-least, most) > FULL_TURN:
            wrong.append((f"{kind}.{names[column]}", float(least), float(most)))
    if wrong:
        found = ", ".join(f"{name} from {least:g} to {most:g}" for name, least, most in wrong)
        fix = ", ".join(f"{name}: {DEGREE:.6g}" for name, *_ in wrong)
        raise ConfigError(
            f"{where}: joints of the arms must be in rad, within a full turn, got {found}; if these are degrees, set "
            f"scale: {{{fix}}} in the task's file, else correct the recording"
        )


def _check_claws(
    key: str, names: Sequence[str], values: np.ndarray, limits: Sequence[float] | None, where: str
) -> None:
    """Recordings of different age scale the claws differently; mixed, they would teach two meanings of one number."""
    if limits is None:
        return
    margin, kind = CLAW_MARGIN * (limits[1] - limits[0]), key.removeprefix("observation.")
    wrong = []
    for column in columns_by_group(names).get("claws", ()):
        least, most = np.nanmin(values[:, column]), np.nanmax(values[:, column])
        if least < limits[0] - margin or most > limits[1] + margin:
            wrong.append((f"{kind}.{names[column]}", float(least), float(most)))
    if not wrong:
        return
    found = ", ".join(f"{name} from {least:g} to {most:g}" for name, least, most in wrong)
    whole = next((scale for scale in CLAW_SCALES if max(most for *_, most in wrong) <= scale), None)
    factor = "FACTOR" if whole is None else f"{limits[1] / whole:.6g}"
    fix = ", ".join(f"{name}: {factor}" for name, *_ in wrong)
    raise ConfigError(
        f"{where}: claws must be in {list(limits)} (open to closed), got {found}; if the recording scales them, set "
        f"scale: {{{fix}}} in the task's file, or data.claw_limits=null to take claws as they are in all tasks"
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


def _split_usable(
    stage: StageConfig, total: int, config: DataConfig, where: str
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    first, last = stage.episodes or (0, total - 1)
    if last >= total:
        raise ConfigError(
            f"{where}: stage.episodes must end before {total}, the number of episodes, got {stage.episodes}"
        )
    return split_episodes(stage.name, range(first, last + 1), config.held_out_episodes, config.split_seed)


def _feature_names(
    meta: LeRobotDatasetMetadata, own: Sequence[str] | None, key: str, width: int, where: str
) -> tuple[str, ...]:
    names: Any = own or meta.features[key].get("names") or []
    if isinstance(names, dict):  # Kuavo's converters write {"motors": [...]} or {"state_names": [...]}
        names = [name for group in names.values() for name in group]
    if len(names) != width or len(set(names)) != width:
        kind, first = key.removeprefix("observation."), ", ".join(map(str, names[:width])) or "…"
        raise ConfigError(
            f"{where}: {key} must name each of its {width} dimensions once, got {len(names)} names: "
            f"{', '.join(map(str, names)) or 'none'}; correct `names` in meta/info.json, or set {kind}_names: "
            f"[{first}] in the task's file" + (f" if the first {width} are those" if len(names) > width else "")
        )
    return tuple(names)


def _map_cameras(
    stage: StageConfig, meta: LeRobotDatasetMetadata, cameras: Sequence[str], where: str
) -> dict[str, str]:
    for policy in stage.cameras.values():
        require(policy in cameras, f"{where}: cameras", f"map to data.cameras ({', '.join(cameras)})", policy)
    in_policy = {policy: dataset for dataset, policy in stage.cameras.items()}
    mapped = {camera: in_policy.get(camera, camera) for camera in cameras}
    missing = {camera: name for camera, name in mapped.items() if name not in meta.camera_keys}
    if missing:
        spare = [key for key in meta.camera_keys if key not in mapped.values()]
        spare.sort(key=lambda key: not key.startswith(OBS_IMAGES))  # rather a picture than depth
        fix = ", ".join(
            f"{name}: {camera}" for name, camera in zip(spare or ["NAME IN THE DATASET"], missing, strict=False)
        )
        raise ConfigError(
            f"{where}: cameras must include {', '.join(missing.values())}, got {', '.join(meta.camera_keys)}; name the "
            f"one it is in the dataset, as cameras: {{{fix}}} in the task's file, or leave it out of data.cameras"
        )
    depth = [name for name in mapped.values() if name in meta.depth_keys]
    if depth:
        raise ConfigError(
            f"{where}: cameras must be pictures of three channels, got the depth map {', '.join(depth)}; leave it out, "
            "or convert it to 8-bit pictures"
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
        """Columns of each joint group that is there; what is in a group has one unit."""
        return columns_by_group(self.action_names)


def columns_by_group(names: Sequence[str]) -> dict[str, np.ndarray]:
    """Joint group → places in `names`, groups in order of first appearance."""
    groups: dict[str, list[int]] = {}
    for column, name in enumerate(names):
        groups.setdefault(joint_group(name), []).append(column)
    return {group: np.array(columns) for group, columns in groups.items()}


def joint_group(name: str) -> str:
    """left_arm, right_arm (rad), claws, base_position (m), base_yaw (rad), base_mode (a switch), or other."""
    if name.startswith("zarm_l"):
        return "left_arm"
    if name.startswith("zarm_r"):
        return "right_arm"
    if name.endswith("_claw") or name.startswith("gripper_"):  # a converter calls the claws' state gripper_l, gripper_r
        return "claws"
    return BASE_GROUPS.get(name, "other")
