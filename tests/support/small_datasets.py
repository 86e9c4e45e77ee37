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
    size: int | tuple[int, int] = 32,
    names: list[str] | None = None,
    cameras: tuple[str, ...] = CAMERAS,
    fps: int = 10,
    videos: bool = True,
    depth: bool = False,
    depth_camera: bool = False,
    claw_scale: float = 1,
    tasks: list[str] | None = None,
    cues: list[str] | list[int] | None = None,
) -> Path:
    """A LeRobot v3 dataset whose next joint angles can be read off its frames and state.

    Args:
        size: of the pictures, or (height, width).
        depth: also columns observation.depth_h (a video of 8 bits) and observation.depth_l (numbers, in mm).
        depth_camera: also a camera observation.images.depth_h, of depth in mm in one channel, as LeRobot has it.
        claw_scale: what the action's claws are recorded times.
        tasks: what the dataset says of its episodes, in turn; None: the folder's name.
        cues: of its episodes, in turn, as columns `cue`, `cue_visible` (the first two frames) and `decision` (from the
            middle on, for four frames, in which all actions are what the cue says: its place in `cues`).
    """
    height, width = (size, size) if isinstance(size, int) else size
    action_names = names or ARM_NAMES + (BASE_NAMES if base else [])
    features = {
        "observation.state": {"dtype": "float32", "shape": (16,), "names": ARM_NAMES},
        "action": {"dtype": "float32", "shape": (len(action_names),), "names": action_names},
        **{
            f"observation.images.{camera}": {
                "dtype": "video" if videos else "image",
                "shape": (height, width, 3),
                "names": ["height", "width", "channels"],
            }
            for camera in cameras
        },
    }
    if depth:
        features["observation.depth_h"] = dict(features[f"observation.images.{cameras[0]}"])
        features["observation.depth_l"] = {"dtype": "uint16", "shape": (4, 6), "names": ["height", "width"]}
    if depth_camera:
        about = {"shape": (height, width, 1), "info": {"is_depth_map": True}}
        features["observation.images.depth_h"] = {**features[f"observation.images.{cameras[0]}"], **about}
    if cues:
        kind = "string" if isinstance(cues[0], str) else "int64"
        features["cue"] = {"dtype": kind, "shape": (1,), "names": None}
        features |= {key: {"dtype": "bool", "shape": (1,), "names": None} for key in ("cue_visible", "decision")}
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
    for episode in range(episodes):
        task = root.name if tasks is None else tasks[episode % len(tasks)]
        phase, speed = random.uniform(0, 3), random.uniform(0.1, 0.3)
        for step in range(length):
            state = np.sin(phase + speed * step + np.arange(16)).astype(np.float32)
            action = np.resize(np.sin(phase + speed * (step + 1) + np.arange(len(action_names))), len(action_names))
            claws = [name.endswith("_claw") for name in action_names]
            action[claws] = claw_scale * (action[claws] + 1) / 2
            state[[7, 15]] = (state[[7, 15]] + 1) / 2
            frame = {"observation.state": state, "action": action.astype(np.float32), "task": task}
            if depth:
                frame["observation.depth_h"] = np.full((height, width, 3), 200, dtype=np.uint8)
                frame["observation.depth_l"] = np.full((4, 6), 800, dtype=np.uint16)
            if depth_camera:
                frame["observation.images.depth_h"] = np.full((height, width, 1), 800, dtype=np.uint16)
            if cues:
                decides = length // 2 <= step < length // 2 + 4
                cue = cues[episode % len(cues)]
                frame["cue"] = cue if isinstance(cue, str) else np.array([cue])
                frame |= {"cue_visible": np.array([step < 2]), "decision": np.array([decides])}
                if decides:
                    frame["action"][:] = episode % len(cues)
            for number, camera in enumerate(cameras):
                shade = int(127 + 100 * np.sin(phase + speed * step + number))
                frame[f"observation.images.{camera}"] = np.full((height, width, 3), shade, dtype=np.uint8)
            dataset.add_frame(frame)
        dataset.save_episode(parallel_encoding=False)  # three processes would take longer to start
    dataset.finalize()
    return root
