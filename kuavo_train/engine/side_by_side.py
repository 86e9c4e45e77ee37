"""Several cells at a time, in processes that others start: who begins when, what ended how, and a table of all.

A signal to this process goes to all cells, no other begins, and it ends when they have. One that fails or is killed
leaves its place to the next.
"""

import contextlib
import re
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from kuavo_train.engine.engine import Ended, Job, Notes, log_of, state_of
from kuavo_train.engine.table import Table
from kuavo_train.interruption import stop_signals
from kuavo_train.runs.study_file import Cell


class Starter(Protocol):
    """Starts cells in processes of their own.

    Attributes:
        places: cells under way at a time.
        look_s: seconds between two looks at them.
    """

    places: int
    look_s: float

    def start(self, cells: Sequence[Cell]) -> Sequence[Job]: ...


class SideBySide:
    def __init__(self, starter: Starter, logs: Path):
        self.starter, self.logs = starter, logs

    def train(self, cells: Sequence[Cell], notes: Notes) -> int:
        under_way = _UnderWay(
            self.starter, self.logs, notes, [cell for cell in cells if not cell.finished], Table(cells)
        )
        with _heeding() as heard, under_way.table:
            try:
                while under_way.jobs or (under_way.waiting and not heard):
                    if not heard:
                        under_way.begin()
                    under_way.hand_on(heard)
                    under_way.collect()
                    under_way.table.show([job.cell.run for job in under_way.jobs])
                    if under_way.jobs:
                        time.sleep(self.starter.look_s)
            finally:  # nothing is left running, whatever happens here
                under_way.stop(signal.SIGKILL)
        return 128 + heard[0] if heard else 0


@dataclass
class _UnderWay:
    """The cells of a study that wait, and those that run, each with the time when it began."""

    starter: Starter
    logs: Path
    notes: Notes
    waiting: list[Cell]
    table: Table
    jobs: list[Job] = field(default_factory=list)
    began: dict[str, float] = field(default_factory=dict)
    handed_on: int = 0

    def begin(self) -> None:
        """As many as there are places for; those that need what another is about to finish wait on."""
        begin: list[Cell] = []
        running = [job.cell for job in self.jobs]
        for cell in self.waiting:
            places = self.starter.places - len(running) - len(begin)
            if places > 0 and not self.notes.waits(cell, [*running, *begin]):
                begin.append(cell)
        for cell in begin:
            self.waiting.remove(cell)
            self.began[cell.run] = time.monotonic()
            if said := self.notes.begins(cell):
                self.table.say(said)
        if begin:
            self.jobs += self.starter.start(begin)

    def hand_on(self, heard: Sequence[int]) -> None:
        """Every signal once to every cell."""
        if len(heard) > self.handed_on == 0:
            self.table.say("stopping: every cell ends after its step, with a checkpoint ...")
        while self.handed_on < len(heard):
            self.stop(heard[self.handed_on])
            self.handed_on += 1

    def stop(self, number: int) -> None:
        for job in self.jobs:
            job.stop(number)

    def collect(self) -> None:
        """What has ended since the last look."""
        for job in list(self.jobs):
            status = job.status()
            if status is None:
                continue
            self.jobs.remove(job)
            cell, state = job.cell, state_of(status)
            self.notes.ends(cell, state, seconds=time.monotonic() - self.began[cell.run])
            self.table.states[cell.run] = state
            self.table.say(f"{cell.title} is {state} {self._about(cell, state, status)}")

    def _about(self, cell: Cell, state: Ended, status: int) -> str:
        if state == "finished":
            return f"in {cell.folder}"
        log = log_of(cell, self.logs)
        return f"(status {status}){_last_error(log)}; its log is {log}"


def _last_error(log: Path) -> str:
    """What a cell's log says last of why it ended, after a colon."""
    text = log.read_text(errors="replace") if log.is_file() else ""
    errors = re.findall(r"^(?:error: |\w*(?:Error|Exception): ).*$", text.rpartition("\n=== ")[2], re.MULTILINE)
    return f": {errors[-1].removeprefix('error: ')}" if errors else ""


@contextlib.contextmanager
def _heeding() -> Iterator[list[int]]:
    """The stop signals that come, noted instead of ending this process."""
    heard: list[int] = []
    handlers = {n: signal.signal(n, lambda number, _frame: heard.append(number)) for n in stop_signals()}
    try:
        yield heard
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
