"""What a stage does before its first step, by the number of frames of each of four tasks: seconds and memory.

Datasets of tables alone are generated: states and actions of the embedded robot, one picture for all frames. A start is
a process of its own. It hashes the datasets, opens the stage of `profile=smoke` as training and preflight do, and deals
the first batch. The first start has nothing to go by, the second finds the hashes of the first. Imports and the
composing of the configuration are left out, as they do not depend on the data. Memory is the peak of the process above
what it holds after its imports, torch's included.
"""

import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from accelerate import Accelerator
from PIL import Image

from benchmarks.measuring import Table
from kuavo_sim.robot import BASE_NAMES, STATE_NAMES
from kuavo_train.compose import compose_run
from kuavo_train.data.recordings.content_hash import content_hash
from kuavo_train.stage.findings import Findings
from kuavo_train.stage.lineage import Start
from kuavo_train.stage.setup import open_stage

TASKS = ("moving_grasp", "weighing", "placement", "sorting")
CAMERAS = tuple(f"observation.images.{name}" for name in ("head_cam_h", "wrist_cam_l", "wrist_cam_r"))
FPS, EPISODE = 10, 200
ROWS_OF_FILE, ROWS_OF_GROUP = 250_000, 1_000
PICTURE = "images/all.png"


@dataclass(frozen=True)
class Settings:
    frames: tuple[int, ...] = (100_000, 1_000_000)  # of each task


def run(settings: Settings) -> list[Table]:
    return [Table(f"{len(TASKS)} tasks", [row for frames in settings.frames for row in _starts(frames)])]


def _starts(frames: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        for name in TASKS:
            write_tables(data / name, frames=frames, base=name == "sorting")
        command = [sys.executable, "-m", "benchmarks.start_up", folder]
        rows = []
        for which in ("first", "second"):
            printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            rows.append({"start": which, "frames of a task": frames, **json.loads(printed.splitlines()[-1])})
        return rows


def start(folder: Path) -> dict[str, float]:
    """Seconds of the parts of a start on the datasets in `folder`/data, and MiB."""
    words = [
        "profile=smoke",
        "simulation=null",
        "rollout.episodes=0",
        f"outputs={folder / 'outputs'}",
        f"data.root={folder / 'data'}",
        "data.held_out_episodes=1",
        "data.frame_cache=false",
    ]
    configs = compose_run(words)
    before = psutil.Process().memory_info().rss
    seconds = [time.perf_counter()]
    for config in configs:
        content_hash(Path(config.stage.root))
    seconds.append(time.perf_counter())
    opened = open_stage(configs[0], [each.stage for each in configs], Start(), Accelerator(cpu=True), Findings())
    seconds.append(time.perf_counter())
    opened.order.batch(0)
    seconds.append(time.perf_counter())
    parts = dict(zip(("hash s", "open s", "first batch s"), np.diff(seconds).tolist(), strict=True))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10
    return {**parts, "all s": seconds[-1] - seconds[0], "MiB": (peak - before) / 2**20}


def write_tables(root: Path, *, frames: int, base: bool) -> None:
    """A LeRobot v3 dataset of episodes of `EPISODE` frames; its cameras show the same picture in all of them."""
    actions = (*STATE_NAMES, *(BASE_NAMES if base else ()))
    shutil.rmtree(root, ignore_errors=True)
    for part in ("data/chunk-000", "meta/episodes/chunk-000", "images"):
        (root / part).mkdir(parents=True)
    Image.fromarray(np.full((16, 16, 3), 127, np.uint8)).save(root / PICTURE)
    picture = {"dtype": "image", "shape": [16, 16, 3], "names": ["height", "width", "channels"]}
    features = {
        "observation.state": {"dtype": "float32", "shape": [len(STATE_NAMES)], "names": list(STATE_NAMES)},
        "action": {"dtype": "float32", "shape": [len(actions)], "names": list(actions)},
        **dict.fromkeys(CAMERAS, picture),
    }
    first = np.arange(0, frames, EPISODE)
    end = np.minimum(first + EPISODE, frames)
    info = {"codebase_version": "v3.0", "fps": FPS, "features": features, "total_episodes": len(first)}
    (root / "meta" / "info.json").write_text(json.dumps(info))
    pd.DataFrame({"task_index": [0]}, index=[root.name]).to_parquet(root / "meta" / "tasks.parquet")
    places = {
        "episode_index": np.arange(len(first)),
        "length": end - first,
        "dataset_from_index": first,
        "dataset_to_index": end,
        "data/chunk_index": np.zeros_like(first),
        "data/file_index": first // ROWS_OF_FILE,
    }
    pq.write_table(pa.table(places), root / "meta/episodes/chunk-000/file-000.parquet")
    for number, begin in enumerate(range(0, frames, ROWS_OF_FILE)):
        rows = np.arange(begin, min(begin + ROWS_OF_FILE, frames))
        file = root / f"data/chunk-000/file-{number:03}.parquet"
        pq.write_table(_rows(rows, actions), file, row_group_size=ROWS_OF_GROUP)


def _rows(rows: np.ndarray, actions: tuple[str, ...]) -> pa.Table:
    frame = rows % EPISODE
    pictures = pa.StructArray.from_arrays(
        [pa.nulls(len(rows), pa.binary()), pa.array([PICTURE] * len(rows))], ["bytes", "path"]
    )
    return pa.table(
        {
            "observation.state": _values(rows, STATE_NAMES),
            "action": _values(rows + 1, actions),
            "timestamp": (frame / FPS).astype(np.float32),
            "frame_index": frame,
            "episode_index": rows // EPISODE,
            "index": rows,
            "task_index": np.zeros_like(rows),
            **dict.fromkeys(CAMERAS, pictures),
        }
    )


def _values(times: np.ndarray, names: tuple[str, ...]) -> pa.FixedSizeListArray:
    """[N, D] in [0, 1], which is good for claws as for joints in rad."""
    waves = (np.sin(0.1 * times[:, None] + np.arange(len(names))) + 1) / 2
    return pa.FixedSizeListArray.from_arrays(pa.array(waves.astype(np.float32).ravel()), len(names))


if __name__ == "__main__":
    print(json.dumps(start(Path(sys.argv[1]))))
