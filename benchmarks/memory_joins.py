"""How much a memory disturbs a policy that was trained without one: growth of its held-out loss before the first step.

Every seed draws the memory anew; the policy, the held-out frames and the noise of the validation are the same. `run` is
the folder of a finished run without memory; what is asked about is what its last stage ended in, on the tasks learnt.
"""

from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch
from lerobot.configs import PreTrainedConfig
from tqdm import tqdm

from benchmarks.measuring import Table
from benchmarks.models import LAYOUTS
from kuavo_train.evaluation.validation import Validator
from kuavo_train.learning.checkpoint import Checkpoint
from kuavo_train.trained_run import TrainedRun
from lerobot_policy_smolvla_memory.modeling_smolvla_memory import SmolVLAMemoryPolicy


@dataclass(frozen=True)
class Settings:
    run: str = "outputs/embedded-smolvla"
    layout: tuple[str, ...] = ("end", "start", "both")
    tokens: tuple[int, ...] = (1, 4, 16)
    weight: tuple[float, ...] = (2.0, 1.0)
    seed: tuple[int, ...] = (0, 1, 2)
    threads: int = 1


def run(settings: Settings) -> list[Table]:
    torch.set_num_threads(settings.threads)
    trained = TrainedRun.open(Path(settings.run))
    if not trained.stored.finished or trained.settings.policy.get("num_mem_tokens") != 0:
        raise SystemExit(f"run must be a finished run of SmolVLA with 0 memory tokens, got {settings.run}")
    checkpoint = trained.checkpoint(trained.stored.finished[-1])
    alone = held_out_loss(trained, checkpoint)
    rows = []
    for layout in settings.layout:
        for tokens in settings.tokens:
            row: dict[str, object] = {"": f"{layout}, {tokens} tokens"}
            for weight in settings.weight:
                growths = [
                    held_out_loss(trained, checkpoint, **joining(layout, tokens, weight), seed=seed) / alone - 1
                    for seed in tqdm(settings.seed, f"{row['']}, weight {weight:g}", leave=False, unit="seed")
                ]
                least, most = min(growths), max(growths)
                row[f"weight {weight:g}"] = f"{mean(growths):+.1%} ({least:+.1%} to {most:+.1%})"
            rows.append(row)
            print(row, flush=True)
    tasks = ", ".join(task.name for task in trained.learnt)
    return [
        Table(f"{tasks}, loss {alone:.4f} without memory; mean of {len(settings.seed)} seeds (least to most)", rows)
    ]


def joining(layout: str, tokens: int, weight: float) -> dict[str, object]:
    """Fields of the config that make a memory join."""
    at_start, at_end = LAYOUTS[layout]
    return {"num_mem_tokens": tokens, "mem_weight": weight, "mem_at_start": at_start, "mem_at_end": at_end}


def held_out_loss(trained: TrainedRun, checkpoint: Checkpoint, *, seed: int = 0, **changed: object) -> float:
    """Mean over the tasks learnt, of the checkpoint's policy with some fields of its config changed."""
    config = PreTrainedConfig.from_pretrained(str(checkpoint.pretrained_model))
    for name, value in {**changed, "device": trained.device.type}.items():
        setattr(config, name, value)
    torch.manual_seed(seed)
    policy = SmolVLAMemoryPolicy.from_pretrained(checkpoint.pretrained_model, config=config).to(trained.device).eval()
    _, preprocessor = trained.policy(checkpoint)
    settings = trained.settings.validation
    validator = Validator(
        trained.dataset(trained.learnt, policy.config),
        trained.normalization,
        preprocessor,
        draws=settings.draws,
        batch_size=settings.batch_size,
        autocast=trained.autocast,
        progress=False,
    )
    records = validator.validate_all_tasks(policy, [task.name for task in trained.learnt])
    return mean(record["loss"] for record in records)
