"""Frames of a task: decoded through LeRobot, or read from a memory map that was filled that way.

Video decoding gives tens of samples a second where the map gives tens of thousands, so a stage decodes every
frame once. The map is keyed by everything that decides its content and is written whole or not at all.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.datasets.video_utils import decode_video_frames
from tqdm import tqdm

from kuavo_train.config import ConfigError
from kuavo_train.data.tasks import Task

DECODE_TOLERANCE_S = 1e-4


class FrameSource(Protocol):
    def __call__(self, camera: str, rows: np.ndarray) -> torch.Tensor:
        """Frames [len(rows), 3, H, W] uint8 of a camera, by its name in the policy."""


class DecodedFrames:
    """Frames decoded on demand by LeRobot: exact, slow, nothing stored."""

    def __init__(self, task: Task, *, image_size: Sequence[int] | None, video_backend: str):
        self.task = task
        self.image_size = image_size
        self.video_backend = video_backend

    def __call__(self, camera: str, rows: np.ndarray) -> torch.Tensor:
        rows = np.asarray(rows)
        frames: list[torch.Tensor | None] = [None] * len(rows)
        for episode in np.unique(self.task.episode[rows]):
            places = np.flatnonzero(self.task.episode[rows] == episode)
            for place, frame in zip(places, self._decode(camera, int(episode), rows[places]), strict=True):
                frames[place] = frame
        return torch.stack(frames)  # type: ignore[arg-type]

    def _decode(self, camera: str, episode: int, rows: np.ndarray) -> torch.Tensor:
        task, key = self.task, self.task.cameras[camera]
        if key in task.meta.video_keys:
            path = task.root / task.meta.get_video_file_path(episode, key)
            start = float(task.meta.episodes[episode][f"videos/{key}/from_timestamp"])
            times = [start + float(frame) / task.meta.fps for frame in task.frame[rows]]
            try:
                frames = decode_video_frames(path, times, DECODE_TOLERANCE_S, self.video_backend, return_uint8=True)
            except Exception as error:  # each backend raises its own
                raise ConfigError(
                    f"{task.name}: video {path} must decode, episode {episode}, frames "
                    f"{int(task.frame[rows].min())} to {int(task.frame[rows].max())}: {str(error).splitlines()[0]}"
                ) from error
        else:
            frames = self._read_images(key, rows)
        if self.image_size is not None and list(frames.shape[-2:]) != list(self.image_size):
            resized = F.interpolate(
                frames.float(), size=list(self.image_size), mode="bilinear", antialias=True, align_corners=False
            )
            frames = resized.round().clamp(0, 255).to(torch.uint8)
        return frames

    def _read_images(self, key: str, rows: np.ndarray) -> torch.Tensor:
        dataset = LeRobotDataset(
            f"local/{self.task.name}", root=self.task.root, video_backend=self.video_backend, download_videos=False
        )
        images = dataset.hf_dataset.with_format(None)[[int(row) for row in rows]][key]
        return torch.stack([torch.from_numpy(np.asarray(image.convert("RGB"))).permute(2, 0, 1) for image in images])


class CachedFrames:
    """Frames read from one memory map per camera, [N, 3, H, W] uint8."""

    def __init__(self, folder: Path, cameras: Sequence[str]):
        self.maps = {camera: np.load(folder / f"{camera}.npy", mmap_mode="r") for camera in cameras}

    def __call__(self, camera: str, rows: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(self.maps[camera][rows])


def cached_frames(decoded: DecodedFrames, folder: Path, *, progress: bool = True) -> CachedFrames:
    """Open the frame cache of a task below `folder`, decoding every frame first if it is not there yet.

    Raises:
        ConfigError: a video does not decode, or the disk cannot hold the cache.
    """
    task = decoded.task
    key = {
        "dataset": task.content_hash,
        "cameras": task.cameras,
        "image_size": decoded.image_size and list(decoded.image_size),
        "video_backend": decoded.video_backend,
    }
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    target = folder / f"{task.name}-{name}"
    if not target.is_dir():
        _fill(decoded, target, progress=progress)
    return CachedFrames(target, list(task.cameras))


def _fill(decoded: DecodedFrames, target: Path, *, progress: bool) -> None:
    task = decoded.task
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    target.parent.mkdir(parents=True, exist_ok=True)
    for leftover in target.parent.glob(f".{target.name}.partial-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir()
    try:
        maps = {}
        for camera in task.cameras:
            shape = (len(task.state), *decoded(camera, np.array([0])).shape[1:])
            size, free = int(np.prod(shape)) * len(task.cameras), shutil.disk_usage(target.parent).free
            if size > free:
                raise ConfigError(
                    f"data.frame_cache needs {size / 2**30:.1f} GiB below {target.parent}, {free / 2**30:.1f} GiB are "
                    "free; free some, set data.image_size smaller or data.frame_cache=false"
                )
            maps[camera] = np.lib.format.open_memmap(partial / f"{camera}.npy", "w+", np.uint8, shape)

        def fill_episode(episode: int) -> None:
            rows = np.arange(*task.bounds[episode])
            for camera, frames in maps.items():
                frames[rows] = decoded(camera, rows).numpy()

        episodes = [*task.train_episodes, *task.held_out_episodes]
        with (
            ThreadPoolExecutor(os.cpu_count()) as pool,
            tqdm(
                total=len(episodes), desc=f"decode {task.name}", unit="episode", disable=not progress, leave=False
            ) as bar,
        ):
            for _ in pool.map(fill_episode, episodes):
                bar.update()
        for frames in maps.values():
            frames.flush()
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
