"""Means over steps, and where their time went."""

from time import perf_counter as clock  # in s

import numpy as np
import torch

STEP_PARTS = ("wait", "data", "forward", "backward", "optimizer")
"""Waiting for the loader, augmentation and LeRobot's preprocessor, and what the names say."""


class MetricsWindow:
    """Means over the steps since the last report; the time of a step's parts over those of them that were made here.

    Args:
        values: name → a value per step, added to here.
    """

    def __init__(self, values: dict[str, list[float]]) -> None:
        self.values = values
        self.samples = self.steps = 0
        self.parts: dict[str, float] = {}
        self.began = self.marked = clock()

    def start_step(self) -> None:
        """The batch has arrived: the time since the last step went into waiting for it."""
        now = clock()
        self.parts["wait"] = self.parts.get("wait", 0.0) + now - self.marked
        self.marked = now

    def go_on(self) -> None:
        """What came between two steps, such as a validation, is not their time."""
        self.began = self.marked = clock()

    def mark(self, part: str) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # a GPU works on long after the call, and the next part would pay for it
        now = clock()
        self.parts[part] = self.parts.get(part, 0.0) + now - self.marked
        self.marked = now

    def end_step(self, values: dict[str, float], samples: int) -> float:
        """Returns the seconds since the window, or the step before, ended."""
        for name, value in values.items():
            self.values.setdefault(name, []).append(value)
        self.samples += samples
        self.steps += 1
        now = clock()
        elapsed, self.began = now - self.began, now
        self.parts["total"] = self.parts.get("total", 0.0) + elapsed
        return elapsed

    def summary(self) -> dict[str, float]:
        total = self.parts["total"]
        parts = {f"{part}_ms": round(1e3 * s / self.steps, 3) for part, s in self.parts.items() if part != "total"}
        return {
            **{name: float(np.mean(values)) for name, values in self.values.items()},
            "samples_per_s": round(self.samples / total, 2),
            **parts,
        }
