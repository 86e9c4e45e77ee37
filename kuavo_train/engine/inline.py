"""engine=inline: one cell after another, in this process, which prints what each of them prints."""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from kuavo_train.engine.engine import Ended, Notes, Train, state_of
from kuavo_train.errors import RunError
from kuavo_train.runs.study_file import Cell


@dataclass(frozen=True)
class Inline:
    work: Train

    def train(self, cells: Sequence[Cell], notes: Notes) -> int:
        for number, cell in enumerate(cells, start=1):
            title = f"run {number} of {len(cells)}: {cell.title}"
            if cell.finished:
                print(f"{title} is finished in {cell.folder}", flush=True)
                continue
            print(f"\n=== {title}, in {cell.folder}", flush=True)
            status = self._train(cell, notes, title)
            if status > 1:  # 1: what failed has been said, and the next one is tried
                return status
        return 0

    def _train(self, cell: Cell, notes: Notes, title: str) -> int:
        if said := notes.begins(cell):
            print(said, flush=True)
        began = time.monotonic()
        state: Ended = "failed"
        try:
            status = self.work(cell.configs)
            state = state_of(status)
        except RunError as error:
            print(f"error: {title}: {error}", file=sys.stderr, flush=True)
            return 1
        except (KeyboardInterrupt, SystemExit):
            state = "interrupted"
            raise
        finally:
            notes.ends(cell, state, seconds=time.monotonic() - began)
        return status
