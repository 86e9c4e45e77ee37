"""One task: its LeRobot dataset, its episode split, its instructions, its features by name.

Tables (state, action, episode bounds) are held in memory; frames come from images/. Rows are the dataset's
own `index`, so row r of a task is frame `index == r` of its LeRobotDataset.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from lerobot.datasets.utils import INFO_PATH
from lerobot.utils.constants import ACTION, DEFAULT_FEATURES, OBS_IMAGES, OBS_STATE

from kuavo_train.config import DataConfig, StageConfig
from kuavo_train.data.recordings.checks import (
    check_arms,
    check_cameras,
    check_claws,
    check_clock,
    check_finite,
    check_rows,
    check_segments,
    clock_notes,
    segment_notes,
    unfit,
)
from kuavo_train.data.recordings.content_hash import content_hash
from kuavo_train.data.recordings.cues import Cues, read_cues
from kuavo_train.data.recordings.hub import HubOrigin, fetch, origin_of
from kuavo_train.data.recordings.instructions import Instructions, task_instructions, unknown_task_notes
from kuavo_train.data.recordings.recording import PLACE, MissingFiles, Recording, open_recording
from kuavo_train.data.split import split_episodes, split_usable
from kuavo_train.errors import ConfigError, Problems, require
from kuavo_train.reading import JsonValue


@dataclass(frozen=True)
class Task:
    """A task's demonstrations, opened.

    Attributes:
        state, action: [N, S] and [N, A] float32 in robot units (rad, claws in [0, 1], m).
        episode, frame: [N] episode of each row and its place in it.
        bounds: [E, 2] first row and one past the last row of each episode.
        cameras: name in the policy → name in the dataset, in the policy's order.
        origin: where on the hub the dataset is from; None where its task names nothing there.
        feature_stride: n; samples are of the n-th frames of each episode alone, from its first on.
        choosing_episodes: neither trained on nor reported; what a stage makes of its weights is chosen on them.
        validated_episodes: those held out that the run validates, the same ones throughout; empty: all.
        notes: what is worth a look, but stops nothing.
        cues: what memory must provide, where the dataset says so.
    """

    name: str
    index: int
    instructions: Instructions
    recording: Recording
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
    origin: HubOrigin | None = None
    feature_stride: int = 1
    choosing_episodes: tuple[int, ...] = ()
    validated_episodes: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    cues: Cues | None = None

    @property
    def root(self) -> Path:
        return self.recording.root

    @property
    def instruction(self) -> str:
        """The one that stands for the task; `instruction_at` is that of an episode."""
        return self.instructions.texts[0]

    def instruction_at(self, row: int) -> str:
        return self.instructions.texts[self.instructions.of_row[row]]

    @property
    def unused(self) -> tuple[str, ...]:
        """Features of the dataset that no part of this project reads."""
        used = {OBS_STATE, ACTION, *self.cameras.values(), *DEFAULT_FEATURES, *(self.cues.columns if self.cues else ())}
        return tuple(key for key in self.recording.features if key not in used)

    def camera_size(self, camera: str) -> tuple[int, int]:
        """(height, width) of the dataset's pictures, of a camera by its name in the policy."""
        shape = self.recording.features[self.cameras[camera]]["shape"]
        height, width = shape[1:] if shape[0] in (1, 3) else shape[:2]  # either order is found in datasets
        return int(height), int(width)

    @cached_property
    def train_rows(self) -> np.ndarray:
        """Rows of the training episodes, ascending."""
        return self.rows_of(self.train_episodes)

    @property
    def frames(self) -> int:
        """Of all episodes of the recording."""
        return len(self.state)

    @property
    def train_frames(self) -> int:
        """Of the training episodes."""
        return len(self.train_rows)

    @property
    def train_queries(self) -> int:
        """Frames of the training episodes that samples may be of."""
        lengths = self.recording.lengths[list(self.train_episodes)]
        return int((-(-lengths // self.feature_stride)).sum())

    @cached_property
    def mean_action(self) -> np.ndarray:
        """[A] over the training frames, in robot units."""
        return self.action[self.train_rows].mean(axis=0)

    @cached_property
    def action_limits(self) -> np.ndarray:
        """[A, 3] least, greatest, greatest change from one frame to the next in the training episodes."""
        actions = [self.action[slice(*self.bounds[episode])] for episode in self.train_episodes]
        every = np.concatenate(actions)
        changes = np.concatenate([np.abs(np.diff(each, axis=0)) for each in actions])
        steps = changes.max(axis=0) if len(changes) else np.zeros(every.shape[1])
        return np.stack([every.min(axis=0), every.max(axis=0), steps], axis=1)

    def rows_of(self, episodes: Sequence[int]) -> np.ndarray:
        if not episodes:
            return np.empty(0, dtype=np.int64)
        return np.concatenate([np.arange(*self.bounds[episode]) for episode in episodes])

    def queries_of(self, episodes: Sequence[int]) -> np.ndarray:
        """Of their rows those that samples may be of: `feature_stride` frames apart, from each episode's first on."""
        rows = self.rows_of(episodes)
        return rows[self.frame[rows] % self.feature_stride == 0]

    @property
    def validated(self) -> tuple[int, ...]:
        """The held-out episodes that losses are of."""
        return self.validated_episodes or self.held_out_episodes

    def judged_on(self, episodes: Sequence[int]) -> "Task":
        """The task with these episodes validated in place of those held out."""
        return replace(self, held_out_episodes=tuple(episodes), validated_episodes=())

    def with_choosing_episodes(self, count: int, seed: int) -> "Task":
        """So many training episodes set apart to choose by. Raises `ConfigError` where none is left to train on."""
        total = len(self.train_episodes)
        require(count < total, "merge.episodes", f"be less than the {total} training episodes of {self.name}", count)
        train, apart = split_episodes(self.name, self.train_episodes, count, seed)
        return replace(self, train_episodes=train, choosing_episodes=apart)

    @cached_property
    def content_hash(self) -> str:
        return content_hash(self.root)


def open_task(stage: StageConfig, config: DataConfig) -> Task:
    """Open the dataset of `stage` and split its episodes.

    Raises:
        ConfigError: no dataset there, or one of an older format; else all at once: files, features or cameras missing,
            episodes whose rows or videos are not theirs, names that do not fit shapes, values that are not finite or of
            another scale, too few episodes, no instruction.
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
    root, attempt = Path(stage.root), problems.attempt
    where = f"stage {stage.index} ({stage.name}): dataset {root}"
    opened = attempt(_open, stage, root, where)
    if opened is None:
        return None
    recording, origin = opened
    split = attempt(split_usable, stage, len(recording.lengths), config, where)
    used = sorted([*split[0], *split[1]]) if split else list(range(len(recording.lengths)))
    cameras = attempt(_map_cameras, stage, recording, config.cameras, where)
    rows = attempt(_read_rows, recording, cameras or {}, used, origin, where)
    if rows is None:
        return None
    episode, frame = (rows[key].astype(np.int64) for key in ("episode_index", "frame_index"))
    in_use = slice(None) if len(used) == len(recording.lengths) else np.isin(episode, used)  # no copy of all
    features = {key: attempt(_read_feature, stage, key, rows, recording, where) for key in (OBS_STATE, ACTION)}
    for key, feature in features.items():
        if feature is not None:
            names, values = feature[0], feature[1][in_use]
            attempt(check_finite, key, names, values, episode[in_use], frame[in_use], where)
            attempt(check_arms, key, names, values, where)
            attempt(check_claws, key, names, values, config.claw_limits, where)
    instructions = attempt(
        task_instructions,
        stage.instruction,
        recording,
        rows.get("task_index"),
        episode,
        used,
        key=(config.split_seed, stage.name),
        where=where,
    )
    before = len(problems)
    cues = attempt(read_cues, stage, recording, where)
    videos = [key for key in (cameras or {}).values() if key in recording.video_keys]
    attempt(check_rows, recording, rows, where)
    attempt(check_clock, recording, rows, used, where)
    for key in videos:
        attempt(check_segments, recording, key, used, where)
    state, action = features[OBS_STATE], features[ACTION]
    if state is None or action is None or cameras is None or split is None or instructions is None:
        return None
    if len(problems) > before:
        return None
    return Task(
        name=stage.name,
        index=stage.index,
        instructions=instructions,
        recording=recording,
        state_names=state[0],
        action_names=action[0],
        state=state[1],
        action=action[1],
        episode=episode,
        frame=frame,
        bounds=recording.bounds.astype(np.int64),
        train_episodes=split[0],
        held_out_episodes=split[1],
        cameras=cameras,
        origin=origin,
        feature_stride=config.feature_stride,
        notes=(
            *clock_notes(recording, rows, used),
            *unknown_task_notes(recording, rows.get("task_index"), episode, used),
            *(note for key in videos for note in segment_notes(recording, key, used)),
        ),
        cues=cues,
    )


def _open(stage: StageConfig, root: Path, where: str) -> tuple[Recording, HubOrigin | None]:
    """What the dataset says of itself, fetched from the hub where its task says so and it is not there."""
    origin = origin_of(root, stage.repo_id, stage.revision, where)
    if origin is None and not (root / INFO_PATH).is_file():
        raise ConfigError(
            f"{where} does not exist; record it (simulated ones: make data), or set stage.root or data.root to its "
            "folder (profile=robot takes data.root from $KUAVO_DATA_ROOT)"
        )
    if origin is None:
        return open_recording(root, where), None
    try:
        return open_recording(root, where), origin
    except MissingFiles:
        origin = fetch(origin, root, ["meta/**"], where)
        return open_recording(root, where), origin


def _read_rows(
    recording: Recording, cameras: Mapping[str, str], episodes: Sequence[int], origin: HubOrigin | None, where: str
) -> dict[str, np.ndarray]:
    """Place, state and action of all rows; of the files that the task uses, those missing are fetched or named."""
    missing = recording.missing(cameras.values(), episodes)
    if missing and origin is not None:
        fetch(origin, recording.root, missing, where)
        missing = recording.missing(cameras.values(), episodes)
    if missing:
        raise MissingFiles(where, missing)
    rows = recording.read([*PLACE, OBS_STATE, ACTION])
    lacking = [key for key in ("episode_index", "frame_index", "index") if key not in rows]
    require(not lacking, f"{where}: tables", "have the columns episode_index, frame_index and index", list(rows))
    return rows


def _read_feature(
    stage: StageConfig, key: str, rows: Mapping[str, np.ndarray], recording: Recording, where: str
) -> tuple[tuple[str, ...], np.ndarray]:
    """Names, and values [N, D] float32 in robot units."""
    if key in recording.features and key not in rows:
        raise ConfigError(
            f"{where}: tables must have the column {key}, which meta/info.json lists, got {', '.join(rows)}; copy the "
            "files of data/ again, or record or convert it again"
        )
    if key not in recording.features:
        raise ConfigError(f"{where} has no feature {key}; it has {', '.join(recording.features)}")
    values = rows[key].reshape(len(rows[key]), -1).astype(np.float32, copy=False)
    kind = key.removeprefix("observation.")
    own = stage.state_names if key == OBS_STATE else stage.action_names
    names = _feature_names(recording, own, key, values.shape[1], where)
    factors = {name.split(".", 1)[1]: factor for name, factor in stage.scale.items() if name.startswith(f"{kind}.")}
    for name, factor in factors.items():
        if name not in names:
            raise ConfigError(f"{where}: scale must name dimensions of {kind} ({', '.join(names)}), got {name}")
        values[:, names.index(name)] *= factor
    return names, values


def _feature_names(
    recording: Recording, own: Sequence[str] | None, key: str, width: int, where: str
) -> tuple[str, ...]:
    names: JsonValue = own or recording.features[key].get("names") or []
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


def _map_cameras(stage: StageConfig, recording: Recording, cameras: Sequence[str], where: str) -> dict[str, str]:
    for policy in stage.cameras.values():
        require(policy in cameras, f"{where}: cameras", f"map to data.cameras ({', '.join(cameras)})", policy)
    in_policy = {policy: dataset for dataset, policy in stage.cameras.items()}
    mapped = {camera: in_policy.get(camera, camera) for camera in cameras}
    missing = {camera: name for camera, name in mapped.items() if name not in recording.features}
    if missing:
        spare = [key for key in recording.camera_keys if key not in mapped.values() and not unfit(recording, key)]
        spare.sort(key=lambda key: not key.startswith(OBS_IMAGES))  # rather a picture than depth
        fix = ", ".join(
            f"{name}: {camera}" for name, camera in zip(spare or ["NAME IN THE DATASET"], missing, strict=False)
        )
        raise ConfigError(
            f"{where}: cameras must include {', '.join(missing.values())}, got "
            f"{', '.join(recording.camera_keys)}; name the one it is in the dataset, as cameras: {{{fix}}} in the "
            "task's file, or leave it out of data.cameras"
        )
    check_cameras(recording, list(mapped.values()), where)
    return mapped
