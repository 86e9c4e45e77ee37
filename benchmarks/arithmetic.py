"""What bounds a query and a training step: their matrix products alone, against the whole of them.

The products are noted while the part runs once, with their shapes; then they are carried out again, alone, on operands
of the same shapes that are no more in the processor's cache than the model's are. What the products take is the least
that the part can take with this arithmetic library at this precision; the rest is everything else. Times are CPU
time, summed over threads.
"""

import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.latency import Query
from benchmarks.measuring import Table
from benchmarks.memory_cost import step
from benchmarks.models import SIZES, lerobot_policy, make_batch, our_policy, with_features
from benchmarks.training_step import optimizer_of

OUT_OF_CACHE = 256e6  # bytes
Shapes = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Settings:
    size: tuple[str, ...] = ("quarter",)
    rounds: int = 3
    threads: int = 2


class Products(TorchDispatchMode):
    """Counts the matrix products carried out inside it, by the shapes of their operands."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[Shapes] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operands = {"aten::mm": args[:2], "aten::bmm": args[:2], "aten::addmm": args[1:3]}.get(function.name(), ())
        if operands:
            self.found[tuple(operands[0].shape), tuple(operands[1].shape)] += 1
        return function(*args, **(kwargs or {}))


def run(settings: Settings) -> list[Table]:
    torch.set_num_threads(settings.threads)
    with tempfile.TemporaryDirectory() as folder:
        return [compare(name, Path(folder), rounds=settings.rounds) for name in settings.size]


def compare(name: str, folder: Path, *, rounds: int) -> Table:
    size = SIZES[name]
    vlm = size.make_vlm(folder / name)
    theirs = lerobot_policy(size, vlm)
    ours = our_policy(theirs, size, vlm)
    batch = make_batch(size)
    training = partial(step, ours, optimizer_of(ours), with_features(ours, batch), 1)
    rows = [row("training step, features given: ours", training, rounds)]
    one, noise = make_batch(size, rows=1), torch.randn(1, size.chunk, theirs.config.max_action_dim)
    for who, policy in (("LeRobot", theirs), ("ours", ours)):
        rows.append(
            row(f"query, all that follows the vision encoder: {who}", Query(policy, one, noise).follows, rounds)
        )
    return Table(f"{name}, float32", rows)


def row(part: str, run_part: Callable[[], object], rounds: int) -> dict[str, Any]:
    with Products() as products:
        run_part()
    alone = sum(count * seconds(*shapes) for shapes, count in products.found.items())
    whole = median(timed(run_part) for _ in range(rounds))
    flop = sum(2 * count * a[-1] * torch.Size(a[:-1]).numel() * b[-1] for (a, b), count in products.found.items())
    return {
        "": part,
        "GFLOP in products": flop / 1e9,
        "products alone, CPU ms": 1e3 * alone,
        "GFLOP per CPU second": flop / alone / 1e9,
        "whole, CPU ms": 1e3 * whole,
        "products / whole": alone / whole,
    }


def seconds(a: tuple[int, ...], b: tuple[int, ...]) -> float:
    """Of one product of operands of these shapes; the second ones, as weights are, come from main memory."""
    size = 4 * torch.Size(b).numel()
    copies = [torch.randn(b) for _ in range(max(4, min(64, round(OUT_OF_CACHE / size))))]
    left = torch.randn(a)
    for right in copies[:2]:
        torch.matmul(left, right)
    return timed(lambda: [torch.matmul(left, right) for right in copies]) / len(copies)


def timed(run_part: Callable[[], object]) -> float:
    """CPU seconds."""
    began = time.process_time()
    run_part()
    return time.process_time() - began
