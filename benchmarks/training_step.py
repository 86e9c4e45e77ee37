"""A training step: our policy against LeRobot's SmolVLA, inside `lerobot-train`'s own step, on the same weights.

LeRobot's `update_policy` runs both: forward, backward, clipping, AdamW. The learning rate is 0, so that the weights
stay the same for all and the losses can be compared: same batch, same noise. With pictures is a first epoch; with
features, the vision encoder's output is given, as the feature cache gives it in all later ones.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from lerobot.scripts.lerobot_train import update_policy
from lerobot.utils.logging_utils import AverageMeter, MetricsTracker
from lerobot.utils.utils import format_big_number

from benchmarks.measuring import Table, alternate, speed_rows
from benchmarks.models import SIZES, VISION_FROZEN, VLM_FROZEN, lerobot_policy, make_batch, our_policy, with_features
from kuavo_train.config import TrainingConfig
from kuavo_train.training.optimizer import build_optimizer

LEARNS = {"VLM frozen": VLM_FROZEN, "vision frozen": VISION_FROZEN}
NO_RATE = TrainingConfig(epochs=1, lr=1e-30, decay_lr=0.0, warmup_steps=0, decay_steps=1)


@dataclass(frozen=True)
class Settings:
    size: tuple[str, ...] = ("embedded", "quarter")
    rounds: int = 3
    threads: int = 2
    compiled: str = "no"  # or yes: also with policy.compile_model, which needs a C++ compiler


class Stepper:
    """A policy, its optimizer and a batch: each call is one training step. `loss` is the last one's."""

    def __init__(self, policy: Any, optimizer: torch.optim.Optimizer, batch: dict[str, Any]):
        self.policy, self.optimizer, self.batch, self.loss = policy, optimizer, batch, float("nan")
        self.accelerator = Accelerator(cpu=True)

    def __call__(self) -> None:
        meters = {name: AverageMeter(name) for name in ("loss", "grad_norm", "lr", "update_s")}
        torch.manual_seed(0)
        metrics, _ = update_policy(
            MetricsTracker(len(self.batch["action"]), 1, 1, meters),
            self.policy,
            dict(self.batch),
            self.optimizer,
            1.0,
            self.accelerator,
        )
        self.loss = metrics.loss.val


def run(settings: Settings) -> list[Table]:
    torch.set_num_threads(settings.threads)
    with tempfile.TemporaryDirectory() as folder:
        return [
            compare(name, learns, Path(folder), rounds=settings.rounds, compiled=settings.compiled == "yes")
            for name in settings.size
            for learns in LEARNS
            if learns == "VLM frozen" or not SIZES[name].is_large
        ]


def compare(name: str, learns: str, folder: Path, *, rounds: int, compiled: bool = False) -> Table:
    size, frozen = SIZES[name], LEARNS[learns]
    vlm = size.make_vlm(folder / name)
    theirs = lerobot_policy(size, vlm, frozen=frozen)
    ours = our_policy(theirs, size, vlm, frozen=frozen)
    remembering = our_policy(theirs, size, vlm, frozen=frozen, tokens=4)
    batch = make_batch(size)
    features = with_features(ours, batch)
    optimizers = [optimizer_of(policy) for policy in (ours, remembering)]
    steppers: dict[str, Stepper] = {
        "LeRobot": Stepper(theirs, lerobot_optimizer_of(theirs), batch),
        "ours, pictures": Stepper(ours, optimizers[0], batch),
        "ours, features": Stepper(ours, optimizers[0], features),
        "ours, pictures, memory": Stepper(remembering, optimizers[1], batch),
        "ours, features, memory": Stepper(remembering, optimizers[1], features),
    }
    if compiled:
        policy = our_policy(theirs, size, vlm, frozen=frozen, compile_model=True)
        steppers["ours, features, compiled"] = Stepper(policy, optimizer_of(policy), features)
    variants: dict[str, Callable[[], None]] = dict(steppers)
    rows = speed_rows(alternate(variants, rounds=rounds), reference="LeRobot", samples=size.batch)
    for row, stepper in zip(rows, steppers.values(), strict=True):
        row["loss"] = f"{stepper.loss:.6f}"
    parameters = format_big_number(sum(parameter.numel() for parameter in theirs.parameters()))
    return Table(f"{name} ({parameters}), {learns}, batch {size.batch}, float32", rows)


def optimizer_of(policy: Any) -> torch.optim.Optimizer:
    return build_optimizer(policy.parameters(), NO_RATE, steps=1)[0]


def lerobot_optimizer_of(policy: Any) -> torch.optim.Optimizer:
    """The one of `lerobot-train`, with a rate of 0."""
    optimizer = policy.config.get_optimizer_preset().build(policy.get_optim_params())
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    return optimizer
