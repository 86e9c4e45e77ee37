"""Held-out loss after equal training time with D = 1, 2, 4, 8 (noise, time) draws per frame.

Stage 1 of the embedded profile, the real command's code, from new weights. What a step costs is measured first, the
variants in turn; every D then gets as many steps as fit into the same CPU time, its learning rate decaying over them.
"""

import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean

import torch

from benchmarks.measuring import Table, Timing, alternate, milliseconds
from benchmarks.memory_cost import step
from benchmarks.models import SIZES, lerobot_policy, make_batch, our_policy
from benchmarks.training_step import optimizer_of
from kuavo_train.compose import compose_run
from kuavo_train.runs.run_folder import stage_folder
from kuavo_train.stage.stage import run_stage

DEPTH = 4  # the embedded profile's mem_backprop_depth


@dataclass(frozen=True)
class Settings:
    draws: tuple[int, ...] = (1, 2, 4, 8)
    seed: tuple[int, ...] = (0, 1)
    task: str = "moving_grasp"
    data: str = "outputs/data"
    seconds: int = 90  # of CPU time, per run
    rounds: int = 5
    threads: int = 1


def run(settings: Settings) -> list[Table]:
    torch.set_num_threads(settings.threads)
    with tempfile.TemporaryDirectory() as folder:
        timings = step_times(settings, Path(folder))
        rows = []
        for draws in settings.draws:
            time = milliseconds(timings[str(draws)].cpu)
            steps = round(1e3 * settings.seconds / time.median)
            losses = [train(settings, draws, seed, steps, Path(folder)) for seed in settings.seed]
            each = {f"held-out loss, seed {seed}": loss for seed, loss in zip(settings.seed, losses, strict=True)}
            rows.append({"D": draws, "CPU ms per step": time, "steps": steps, **each, "mean": mean(losses)})
            print(rows[-1], flush=True)
    return [Table(f"{settings.task}, {settings.seconds} s of CPU time per run", rows)]


def step_times(settings: Settings, folder: Path) -> dict[str, Timing]:
    size = SIZES["embedded"]
    vlm = size.make_vlm(folder / "vlm")
    theirs, batch, steps = lerobot_policy(size, vlm, frozen=()), make_batch(size), {}
    for draws in settings.draws:
        policy = our_policy(theirs, size, vlm, frozen=(), tokens=4, flow_draws=draws)
        steps[str(draws)] = partial(step, policy, optimizer_of(policy), batch, DEPTH)
    return alternate(steps, rounds=settings.rounds, block=2)


def train(settings: Settings, draws: int, seed: int, steps: int, folder: Path) -> float:
    """Held-out loss at the end of a run."""
    configs = compose_run(
        [
            "base=none",
            f"outputs={folder}",
            f"run=draws{draws}_seed{seed}",
            f"data.root={Path(settings.data).resolve()}",
            f"learn=[{settings.task}]",
            f"seed={seed}",
            f"policy.flow_draws={draws}",
            f"training.max_steps={steps}",
            f"training.epochs={steps}",  # more than there can be: the steps decide
            f"training.decay_steps={steps}",
            "validation.every_epochs=1000000",
            "training.save_every=1000000",
            "rollout.episodes=0",
        ]
    )
    if run_stage(configs[0], [config.stage for config in configs]) != 0:
        raise RuntimeError(f"the run with flow_draws={draws} did not finish")
    return stage_folder(configs[0]).validations.read()[-1]["loss"]
