"""What an image encoder that computes in bfloat16 changes: its embeddings, and the loss of a policy that reads them.

The encoder of the small base that comes with the project, on held-out frames of the first job, which are recorded first
where they are missing; and one of SmolVLA's size with random weights, on random pictures. An embedding's error is the
root of the mean square of what bfloat16 changes, over that of the embedding, each kept as the cache keeps it.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate import Accelerator

from benchmarks.measuring import Spread, Table
from benchmarks.models import CAMERAS, SIZES, lerobot_policy, make_batch, our_policy
from kuavo_train.compose import compose_run
from kuavo_train.data.batch import preprocess
from kuavo_train.data.dataset import MixedDataset, frames_of_sample
from kuavo_train.data.images.frames import open_frames
from kuavo_train.data.sampler import Draw
from kuavo_train.stage.findings import Findings
from kuavo_train.stage.lineage import Start
from kuavo_train.stage.setup import open_stage, record_missing_data
from lerobot_policy_smolvla_memory import SmolVLAMemoryPolicy
from lerobot_policy_smolvla_memory.configuration_smolvla_memory import image_features_key

CPU = torch.device("cpu")
HOW: dict[str, Callable[[], AbstractContextManager]] = {
    "float32": nullcontext,
    "bfloat16": partial(torch.autocast, "cpu", torch.bfloat16),
}


@dataclass(frozen=True)
class Settings:
    frames: int = 256  # of the held-out episodes, evenly spread
    draws: int = 8  # of noise and time, for each of them
    pictures: int = 4  # that the large encoder is shown


def run(settings: Settings) -> list[Table]:
    return [of_base(settings), of_full_size(settings)]


@torch.no_grad()
def of_base(settings: Settings, *words: str) -> Table:
    (config,) = compose_run(["learn=[moving_grasp]", "rollout.episodes=0", *words])
    record_missing_data(config, [config.stage])
    stage = open_stage(config, [config.stage], Start(), Accelerator(cpu=True), Findings())
    (task,), policy = stage.tasks, stage.built.policy.eval()
    assert isinstance(policy, SmolVLAMemoryPolicy)
    rows = task.queries_of(task.held_out_episodes)
    rows = rows[:: max(1, len(rows) // settings.frames)][: settings.frames]
    frames = open_frames(task, config.data, progress=False)
    dataset = MixedDataset([task], [frames], stage.normalization, **frames_of_sample(policy.config))
    batch = preprocess(dataset.fetch([Draw(0, int(row)) for row in rows]), stage.built.preprocessor, CPU)
    errors, read = embedded(policy, batch)
    losses: dict[str, list[float]] = {how: [] for how in HOW}
    size, chunk = len(rows), (policy.config.chunk_size, policy.config.max_action_dim)
    for seed in range(settings.draws):
        random = torch.Generator().manual_seed(seed)
        noise = torch.randn((size, *chunk), generator=random)
        time = torch.rand(size, generator=random)
        for how in HOW:
            losses[how].append(policy.forward(read[how], noise=noise, time=time)[0].item())
    changes = [bf16 / f32 - 1 for bf16, f32 in zip(losses["bfloat16"], losses["float32"], strict=True)]
    title = f"the small base, {size} held-out frames of moving_grasp, {settings.draws} draws"
    return Table(title, [{"error of an embedding": errors, "loss, relative change": Spread.of(changes)}])


@torch.no_grad()
def of_full_size(settings: Settings, size: str = "full") -> Table:
    with TemporaryDirectory() as folder:
        vlm = SIZES[size].make_vlm(Path(folder))
        policy = our_policy(lerobot_policy(SIZES[size], vlm), SIZES[size], vlm)
    errors, _ = embedded(policy.eval(), make_batch(SIZES[size], rows=settings.pictures))
    return Table(f"{size} size, random weights and pictures", [{"error of an embedding": errors}])


def embedded(policy: SmolVLAMemoryPolicy, batch: dict[str, Any]) -> tuple[Spread, dict[str, dict[str, Any]]]:
    """The error of bfloat16 over pictures, and the batch with either kind of embeddings in the place of pictures."""
    read: dict[str, dict[str, Any]] = {how: {key: v for key, v in batch.items() if key not in CAMERAS} for how in HOW}
    errors: list[float] = []
    for camera in CAMERAS:
        kinds = {}
        for how, autocast in HOW.items():
            with autocast():
                kinds[how] = policy.embed_camera(batch[camera]).bfloat16()
            read[how][image_features_key(camera)] = kinds[how]
        exact, other = (kinds[how].float().flatten(1) for how in ("float32", "bfloat16"))
        errors += ((exact - other).square().mean(1) / exact.square().mean(1)).sqrt().tolist()
    return Spread.of(errors), read
