"""study.json: the runs of a study, and how far each has come."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from kuavo_train.compose import stages_to_run
from kuavo_train.config import RunConfig
from kuavo_train.reading import Json, read_json
from kuavo_train.runs.files import write_json
from kuavo_train.runs.settings import Difference, is_free, refuse

FIND_AGAIN = "restore it from a copy, or delete it: the same command finds its runs again"


@dataclass(frozen=True)
class Cell:
    """One strategy with one seed, and one value of whatever else is varied: an ordinary run.

    Attributes:
        configs: one per task.
        axes: what is varied beside strategy and seed, and this cell's value of it.
    """

    strategy: str
    seed: int
    configs: list[RunConfig]
    axes: Mapping[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return ", ".join([self.strategy, *(f"{key}={value}" for key, value in self.axes.items()), f"seed {self.seed}"])

    @cached_property
    def stages(self) -> list[RunConfig]:
        return stages_to_run(self.configs)

    @cached_property
    def first_stage(self) -> str:
        """Of all cells that have it, one trains its first stage."""
        from kuavo_train.runs.first_stage import first_stage_key

        return first_stage_key(self.configs)

    @property
    def run(self) -> str:
        return self.configs[0].run

    @property
    def folder(self) -> Path:
        return self.configs[0].run_folder

    @property
    def finished(self) -> bool:
        # Not at the top: it brings the hub's library, which reads once, when imported, what `set_hub` sets.
        from kuavo_train.runs.run_folder import stage_folder

        return all(stage_folder(stage).status == "finished" for stage in self.stages)


class StudyFile:
    """study.json: the settings all cells share, and how far each cell is. Earlier ones know of no axes."""

    def __init__(self, path: Path, run: str, overrides: Sequence[str]):
        self.path = path
        self.content: Json = {"run": run, "overrides": list(overrides), "cells": []}
        if path.is_file():
            stored = read_json(path, keys=("overrides", "cells"), remedy=FIND_AGAIN)
            was, now = (_by_key(each) for each in (stored["overrides"], self.content["overrides"]))
            different = [Difference(key, was.get(key, "unset"), now.get(key, "unset")) for key in sorted({*was, *now})]
            refuse(
                [each for each in different if each.was != each.now],
                f"study {run} must keep the settings it began with ({path})",
            )
            self.content = stored

    def write(self, cell: Cell, status: str, *, seconds: float = 0.0) -> None:
        """Note a cell's status (waiting, running, finished, interrupted or failed) and the seconds spent on it now."""
        about = {
            "run": cell.run,
            "folder": str(cell.folder),
            "strategy": cell.strategy,
            "seed": cell.seed,
            "axes": dict(cell.axes),
            "first_stage": cell.first_stage,
        }
        cells = {each["run"]: each for each in self.content["cells"]}
        spent = cells.get(cell.run, {}).get("seconds", 0.0)
        cells[cell.run] = {**about, "status": status, "seconds": round(spent + seconds, 1)}
        self.content["cells"] = list(cells.values())
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.content)

    def with_first_stage_of(self, cell: Cell) -> list[Json]:
        """The entries of the other cells, of earlier commands too, whose first stage is the same."""
        entries = self.content["cells"]
        return [each for each in entries if each["run"] != cell.run and each.get("first_stage") == cell.first_stage]


def axes_of(path: Path) -> list[str]:
    """What the study of a study.json has varied so far beside strategy and seed; nothing where there is none yet."""
    cells = read_json(path, keys=("cells",), remedy=FIND_AGAIN)["cells"] if path.is_file() else []
    return list(dict.fromkeys(axis for cell in cells for axis in cell.get("axes", {})))


def _by_key(overrides: Sequence[str]) -> dict[str, str]:
    """Key → value of those that can change a result."""
    given = dict(override.lstrip("+~").partition("=")[::2] for override in overrides)
    return {key: value for key, value in given.items() if not is_free(key)}
