"""Frames of a task: decoded through LeRobot, or read from a memory map that was filled that way.

Video decoding gives tens of samples a second where the map gives tens of thousands, so every frame is decoded
once. Decoding stays the source of truth.
"""

import io
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Unpack

import numpy as np
import torch
import torch.nn.functional as F
from lerobot.datasets.video_utils import decode_video_frames
from PIL import Image

from kuavo_train.config import DataConfig
from kuavo_train.data.images.episode_cache import EpisodeCache, How, fill
from kuavo_train.data.images.part import WHOLE, Shard
from kuavo_train.data.task import Task
from kuavo_train.errors import ConfigError, said
from kuavo_train.reading import Json

DECODE_TOLERANCE_S = 1e-4
OPENING = 4  # frames that decode in the time in which a video is opened and a place in it is sought
BETWEEN_KEYFRAMES = 50  # where a dataset does not say


def resized(frames: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Float frames [n, 3, H, W] of 0 to 255, brought to `size` (height, width) and rounded to whole values."""
    smaller = F.interpolate(frames, size=list(size), mode="bilinear", antialias=True, align_corners=False)
    return smaller.round().clamp(0, 255)


class DecodedFrames:
    """Frames [n, 3, H, W] uint8, decoded on demand by LeRobot: exact, slow, nothing stored."""

    def __init__(self, task: Task, *, image_size: Sequence[int] | None, video_backend: str):
        self.task = task
        self.image_size = image_size
        self.video_backend = video_backend

    @property
    def key(self) -> Json:
        """Everything that decides what the frames look like."""
        return {
            "dataset": self.task.content_hash,
            "cameras": self.task.cameras,
            "image_size": self.image_size and list(self.image_size),
            "video_backend": self.video_backend,
        }

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Camera → (3, H, W)."""
        first = self.task.bounds[0, :1]
        return {camera: tuple(self(camera, first).shape[1:]) for camera in self.task.cameras}

    def checked_shapes(self) -> dict[str, tuple[int, ...]]:
        """`shapes`, after decoding the last frame of every video file: one that was cut off ends early.

        Raises:
            ConfigError: names the file and the first frame that does not decode.
        """
        shapes, task = self.shapes, self.task
        episodes = sorted([*task.train_episodes, *task.held_out_episodes])
        for camera, key in task.cameras.items():
            if key in task.recording.video_keys:
                last_in_file = dict(zip(task.recording.video_files(key, episodes), episodes, strict=True))
                for episode in last_in_file.values():
                    self(camera, task.bounds[episode, 1:] - 1)
        return shapes

    def __call__(self, camera: str, rows: np.ndarray) -> torch.Tensor:
        rows = np.asarray(rows)
        frames: list[torch.Tensor | None] = [None] * len(rows)
        for episode in np.unique(self.task.episode[rows]):
            places = np.flatnonzero(self.task.episode[rows] == episode)
            for place, frame in zip(places, self._decode(camera, int(episode), rows[places]), strict=True):
                frames[place] = frame
        return torch.stack(frames)  # type: ignore[arg-type]

    def _decode(self, camera: str, episode: int, rows: np.ndarray) -> torch.Tensor:
        task, key, recording = self.task, self.task.cameras[camera], self.task.recording
        if key in recording.video_keys:
            (file,) = recording.video_files(key, [episode])
            path, start = task.root / file, float(recording.segments(key)[episode, 0])
            times = [start + float(frame) / recording.fps for frame in task.frame[rows]]
            try:
                frames = self._decode_video(path, times, self._pieces(key, rows))
            except Exception as error:  # each backend raises its own
                first = next((i for i, time in enumerate(times) if not self._decodes(path, time)), 0)
                raise ConfigError(
                    f"{task.name}: video {path} must decode, got an error at frame {int(task.frame[rows[first]])} of "
                    f"episode {episode}, {times[first]:.2f} s into the file: "
                    f"{said(error).splitlines()[0]}; copy the file again, or record or convert it again"
                ) from error
        else:
            frames = self._read_images(key, rows)
        if self.image_size is not None and list(frames.shape[-2:]) != list(self.image_size):
            frames = resized(frames.float(), self.image_size).to(torch.uint8)
        return frames

    def _decode_video(self, path: Path, times: Sequence[float], pieces: Sequence[np.ndarray]) -> torch.Tensor:
        def decode(wanted: Sequence[float]) -> torch.Tensor:
            return decode_video_frames(path, list(wanted), DECODE_TOLERANCE_S, self.video_backend, return_uint8=True)

        if len(pieces) == 1:
            return decode(times)
        order = np.argsort(np.concatenate(pieces))
        return torch.cat([decode([times[place] for place in places]) for places in pieces])[order]

    def _pieces(self, key: str, rows: np.ndarray) -> list[np.ndarray]:
        """Places of rows of one episode, in pieces that are decoded from their first to their last frame.

        What lies farther apart than keyframes is sought: decoding through would take longer.
        """
        order = np.argsort(rows, kind="stable")
        stated = self.task.recording.about_video(key).get("video.g")
        between = stated if isinstance(stated, int) and stated > 0 else BETWEEN_KEYFRAMES
        return np.split(order, np.flatnonzero(np.diff(rows[order]) > max(OPENING, between)) + 1)

    def _decodes(self, path: Path, time: float) -> bool:
        try:
            decode_video_frames(path, [time], DECODE_TOLERANCE_S, self.video_backend, return_uint8=True)
        except Exception:  # each backend raises its own
            return False
        return True

    def _read_images(self, key: str, rows: np.ndarray) -> torch.Tensor:
        pictures = []
        for row, content in zip(rows, self.task.recording.pictures(key, rows), strict=True):
            place = f"frame {int(self.task.frame[row])} of episode {int(self.task.episode[row])}"
            try:
                stored = Image.open(io.BytesIO(content))
                picture = np.array(stored.convert("RGB"))
            except OSError as error:
                raise ConfigError(
                    f"{self.task.name}: picture {key} must decode, got an error at {place}: {said(error)}"
                ) from error
            if stored.mode.startswith(("I", "F")):  # depth: conversion would cut it off at 255
                raise ConfigError(
                    f"{self.task.name}: pictures of {key} in {self.task.root} must have 8 bits, got {stored.mode} at "
                    f"{place}; leave it out of data.cameras, or convert it to 8-bit pictures of three channels"
                )
            pictures.append(torch.from_numpy(picture).permute(2, 0, 1))
        return torch.stack(pictures)


class CachedFrames:
    """Frames [n, 3, H, W] uint8, read from a memory map."""

    def __init__(self, cache: EpisodeCache):
        self.cache = cache

    def __call__(self, camera: str, rows: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(self.cache.read(camera, rows))


def frame_cache(decoded: DecodedFrames, folder: Path) -> EpisodeCache:
    """The cache of a task's frames below `folder`; nothing is written yet."""
    return EpisodeCache(folder / "frames", decoded.task, decoded.key, decoded.shapes, np.uint8)


def fill_frames(
    cache: EpisodeCache, decoded: DecodedFrames, episodes: Sequence[int], shard: Shard = WHOLE, **how: Unpack[How]
) -> None:
    """Decode the episodes that are missing; `shard` as `fill` takes it, `how` as `How` says."""
    what = f"decode {decoded.task.name}"
    fill(cache, episodes, decoded, convert=torch.Tensor.numpy, description=what, shard=shard, **how)


def open_frames(task: Task, config: DataConfig, *, progress: bool = True) -> DecodedFrames | CachedFrames:
    """A task's frames for reading at once: all of all its episodes, decoded first if need be.

    Raises:
        ConfigError: a video does not decode, or the disk cannot hold the cache.
    """
    task = replace(task, feature_stride=1)
    decoded = DecodedFrames(task, image_size=config.image_size, video_backend=config.video_backend)
    if not config.frame_cache:
        return decoded
    cache = frame_cache(decoded, config.cache_folder)
    fill_frames(cache, decoded, [*task.train_episodes, *task.held_out_episodes], progress=progress)
    return CachedFrames(cache)
