"""Training throughput from video to weights: `python -m kuavo_train` against `lerobot-train`, the real commands.

Three cameras at 480×640 as h264, frozen vision-language model, same dataset, model size, batch and number of loader
workers (none: on few cores they would take turns with the step). The commands take turns; each reports its own steps,
of which the first is left out. Ours is without memory, so that the work is the same, and without cached keys and
values, which a real dataset has no room for. In later epochs the image embeddings are read. In the first they are
computed: before the first step (`data.feature_fill=before`), which costs so much on top, or in the steps themselves
(`along`), which are then reported as all others.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from accelerate import Accelerator

from benchmarks.measuring import Spread, Table
from benchmarks.models import SIZES, Size
from benchmarks.video_dataset import TASK, write_dataset
from kuavo_train.compose import compose_run
from kuavo_train.runs.run_folder import stage_folder
from kuavo_train.stage.findings import Findings
from kuavo_train.stage.lineage import Start
from kuavo_train.stage.setup import open_stage

STEP_TIMES = re.compile(r"updt_s:(\S+) data_s:(\S+)")


@dataclass(frozen=True)
class Settings:
    size: tuple[str, ...] = ("quarter",)
    height: int = 480
    width: int = 640
    frames: int = 16  # per episode, of three, one of them held out: an epoch must have the steps
    steps: int = 3  # per command, beside the first
    rounds: int = 2
    threads: int = 2
    batch_size: tuple[int, ...] = (8,)  # LeRobot's default


def run(settings: Settings) -> list[Table]:
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        write_dataset(data, height=settings.height, width=settings.width, episodes=3, frames=settings.frames)
        return [
            compare(name, replace(SIZES[name], batch=batch), settings, data, Path(folder) / f"{name}{batch}")
            for name in settings.size
            for batch in settings.batch_size
        ]


def compare(name: str, size: Size, settings: Settings, data: Path, folder: Path) -> Table:
    steps, trained = settings.steps + 1, 2 * settings.frames
    if steps * size.batch > trained:
        raise ValueError(f"frames must be {-(-steps * size.batch // 2)} at least, for {steps} steps of one epoch")
    vlm = size.make_vlm(folder / "vlm")
    filling = seconds_per_embedded_frame(overrides(size, vlm, data, folder, run="fill", steps=1))
    theirs: list[float] = []
    along: list[float] = []
    ours: list[float] = []
    for turn in range(settings.rounds):
        theirs.append(lerobot_train(size, vlm, data, folder / f"lerobot{turn}", settings))
        new_cache = ["data.feature_fill=along", f"data.cache_root={folder / f'cache{turn}'}"]
        run = overrides(size, vlm, data, folder, run=f"along{turn}", steps=steps)
        along.append(kuavo_train([*run, *new_cache], settings))
        ours.append(kuavo_train(overrides(size, vlm, data, folder, run=f"ours{turn}", steps=steps), settings))
    rates = {
        "lerobot-train": theirs,
        "ours, first epoch, embeddings before": [1 / (filling + 1 / rate) for rate in ours],
        "ours, first epoch, embeddings along": along,
        "ours, later epochs": ours,
    }
    rows = [
        {"": who, "samples/s": Spread.of(found), "× lerobot-train": Spread.of(ratios(found, theirs))}
        for who, found in rates.items()
    ]
    return Table(f"{name}, {settings.height}×{settings.width} h264, batch {size.batch}, float32", rows)


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    return [mine / other for mine, other in zip(ours, theirs, strict=True)]


def lerobot_train(size: Size, vlm: Path, data: Path, output: Path, settings: Settings) -> float:
    """Samples per second of LeRobot's command."""
    arguments = {
        "dataset.repo_id": f"local/{TASK}",
        "dataset.root": data / TASK,
        "dataset.video_backend": "pyav",
        "policy.type": "smolvla",
        "policy.device": "cpu",
        "policy.push_to_hub": "false",
        "policy.vlm_model_name": vlm,
        "policy.load_vlm_weights": "false",
        "policy.num_vlm_layers": size.layers,
        "policy.chunk_size": size.chunk,
        "policy.n_action_steps": min(8, size.chunk),
        "policy.resize_imgs_with_padding": f"[{size.image},{size.image}]",
        "policy.tokenizer_max_length": size.language,
        "batch_size": size.batch,
        "num_workers": 0,
        "persistent_workers": "false",
        "steps": settings.steps + 1,
        "log_freq": 1,
        "save_checkpoint": "false",
        "output_dir": output,
    }
    command = ["-m", "lerobot.scripts.lerobot_train", *(f"--{key}={value}" for key, value in arguments.items())]
    times = STEP_TIMES.findall(run_command(command, threads=settings.threads))
    return size.batch / median(float(update) + float(data) for update, data in times[1:])


def kuavo_train(overrides: list[str], settings: Settings) -> float:
    """Samples per second of our command."""
    run_command(["-m", "kuavo_train", f"task=tasks/task1_{TASK}", *overrides], threads=settings.threads)
    steps = stage_folder(compose_run(overrides)[0]).metrics.read()
    return median(step["samples_per_s"] for step in steps[1:])


def run_command(arguments: Sequence[str], *, threads: int) -> str:
    """Everything a command prints. Raises `RuntimeError` with the end of it when it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        raise RuntimeError(
            f"{' '.join(arguments)} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}"
        )
    return done.stdout + done.stderr


def seconds_per_embedded_frame(overrides: list[str]) -> float:
    """Compute all image embeddings of a run, as its first epoch would, and leave them for the next."""
    configs = compose_run(overrides)
    curriculum = [config.stage for config in configs]
    stage = open_stage(configs[0], curriculum, Start(), Accelerator(cpu=True), Findings())
    began = time.perf_counter()
    stage.images.fill(progress=False)
    return (time.perf_counter() - began) / len(stage.tasks[0].state)


def overrides(size: Size, vlm: Path, data: Path, folder: Path, *, run: str, steps: int) -> list[str]:
    return [
        "profile=robot",
        f"run={run}",
        f"outputs={folder / 'outputs'}",
        f"learn=[{TASK}]",
        "stage.instruction=put the parcel into the container",  # as in the dataset
        f"data.root={data}",
        "data.held_out_episodes=1",
        "data.num_workers=0",
        "data.context_cache_limit_gib=0",  # few frames, whose keys and values fit; those of a real dataset do not
        "policy.pretrained_path=null",
        "policy.load_vlm_weights=false",
        "allow_random_frozen_vlm=true",
        f"policy.vlm_model_name={vlm}",
        f"policy.num_vlm_layers={size.layers}",
        f"policy.chunk_size={size.chunk}",
        f"policy.n_action_steps={min(8, size.chunk)}",
        f"policy.resize_imgs_with_padding=[{size.image},{size.image}]",
        "policy.num_mem_tokens=0",
        "policy.mem_backprop_depth=0",
        "training.device=cpu",
        "training.mixed_precision=no",
        f"training.batch_size={size.batch}",
        f"training.max_steps={steps}",
        "training.log_every=1",
        "validation.batch_size=1",
        "validation.draws=1",
    ]
