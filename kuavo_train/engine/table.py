"""How far the cells of a study are: a table that is read from the files that they write themselves.

On a terminal it is drawn anew in its place; elsewhere it is printed now and then.
"""

import json
import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Self, TextIO

from kuavo_train.config import RunConfig
from kuavo_train.engine.engine import State
from kuavo_train.reading import Json, read_json
from kuavo_train.runs.study_file import Cell

COLUMNS = ("cell", "state", "stage", "step", "samples/s", "ends about")
LIVE_S = 1.0  # between two looks on a terminal
PRINTED_S = 600.0  # and elsewhere
LAST_LINE = 8192  # bytes in which the last line of metrics.jsonl is


@dataclass(frozen=True)
class Place:
    """Where a cell is: its stage, as `2 of 4`; steps done and to do; samples a second; seconds to the cell's end."""

    stage: str = ""
    step: int = 0
    steps: int = 0
    samples_per_s: float | None = None
    seconds_left: float | None = None


def place_of(cell: Cell) -> Place:
    """By the files of the stage that the cell is in; an empty one where it has not begun."""
    from kuavo_train.runs.run_folder import stage_folder

    for number, config in enumerate(cell.stages, start=1):
        folder = stage_folder(config).path
        path = folder / "stage.json"
        about = read_json(path, keys=("status",)) if path.is_file() else None
        if about is None and number > 1:  # between two stages
            return Place(f"{number} of {len(cell.stages)}")
        if about is None:
            return Place()
        if about["status"] != "finished":
            return _place(f"{number} of {len(cell.stages)}", about, folder / "metrics.jsonl", cell.stages[number - 1 :])
    return Place(f"{len(cell.stages)} of {len(cell.stages)}")


def _place(stage: str, about: Json, metrics: Path, ahead: Sequence[RunConfig]) -> Place:
    """Later stages are taken to be as long as this one, for each of their epochs."""
    last, steps = _last_line(metrics), about.get("total_steps", 0)
    if last is None:
        return Place(stage, 0, steps)
    step, seconds = last["step"], last.get("seconds")
    left = None
    if seconds:
        an_epoch = steps / ahead[0].training.epochs
        later = sum(_limited(an_epoch * config.training.epochs, config) for config in ahead[1:])
        left = (max(0, steps - step) + later) * seconds / step
    return Place(stage, step, steps, last.get("samples_per_s"), left)


def _limited(steps: float, config: RunConfig) -> float:
    return steps if config.training.max_steps is None else min(steps, config.training.max_steps)


def _last_line(path: Path) -> Json | None:
    """The last whole one of a file of JSON lines."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - LAST_LINE))
            lines = file.read().split(b"\n")[:-1]
        return json.loads(lines[-1]) if lines else None
    except (OSError, ValueError):  # not there yet, or in the midst of being written over
        return None


class Table:
    """Within it, lines are said above the table."""

    def __init__(self, cells: Sequence[Cell], stream: TextIO | None = None):
        self.cells = cells
        self.stream = stream or sys.stdout
        self.live = self.stream.isatty()
        self.states: dict[str, State] = {cell.run: "finished" if cell.finished else "waiting" for cell in cells}
        self._drawn, self._looked = 0, -PRINTED_S

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._draw()

    def say(self, line: str) -> None:
        self._wipe()
        print(line, file=self.stream, flush=True)

    def show(self, running: Iterable[str]) -> None:
        """Where the cells are, if it is time again."""
        self.states.update(dict.fromkeys(running, "running"))
        if time.monotonic() - self._looked >= (LIVE_S if self.live else PRINTED_S):
            self._looked = time.monotonic()
            self._draw()

    def _draw(self) -> None:
        self._wipe()
        lines = self.lines(datetime.now())
        if self.live:
            terminal = shutil.get_terminal_size()
            lines = [line[: terminal.columns - 1] for line in lines[: terminal.lines - 1]]
            self._drawn = len(lines)
        print("\n".join(lines), file=self.stream, flush=True)

    def _wipe(self) -> None:
        if self._drawn:
            print(f"\x1b[{self._drawn}F\x1b[J", end="", file=self.stream)
            self._drawn = 0

    def lines(self, now: datetime) -> list[str]:
        """Those that run first: there may be more cells than the terminal has lines."""
        cells = sorted(self.cells, key=lambda cell: self.states[cell.run] != "running")
        rows = [COLUMNS, *(self._row(cell, now) for cell in cells)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
        return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]

    def _row(self, cell: Cell, now: datetime) -> tuple[str, ...]:
        state, place = str(self.states[cell.run]), place_of(cell)
        if state == "running" and not place.stage:
            state = "starting"  # or in a cluster's queue
        moving = state == "running" and place.seconds_left is not None
        ends = now + timedelta(seconds=place.seconds_left or 0.0)
        return (
            cell.run,
            state,
            place.stage,
            f"{place.step}/{place.steps}" if place.steps else "",
            f"{place.samples_per_s:.1f}" if state == "running" and place.samples_per_s else "",
            ends.strftime("%H:%M" if ends.date() == now.date() else "%d %b %H:%M") if moving else "",
        )
