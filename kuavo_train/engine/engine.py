"""What an engine is: it trains the cells of a study, and says what becomes of each.

inline.py trains one after another; side_by_side.py several at a time, which local.py and slurm.py start.
"""

import os
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, Protocol

from kuavo_sim.children import STOP_SIGNALS
from kuavo_train.config import RunConfig
from kuavo_train.runs.study_file import Cell

State = Literal["waiting", "running", "finished", "interrupted", "failed"]
Ended = Literal["finished", "interrupted", "failed"]

Train = Callable[[Sequence[RunConfig]], int]
"""Trains a cell to its end, from wherever it stands; the exit status. Of a module, so that another process finds it."""


class Notes(Protocol):
    """What a study wants to know of its engine, and decides for it."""

    def waits(self, cell: Cell, running: Sequence[Cell]) -> bool:
        """Whether a cell needs what one of those running is about to finish."""

    def begins(self, cell: Cell) -> str | None:
        """To be called before a cell begins; what there is to say of it."""

    def ends(self, cell: Cell, state: Ended, *, seconds: float) -> None: ...


class Engine(Protocol):
    def train(self, cells: Sequence[Cell], notes: Notes) -> int:
        """Train every cell; one that fails touches no other.

        Returns:
            0 where none was kept from being tried, else the exit status of what ended them all: 128 + the number of a
            signal.
        """


class Job(Protocol):
    """A cell under way in processes of its own."""

    @property
    def cell(self) -> Cell: ...

    def status(self) -> int | None:
        """The exit status, 128 + the number of the signal that ended it; None until then."""

    def stop(self, number: int) -> None:
        """Hand on a signal: the cell writes a checkpoint and ends."""


def state_of(status: int) -> Ended:
    """What an exit status says of a cell."""
    return "finished" if status == 0 else "interrupted" if status - 128 in STOP_SIGNALS else "failed"


def log_of(cell: Cell, logs: Path) -> Path:
    return logs / f"{cell.run}.log"


def print_into(log: Path) -> None:
    """What this process and those that it starts print goes to the end of a file from here on."""
    log.parent.mkdir(parents=True, exist_ok=True)
    os.environ["TQDM_MININTERVAL"] = "10"  # s: a bar in a file is a line each time
    opened = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(opened, f"=== {datetime.now(UTC).isoformat(timespec='seconds')}\n".encode())
    for stream, descriptor in ((sys.stdout, 1), (sys.stderr, 2)):
        stream.flush()
        os.dup2(opened, descriptor)
    os.close(opened)
    sys.stdout, sys.stderr = (os.fdopen(descriptor, "w", buffering=1, closefd=False) for descriptor in (1, 2))
