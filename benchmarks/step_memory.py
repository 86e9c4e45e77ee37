"""What training takes in memory, by what is trained, without and with gradient checkpointing.

Nothing is measured and nothing allocated: model and step are of tensors without values, in bfloat16 autocast, and torch
says what the kernels of a CPU keep. Batches are clips of 4 queries of three cameras; where the vision encoder is
frozen, its output is given. The optimizer is AdamW.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.measuring import Table
from benchmarks.models import CAMERAS, SIZES, VLM_FROZEN, Size, make_batch, new_policy
from kuavo_train.config import LoraConfig
from kuavo_train.training.lora import add_adapters
from kuavo_train.training.optimizer import ADAM_MOMENTS
from kuavo_train.training.parameter_groups import trainable_parameters
from kuavo_train.training.step_memory import step_memory
from lerobot_policy_smolvla_memory import SmolVLAMemoryPolicy
from lerobot_policy_smolvla_memory.configuration_smolvla_memory import image_features_key

QUERIES = 4
MIB, GIB = 2**20, 2**30
LEARNS: dict[str, tuple[tuple[str, ...], LoraConfig | None]] = {  # finetune= → what is frozen, adapters
    "expert_only": (VLM_FROZEN, None),
    "lora": (VLM_FROZEN, LoraConfig()),
    "end_to_end": ((), None),
}


@dataclass(frozen=True)
class Settings:
    size: tuple[str, ...] = ("full",)
    samples: int = 64


def run(settings: Settings) -> list[Table]:
    with tempfile.TemporaryDirectory() as folder:
        return [table(name, SIZES[name], Path(folder), settings.samples) for name in settings.size]


def table(name: str, size: Size, folder: Path, samples: int) -> Table:
    vlm = size.make_vlm(folder / name)
    rows = [
        row(size, vlm, finetune, samples, checkpoints=checkpoints)
        for finetune in LEARNS
        for checkpoints in (False, True)
    ]
    return Table(f"{name}, bfloat16, {samples} samples", rows)


def row(size: Size, vlm: Path, finetune: str, samples: int, *, checkpoints: bool) -> dict[str, Any]:
    frozen, lora = LEARNS[finetune]
    how = {"mem_backprop_depth": QUERIES, "gradient_checkpointing": checkpoints}
    with FakeTensorMode(allow_non_fake_inputs=True):
        policy = new_policy(size, vlm, frozen=frozen, tokens=4, layout="end", **how)
        for group in frozen:  # as SmolVLM2 is stored
            for parameter in map(policy.get_parameter, policy.parameter_groups()[group]):
                parameter.data = parameter.data.to(torch.bfloat16)
        sample = _sample(policy, size, given=bool(frozen))
    add_adapters(policy, lora)  # with values, as peft wants it
    autocast = lambda: torch.autocast("cpu", dtype=torch.bfloat16)  # noqa: E731
    step = step_memory(policy, sample, samples=samples, queries=QUERIES, autocast=autocast)
    weights = sum(each.nbytes for each in policy.parameters())
    trained = sum(each.nbytes for each in trainable_parameters(policy).values())
    together = weights + (1 + ADAM_MOMENTS) * trained + step.held
    return {
        "finetune": finetune,
        "checkpointing": "yes" if checkpoints else "no",
        "trained, million": sum(each.numel() for each in trainable_parameters(policy).values()) / 1e6,
        "weights, GiB": weights / GIB,
        "gradients, GiB": trained / GIB,
        "optimizer, GiB": ADAM_MOMENTS * trained / GIB,
        "activations, MiB per sample": step.per_sample / MIB,
        "and fixed, GiB": step.fixed / GIB,
        "together, GiB": together / GIB,
    }


def _sample(policy: SmolVLAMemoryPolicy, size: Size, *, given: bool) -> dict[str, torch.Tensor]:
    """One row; the vision encoder's output where it is `given`."""
    batch = make_batch(size, rows=1)
    if not given:
        return batch
    vlm = policy.model.vlm_with_expert.config
    tokens = (size.image // (vlm.vision_config.patch_size * vlm.scale_factor)) ** 2
    embedded = torch.empty(1, tokens, vlm.text_config.hidden_size, dtype=torch.bfloat16)
    return {key: value for key, value in batch.items() if key not in CAMERAS} | {
        image_features_key(camera): embedded for camera in CAMERAS
    }
