"""What memory costs: a training step with it against one without.

A step is forward, backward and AdamW on the same random batch; rows are clips of K consecutive queries. At the large
sizes the vision encoder's output is given, as the feature cache gives it: with pictures, everything is small beside
the encoder. Measured are every number of tokens in the end layout, and every layout with the first of them.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.measuring import Table, alternate, cost_rows
from benchmarks.models import (
    SIZES,
    VISION_FROZEN,
    VLM_FROZEN,
    lerobot_policy,
    make_batch,
    our_policy,
    with_features,
)
from benchmarks.training_step import optimizer_of

LEARNS: dict[str, Sequence[str]] = {
    "nothing frozen": (),
    "vision frozen": VISION_FROZEN,
    "VLM frozen": VLM_FROZEN,
}


@dataclass(frozen=True)
class Settings:
    size: tuple[str, ...] = ("embedded", "quarter")
    learns: tuple[str, ...] = tuple(LEARNS)
    tokens: tuple[int, ...] = (4, 8, 16)
    layout: tuple[str, ...] = ("end", "start", "both")
    depth: tuple[int, ...] = (1, 4)
    large_batch: int = 4  # queries per step at the large sizes; every depth must divide it
    rounds: int = 3
    threads: int = 2

    def memories(self) -> Iterator[tuple[int, str]]:
        """(tokens, layout) of each memory that is measured."""
        yield from ((tokens, "end") for tokens in self.tokens if "end" in self.layout)
        yield from ((self.tokens[0], layout) for layout in self.layout if layout != "end")


def run(settings: Settings) -> list[Table]:
    torch.set_num_threads(settings.threads)
    with tempfile.TemporaryDirectory() as folder:
        return [
            compare(size, learns, settings, Path(folder))
            for size in settings.size
            for learns in settings.learns
            if learns == "VLM frozen" or not SIZES[size].is_large
        ]


def compare(name: str, learns: str, settings: Settings, folder: Path) -> Table:
    size, frozen = SIZES[name], LEARNS[learns]
    vlm = size.make_vlm(folder / name)
    theirs = lerobot_policy(size, vlm, frozen=frozen)
    without = our_policy(theirs, size, vlm, frozen=frozen)
    rows = settings.large_batch if size.is_large else size.batch
    batch = make_batch(size, rows=rows)
    if size.is_large:
        batch = with_features(without, batch)
    variants: dict[str, Callable[[], None]] = {"no memory": partial(step, without, optimizer_of(without), batch, 1)}
    for tokens, layout in settings.memories():
        policy = our_policy(theirs, size, vlm, frozen=frozen, tokens=tokens, layout=layout)
        optimizer = optimizer_of(policy)
        for depth in settings.depth:
            variants[f"{layout}, {tokens} tokens, K = {depth}"] = partial(step, policy, optimizer, batch, depth)
    timings = alternate(variants, rounds=settings.rounds, block=1 if size.is_large else 2)
    given = ", features given" if size.is_large else ""
    return Table(f"{name}, {learns}, {rows} queries per step{given}", cost_rows(timings, reference="no memory"))


def step(policy: Any, optimizer: torch.optim.Optimizer, batch: dict[str, Any], queries: int) -> None:
    loss, _ = policy.train()(dict(batch), queries=queries)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
