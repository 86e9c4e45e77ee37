"""Batches of three cameras, state and a 50-step action chunk from a video dataset, without a model.

LeRobot's DataLoader over its LeRobotDataset, as `lerobot-train` makes it but in this process (no workers), against
ours: decoding anew, frames from the memory map, and image embeddings (64 × 960 bfloat16 a camera) from theirs. Same
dataset, same rows. LeRobot gives float32 pictures; of ours that conversion is on the training device, and shown on
its own.
"""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.utils.constants import ACTION
from torch.utils.data import DataLoader

from benchmarks.measuring import Table, alternate, speed_rows
from benchmarks.video_dataset import FPS, TASK, write_dataset
from kuavo_train.compose import compose_run
from kuavo_train.data.batch import preprocess
from kuavo_train.data.dataset import MixedDataset
from kuavo_train.data.images.features import CachedFeatures, Encoder, feature_cache, fill_features
from kuavo_train.data.images.frames import CachedFrames, DecodedFrames, fill_frames, frame_cache
from kuavo_train.data.normalization import fit_normalization
from kuavo_train.data.sampler import Draw
from kuavo_train.data.task import Task, open_task
from lerobot_policy_smolvla_memory.configuration_smolvla_memory import image_features_key

CHUNK = 50
CPU = torch.device("cpu")
PICTURES = {"96x96": (96, 96), "480x640": (480, 640)}


@dataclass(frozen=True)
class Settings:
    pictures: tuple[str, ...] = tuple(PICTURES)
    frames: int = 60  # per episode, of three
    batch_size: int = 16
    rounds: int = 5
    threads: int = 1


def run(settings: Settings) -> list[Table]:
    torch.set_num_threads(settings.threads)
    with tempfile.TemporaryDirectory() as folder:
        return [compare(pictures, settings, Path(folder) / pictures) for pictures in settings.pictures]


def open_written(root: Path, **data: Any) -> Task:
    """The task of `write_dataset`, through the project's own configuration."""
    settings = [f"{key}={value}" for key, value in {"root": root, "held_out_episodes": 1, **data}.items()]
    configs = compose_run(["simulation=null", *(f"data.{setting}" for setting in settings)])
    config = next(config for config in configs if config.stage.name == TASK)
    return open_task(config.stage, config.data)


def compare(pictures: str, settings: Settings, root: Path) -> Table:
    height, width = PICTURES[pictures]
    task = open_written(write_dataset(root, height=height, width=width, episodes=3, frames=settings.frames))
    episodes = [*task.train_episodes, *task.held_out_episodes]
    decoded = DecodedFrames(task, image_size=None, video_backend="pyav")
    frames = frame_cache(decoded, root / "cache")
    fill_frames(frames, decoded, episodes, progress=False)
    encoder = Encoder(_any_embedding, {}, image_features_key, torch.device("cpu"), together=8)
    features = feature_cache(decoded, encoder, root / "cache")
    fill_features(features, encoder, CachedFrames(frames), episodes, progress=False)
    normalization = fit_normalization([task], "joint")

    def dataset(source: Any, image_key: Callable[[str], str] = str) -> MixedDataset:
        return MixedDataset([task], [source], normalization, actions=range(CHUNK), image_key=image_key)

    draws = batches(task, settings.batch_size)
    decoding = dataset(decoded)
    of_frames, of_features = dataset(CachedFrames(frames)), dataset(CachedFeatures(features), image_features_key)
    variants: dict[str, Callable[[], object]] = {
        "LeRobotDataset": partial(next, lerobot_batches(task, settings.batch_size)),
        "ours, decoding": lambda: decoding.fetch(next(draws)),
        "ours, frames": lambda: of_frames.fetch(next(draws)),
        "ours, frames, as float": lambda: preprocess(of_frames.fetch(next(draws)), dict, CPU),
        "ours, features": lambda: of_features.fetch(next(draws)),
    }
    timings = alternate(variants, rounds=settings.rounds)
    table = speed_rows(timings, reference="LeRobotDataset", samples=settings.batch_size)
    return Table(f"{pictures}, h264, batch {settings.batch_size}, {CHUNK} actions", table)


def _any_embedding(pictures: torch.Tensor) -> torch.Tensor:
    return torch.zeros(len(pictures), 64, 960)


def batches(task: Task, size: int) -> Iterator[list[Draw]]:
    """Draws of the task's training rows in random order, without end."""
    random = np.random.default_rng(0)
    while True:
        yield [Draw(0, int(row)) for row in random.choice(task.train_rows, size, replace=False)]


def lerobot_batches(task: Task, size: int) -> Iterator[Any]:
    """Batches of LeRobot's loader in random order, without end."""
    times = {ACTION: [step / FPS for step in range(CHUNK)]}
    dataset = LeRobotDataset(
        f"local/{task.name}", root=task.root, delta_timestamps=times, video_backend="pyav", download_videos=False
    )
    while True:
        yield from DataLoader(dataset, batch_size=size, shuffle=True, num_workers=0, drop_last=True)
