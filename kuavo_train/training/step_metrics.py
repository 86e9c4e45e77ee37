"""Means over steps, and where their time went."""

from collections.abc import Callable, Iterable
from itertools import pairwise
from time import perf_counter as clock  # in s
from typing import Protocol, Self

import numpy as np
import torch

STEP_PARTS = ("wait", "data", "forward", "backward", "optimizer")
"""Waiting for the loader, augmentation and LeRobot's preprocessor, and what the names say."""


class Moment(Protocol):
    """When a part of a step was over, in the time of what computes it."""

    def elapsed_time(self, later: Self) -> float:
        """ms until `later`; waits until that is there."""


class HostMoment:
    def __init__(self) -> None:
        self.seconds = clock()

    def elapsed_time(self, later: Self) -> float:
        return 1e3 * (later.seconds - self.seconds)


class DeviceMoment:
    """A GPU works on long after the call, so it notes itself when it gets there, and nobody waits for it."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def elapsed_time(self, later: Self) -> float:
        later.event.synchronize()
        return self.event.elapsed_time(later.event)


def moments() -> Callable[[], Moment]:
    """How a moment is noted: by the GPU once there is one in use."""
    return DeviceMoment if torch.cuda.is_initialized() else HostMoment


class MetricsWindow:
    """Means over the steps since the last report; the time of a step's parts over those of them that were made here.

    Args:
        values: name → a value per step, added to here.
        moment: notes one.
    """

    def __init__(self, values: dict[str, list[float]], moment: Callable[[], Moment] | None = None) -> None:
        self.values, self.moment = values, moment or moments()
        self.samples = self.steps = 0
        self.seconds = 0.0
        self.marks: list[tuple[str | None, Moment]] = []  # what was over; None: something that is no part of a step
        self.go_on()

    def start_step(self) -> None:
        """The batch has arrived: the time since the last step went into waiting for it."""
        self.mark("wait")

    def go_on(self) -> None:
        """What came between two steps, such as a validation, is not their time."""
        self.began = clock()
        self.mark(None)

    def mark(self, part: str | None) -> None:
        self.marks.append((part, self.moment()))

    def end_step(self, values: dict[str, float], samples: int) -> float:
        """Returns the seconds since the window, or the step before, ended."""
        for name, value in values.items():
            self.values.setdefault(name, []).append(value)
        self.samples += samples
        self.steps += 1
        now = clock()
        elapsed, self.began = now - self.began, now
        self.seconds += elapsed
        return elapsed

    def summary(self) -> dict[str, float]:
        """Waits for the last part that was marked."""
        return {
            **{name: float(np.mean(values)) for name, values in self.values.items()},
            "samples_per_s": round(self.samples / self.seconds, 2),
            **{f"{part}_ms": round(ms / self.steps, 3) for part, ms in self._parts()},
        }

    def _parts(self) -> Iterable[tuple[str, float]]:
        """Name and ms of each part, over all steps."""
        parts = dict[str, float]()
        for (_, begin), (part, end) in pairwise(self.marks):
            if part is not None:
                parts[part] = parts.get(part, 0.0) + begin.elapsed_time(end)
        return parts.items()
