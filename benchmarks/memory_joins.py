"""How much a memory disturbs a policy that was trained without one: growth of its held-out loss before the first step.

Every seed draws the memory anew; the policy, the held-out frames and the noise of the validation are the same. `run` is
the folder of a finished run without memory; its last stage's result is validated on the tasks learnt.
"""

from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch
from lerobot.configs import PreTrainedConfig
from tqdm import tqdm

from benchmarks.measuring import Table
from benchmarks.models import LAYOUTS
from kuavo_train.data.policy_traits import remembers
from kuavo_train.evaluation.validation import Validator
from kuavo_train.runs.trained_run import TrainedRun, load_policy
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
    if not trained.stored.finished or remembers(trained.settings.policy):
        raise SystemExit(f"run must be a finished run of SmolVLA without memory, got {settings.run}")
    loss_of = HeldOutLoss(trained)
    alone = loss_of()
    rows = []
    for layout in settings.layout:
        for tokens in settings.tokens:
            row: dict[str, object] = {"": f"{layout}, {tokens} tokens"}
            for weight in settings.weight:
                growths = [
                    loss_of(seed=seed, **joining(layout, tokens, weight)) / alone - 1
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


class HeldOutLoss:
    """Of what a run's last stage ended in, mean over the tasks learnt, with some fields of its config changed."""

    def __init__(self, trained: TrainedRun):
        self.trained, self.folder = trained, trained.checkpoint(trained.stored.finished[-1]).pretrained_model
        policy, preprocessor = load_policy(self.folder, trained.device)
        settings = trained.settings.validation
        self.validator = Validator(
            trained.dataset(trained.learnt, policy.config),
            trained.normalization,
            preprocessor,
            draws=settings.draws,
            batch_size=settings.batch_size,
            autocast=trained.autocast,
            progress=False,
        )

    def __call__(self, *, seed: int = 0, **changed: object) -> float:
        config = PreTrainedConfig.from_pretrained(str(self.folder))
        for name, value in {**changed, "device": self.trained.device.type}.items():
            setattr(config, name, value)
        torch.manual_seed(seed)
        policy = SmolVLAMemoryPolicy.from_pretrained(self.folder, config=config).to(self.trained.device)
        found = self.validator.validate_all_tasks(policy, [task.name for task in self.trained.learnt])
        return mean(scores.loss for scores in found)
