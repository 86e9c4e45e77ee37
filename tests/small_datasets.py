"""Small real LeRobot datasets, recorded on the spot."""

from pathlib import Path

import numpy as np
from lerobot.configs.video import RGBEncoderConfig
from lerobot.datasets.lerobot_dataset import LeRobotDataset

TASK_NAMES = ("moving_grasp", "weighing", "placement", "sorting")
CAMERAS = ("head_cam_h", "wrist_cam_l", "wrist_cam_r")
ARM_NAMES = [
    *[f"zarm_l{joint}_link" for joint in range(1, 8)],
    "left_claw",
    *[f"zarm_r{joint}_link" for joint in range(1, 8)],
    "right_claw",
]
BASE_NAMES = ["cmd_pos_x", "cmd_pos_y", "cmd_pos_yaw", "ctrl_change_cmd"]


def write_dataset(
    root: Path,
    *,
    episodes: int = 5,
    length: int = 14,
    base: bool = False,
    seed: int = 0,
    size: int = 32,
    names: list[str] | None = None,
    cameras: tuple[str, ...] = CAMERAS,
    fps: int = 10,
    videos: bool = True,
) -> Path:
    """A LeRobot v3 dataset whose next joint angles can be read off its frames and state."""
    action_names = names or ARM_NAMES + (BASE_NAMES if base else [])
    features = {
        "observation.state": {"dtype": "float32", "shape": (16,), "names": ARM_NAMES},
        "action": {"dtype": "float32", "shape": (len(action_names),), "names": action_names},
        **{
            f"observation.images.{camera}": {
                "dtype": "video" if videos else "image",
                "shape": (size, size, 3),
                "names": ["height", "width", "channels"],
            }
            for camera in cameras
        },
    }
    dataset = LeRobotDataset.create(
        f"local/{root.name}",
        fps,
        features,
        root=root,
        use_videos=videos,
        video_backend="pyav",
        rgb_encoder=RGBEncoderConfig(vcodec="h264"),
    )
    random = np.random.default_rng(seed)
    for _ in range(episodes):
        phase, speed = random.uniform(0, 3), random.uniform(0.1, 0.3)
        for step in range(length):
            state = np.sin(phase + speed * step + np.arange(16)).astype(np.float32)
            action = np.resize(np.sin(phase + speed * (step + 1) + np.arange(len(action_names))), len(action_names))
            frame = {"observation.state": state, "action": action.astype(np.float32), "task": root.name}
            for number, camera in enumerate(cameras):
                shade = int(127 + 100 * np.sin(phase + speed * step + number))
                frame[f"observation.images.{camera}"] = np.full((size, size, 3), shade, dtype=np.uint8)
            dataset.add_frame(frame)
        dataset.save_episode()
    dataset.finalize()
    return root
