"""Frames decoded one by one, as `data.feature_fill=along` needs them, against episode after episode, as `before` does.

Three cameras at 480×640 in LeRobot's own codec with its keyframes, and in h264 with few and with many frames from one
keyframe to the next. Frames are those of an epoch's steps, drawn without replacement from all episodes. One thread.
"""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from lerobot.configs.video import RGBEncoderConfig

from benchmarks.data_path import open_written
from benchmarks.measuring import Table, alternate, speed_rows
from benchmarks.video_dataset import write_dataset
from kuavo_train.data.images.episode_cache import PIECE
from kuavo_train.data.images.frames import DecodedFrames

ENCODERS: Mapping[str, RGBEncoderConfig] = {
    "LeRobot's default": RGBEncoderConfig(),
    "h264, a keyframe every 2 frames": RGBEncoderConfig(vcodec="h264", g=2),
    "h264, a keyframe every 50 frames": RGBEncoderConfig(vcodec="h264", g=50),
}


@dataclass(frozen=True)
class Settings:
    height: int = 480
    width: int = 640
    frames: int = 100  # per episode, of three
    drawn: int = 16  # frames of a step
    rounds: int = 3


def run(settings: Settings) -> list[Table]:
    torch.set_num_threads(1)
    return [compare(name, settings) for name in ENCODERS]


def compare(name: str, settings: Settings) -> Table:
    size = {"height": settings.height, "width": settings.width}
    with tempfile.TemporaryDirectory() as folder:
        write_dataset(Path(folder), **size, episodes=3, frames=settings.frames, encoder=ENCODERS[name])
        task = open_written(Path(folder))
        decoded = DecodedFrames(task, image_size=None, video_backend="pyav")
        rows = task.queries_of([*task.train_episodes, *task.held_out_episodes])
        drawn = np.random.default_rng(0).permutation(rows)

        def in_pieces(order: np.ndarray, piece: int) -> None:
            for camera in task.cameras:
                for first in range(0, len(order), piece):
                    decoded(camera, order[first : first + piece])

        ways = {
            "episode after episode": lambda: in_pieces(rows, PIECE),
            "one by one": lambda: in_pieces(drawn, settings.drawn),
        }
        timings = alternate(ways, rounds=settings.rounds)
    title = f"{name}, {settings.height}x{settings.width}, three cameras"
    return Table(title, speed_rows(timings, reference="episode after episode", samples=len(rows)))
