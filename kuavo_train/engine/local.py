"""engine=local: `jobs` cells at a time on this machine, in processes that share out its CPUs and GPUs.

They hear signals through this process alone, and end by themselves when it is gone.
"""

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

from kuavo_sim.children import born_deaf
from kuavo_sim.cpus import usable_cpus
from kuavo_train import launcher
from kuavo_train.config import RunConfig
from kuavo_train.engine.engine import Train, log_of, print_into
from kuavo_train.launcher import findable, in_a_child
from kuavo_train.runs.study_file import Cell


@dataclass(frozen=True)
class Share:
    """What one of the places has of the machine: numbers of CPUs, names of GPUs."""

    cpus: tuple[int, ...]
    gpus: tuple[str, ...]

    def environment(self, processes: int) -> dict[str, str]:
        """Of a cell that so many processes train together."""
        found = {"OMP_NUM_THREADS": str(max(1, len(self.cpus) // processes))}
        return {**found, "CUDA_VISIBLE_DEVICES": ",".join(self.gpus)} if self.gpus else found


def shares_of(places: int, cpus: Sequence[int], gpus: Sequence[str]) -> list[Share]:
    return [Share(tuple(_part(cpus, place, places)), tuple(_part(gpus, place, places))) for place in range(places)]


def _part[T](things: Sequence[T], place: int, places: int) -> Sequence[T]:
    """As many for each place, but for one; where there are fewer things than places, several have one in common."""
    if len(things) < places:
        return [things[place % len(things)]] if things else []
    return things[place * len(things) // places : (place + 1) * len(things) // places]


@dataclass(frozen=True)
class LocalJob:
    cell: Cell
    share: Share
    process: BaseProcess

    def status(self) -> int | None:
        code = self.process.exitcode
        return code if code is None or code >= 0 else 128 - code

    def stop(self, number: int) -> None:
        if self.process.pid is not None and self.process.exitcode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, number)


class Local:
    look_s = 0.5

    def __init__(self, places: int, work: Train, logs: Path):
        self.places, self.work, self.logs = places, work, logs
        self.shares = shares_of(places, _cpus(), _gpus())
        self.jobs: list[LocalJob] = []

    def start(self, cells: Sequence[Cell]) -> list[LocalJob]:
        return [self._start(cell) for cell in cells]

    def _start(self, cell: Cell) -> LocalJob:
        self.jobs = [job for job in self.jobs if job.status() is None]
        free = list(self.shares)
        for job in self.jobs:
            free.remove(job.share)
        share = free[0]
        process = get_context(launcher.START).Process(  # type: ignore[attr-defined] # of every context but the stub's base
            target=_begin,
            args=(os.getpid(), log_of(cell, self.logs), share.cpus, findable(self.work), cell.configs),
        )
        # Before its Python begins: libraries read it once, when they are loaded.
        with born_deaf(), _environment(share.environment(cell.configs[0].processes)):
            process.start()
        self.jobs.append(LocalJob(cell, share, process))
        return self.jobs[-1]


def _begin(study: int, log: Path, cpus: Sequence[int], work: Train, configs: Sequence[RunConfig]) -> None:
    """In a child."""
    print_into(log)
    if hasattr(os, "sched_setaffinity"):  # not on macOS
        os.sched_setaffinity(0, cpus)  # loaders and simulators are as many as there are CPUs
    sys.exit(in_a_child(study, work, configs))


def _cpus() -> list[int]:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(usable_cpus()))


def _gpus() -> list[str]:
    """By the names that CUDA_VISIBLE_DEVICES takes."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name and not name.startswith("-")]
    import torch  # heavy, and only for its count

    return [str(number) for number in range(torch.cuda.device_count())]


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """For processes started within."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
