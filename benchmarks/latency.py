"""One policy query, pictures to action chunk, ten denoising steps: ours against LeRobot's SmolVLA on the same weights.

Whole, and split: the vision encoder alone, and all that follows with its output given. In bf16 the vision-language
model and the expert are bf16 and the projections float32, as SmolVLA is loaded. The action error is against
LeRobot's float32 actions, same noise: root mean square over the root mean square of those actions.

Where there is a GPU, one more table has ours with memory on it, without CUDA graphs and with: the error is against
without.
"""

import tempfile
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measuring import Table, alternate, cost_rows, speed_rows
from benchmarks.models import CAMERAS, SIZES, lerobot_policy, make_batch, our_policy
from lerobot_policy_smolvla_memory import SmolVLAMemoryPolicy
from lerobot_policy_smolvla_memory.graphed_query import Capture, CudaCapture, GraphedQuery

PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Settings:
    size: tuple[str, ...] = ("embedded", "quarter")
    precision: tuple[str, ...] = tuple(PRECISIONS)
    rounds: int = 3
    threads: int = 2


class Query:
    """A policy that predicts actions. `vision` runs the encoder alone; `follows` all the rest, with its output."""

    def __init__(self, policy: Any, batch: dict[str, Tensor], noise: Tensor):
        self.policy, self.batch, self.noise = policy.eval(), batch, noise
        self.model = policy.model.vlm_with_expert
        self.actions = self()
        self.features = self.vision()

    @torch.no_grad()
    def __call__(self) -> Tensor:
        self.policy.reset()
        return self.policy.predict_action_chunk(dict(self.batch), noise=self.noise)

    @torch.no_grad()
    def vision(self) -> list[Tensor]:
        return [self.model.embed_image(2 * self.batch[camera] - 1) for camera in CAMERAS]

    def follows(self) -> Tensor:
        features = iter(self.features)
        self.model.embed_image = lambda _image: next(features)
        try:
            return self()
        finally:
            del self.model.embed_image


def run(settings: Settings) -> list[Table]:
    torch.set_num_threads(settings.threads)
    with tempfile.TemporaryDirectory() as folder:
        return [
            table
            for size in settings.size
            for table in compare(size, settings.precision, Path(folder), rounds=settings.rounds)
        ]


def compare(name: str, precisions: tuple[str, ...], folder: Path, *, rounds: int) -> list[Table]:
    size = SIZES[name]
    vlm = size.make_vlm(folder / name)
    theirs = lerobot_policy(size, vlm)
    policies = {
        "LeRobot": theirs,
        "ours": our_policy(theirs, size, vlm),
        "ours, memory": our_policy(theirs, size, vlm, tokens=4),
    }
    batch = make_batch(size, rows=1)
    noise = torch.randn(1, size.chunk, theirs.config.max_action_dim, generator=torch.Generator().manual_seed(1))
    truth = Query(theirs, batch, noise).actions
    tables: list[Table] = []
    for precision in precisions:
        for policy in policies.values():
            policy.model.vlm_with_expert.to(PRECISIONS[precision])  # ours: as the wrapper's dtype=bfloat16
        queries = {who: Query(policy, batch, noise) for who, policy in policies.items()}
        errors: dict[str, float | None] = {who: relative_error(query.actions, truth) for who, query in queries.items()}
        errors["ours, memory"] = None  # its memory changes the query: its actions are others
        parts: dict[str, dict[str, Callable[[], object]]] = {
            "whole query": dict(queries),
            "vision encoder": {"LeRobot": queries["LeRobot"].vision},  # and ours: it is the same
            "all that follows": {who: query.follows for who, query in queries.items()},
        }
        speeds, costs = [], []
        for part, variants in parts.items():
            # Each has run once already, which at the large sizes is warm-up enough.
            timings = alternate(variants, rounds=rounds, **({"warm_up": 0} if size.is_large else {"block": 5}))
            for row in speed_rows(timings, reference="LeRobot"):
                speeds.append({"part": part, **row, "action error": errors[row[""]] if part == "whole query" else None})
            if "ours, memory" in timings:
                with_and_without = {who: timings[who] for who in ("ours", "ours, memory")}
                costs += [{"part": part, **row} for row in cost_rows(with_and_without, reference="ours")[1:]]
        tables.append(Table(f"{name}, {precision}", speeds))
        tables.append(Table(f"{name}, {precision}: what 4 memory tokens in the end layout cost", costs))
        if torch.cuda.is_available():
            rows = graph_rows(policies["ours, memory"], batch, noise, torch.device("cuda"), rounds=rounds)
            tables.append(Table(f"{name}, {precision}: on the GPU, without CUDA graphs and with", rows))
    return tables


@torch.no_grad()
def graph_rows(
    policy: SmolVLAMemoryPolicy,
    batch: dict[str, Tensor],
    noise: Tensor,
    device: torch.device,
    *,
    rounds: int,
    capture: Callable[[torch.device], Capture] = CudaCapture,
) -> list[dict[str, Any]]:
    """A query of the policy's on a device, without graphs and with; each ends when its actions are on the host."""
    policy = deepcopy(policy).to(device).eval()
    batch, noise = {key: tensor.to(device) for key, tensor in batch.items()}, noise.to(device)
    graphed = GraphedQuery(policy, capture)
    variants: dict[str, Callable[[], Tensor]] = {
        "ours, memory": lambda: policy.sample_actions_with(batch, None, noise)[0].cpu(),
        "ours, memory, in graphs": lambda: graphed(batch, None, noise)[0].cpu(),
    }
    errors = {who: relative_error(query(), variants["ours, memory"]()) for who, query in variants.items()}
    timings = alternate(variants, rounds=rounds, block=5)
    return [{**row, "action error": errors[row[""]]} for row in speed_rows(timings, reference="ours, memory")]


def relative_error(actions: Tensor, truth: Tensor) -> float:
    return float((actions.float() - truth).square().mean().sqrt() / truth.square().mean().sqrt())
