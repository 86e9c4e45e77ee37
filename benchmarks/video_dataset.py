"""LeRobot video datasets to measure on: three cameras, pictures that cost a decoder what real ones do."""

from pathlib import Path

import numpy as np
from lerobot.configs.video import RGBEncoderConfig
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.utils.constants import ACTION, OBS_STATE

from benchmarks.models import ACTIONS, CAMERAS, STATE

FPS = 10
TASK = "moving_grasp"  # of configs/tasks: the first, which replays no other


H264 = RGBEncoderConfig(vcodec="h264")


def write_dataset(
    root: Path, *, height: int, width: int, episodes: int, frames: int, encoder: RGBEncoderConfig = H264
) -> Path:
    """A LeRobot v3 dataset of videos below `root`, in the folder named after the task."""
    features = {
        OBS_STATE: {"dtype": "float32", "shape": (STATE,), "names": [f"joint_{n}" for n in range(STATE)]},
        ACTION: {"dtype": "float32", "shape": (ACTIONS,), "names": [f"joint_{n}" for n in range(ACTIONS)]},
    }
    for camera in CAMERAS:
        features[camera] = {
            "dtype": "video",
            "shape": (height, width, 3),
            "names": ["height", "width", "channels"],
        }
    dataset = LeRobotDataset.create(
        f"local/{TASK}",
        FPS,
        features,
        root=root / TASK,
        use_videos=True,
        video_backend="pyav",
        rgb_encoder=encoder,
        streaming_encoding=True,
    )
    random = np.random.default_rng(0)
    for _ in range(episodes):
        scene = _scene(random, height, 2 * width)
        for step in range(frames):
            frame = {
                OBS_STATE: random.normal(size=STATE).astype(np.float32),
                ACTION: random.normal(size=ACTIONS).astype(np.float32),
                "task": "put the parcel into the container",
            }
            for number, camera in enumerate(CAMERAS):  # a camera that moves along the scene, with a sensor's noise
                first = (4 * step + number * width // 3) % width
                noise = random.integers(-6, 7, size=(height, width, 3))
                frame[camera] = np.clip(scene[:, first : first + width] + noise, 0, 255).astype(np.uint8)
            dataset.add_frame(frame)
        dataset.save_episode()
    dataset.finalize()
    return root


def _scene(random: np.random.Generator, height: int, width: int) -> np.ndarray:
    """[height, width, 3] patches of colour of several sizes."""
    scene = np.zeros((height, width, 3))
    for patch in (64, 16, 4):
        colours = random.integers(0, 256, size=(-(-height // patch), -(-width // patch), 3))
        scene += colours.repeat(patch, axis=0)[:height].repeat(patch, axis=1)[:, :width] / 3
    return scene
