"""Several strategies × seeds, and whatever else is varied, a run each, and a report that compares them.

    python -m kuavo_train.study                                     # replay, sequential and joint, seeds 0 and 1
    python -m kuavo_train.study strategy=replay,ewc,merge seed=0,1,2 profile=smoke
    python -m kuavo_train.study strategy=replay memory=standard,strong replay.buffer=0.02,0.2
    python -m kuavo_train.study run=long training.epochs=20         # other settings: another name
    python -m kuavo_train.study engine=local engine.jobs=4          # four cells at a time, each with its share of CPUs
    python -m kuavo_train.study engine=slurm engine.partition=gpu   # each a job of the cluster

Any override that holds for all stages may be given, and with commas any setting that can change a result is varied. One
of ewc.…, distill.… or adapters.… goes to the cells of that strategy, one of merge.… to those of merge and
merge_replay, one of replay.… to those of replay and merge_replay (with mixture=… to all). The run of a cell is named
<run>-<strategy>-s<seed>, with <key>_<value> of what else is varied before the seed. Finished cells are skipped and an
interrupted one goes on, so the same command continues what was cut off, and one with more values adds to it. Cells with
the same first stage train it once.

outputs/<run>-study/ holds study.json, logs/ and report/, the comparison of all finished cells.
"""

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import NoReturn

from kuavo_train.command_line import check_folders, config_dir_as_key, errors_in_one_line, quieten_libraries, set_hub
from kuavo_train.compose import check_overrides, compose_run, split_varied
from kuavo_train.config import RunConfig
from kuavo_train.curriculum import check_curriculum_settings, train_all_stages
from kuavo_train.engine.choice import engine_of
from kuavo_train.engine.engine import Ended
from kuavo_train.errors import require
from kuavo_train.interruption import end_on_signals
from kuavo_train.launcher import check_launched_once
from kuavo_train.runs.lease import held
from kuavo_train.runs.settings import is_free
from kuavo_train.runs.stored_run import StoredRun, finished_cells
from kuavo_train.runs.study_file import Cell, StudyFile, axes_of

VARIED = {"strategy": ["replay", "sequential", "joint"], "seed": ["0", "1"]}
"""What a study varies in any case, and over what when nothing is said."""

OF_STRATEGIES = {
    "ewc": ("ewc",),
    "distill": ("distill",),
    "merge": ("merge", "merge_replay"),
    "adapters": ("adapters",),
    "replay": ("replay", "merge_replay"),
}
"""Group of settings → the strategies that alone have it."""


def main(arguments: Sequence[str]) -> int:
    if {"-h", "--help", "help"} & set(arguments):
        print(__doc__)
        return 0
    run, shared, cells = compose_cells(arguments)
    first = cells[0].configs[0]
    quieten_libraries()
    check_folders(first)
    set_hub(first)
    check_launched_once(first.processes)
    path = _study_file(first.outputs, run)
    with held(path.parent, f"study {run}"):
        return _carry_out(StudyFile(path, run, shared), cells)


def _study_file(outputs: str, run: str) -> Path:
    return Path(outputs) / f"{run}-study" / "study.json"


def _carry_out(study: StudyFile, cells: Sequence[Cell]) -> int:
    from kuavo_train.stage.setup import record_missing_data

    first = cells[0].configs[0]
    record_missing_data(first, [config.stage for config in cells[0].configs])
    if first.data_only:
        return 0
    for cell in cells:
        check_curriculum_settings(cell.configs)
    for cell in cells:
        study.write(cell, "finished" if cell.finished else "waiting")
    engine = engine_of(first.engine, train_cell, study.path.parent / "logs", first.processes)
    if status := engine.train(cells, StudyNotes(study)):
        return status
    _compare(study)
    return 0 if all(cell.finished for cell in cells) else 1


def train_cell(configs: Sequence[RunConfig]) -> int:
    """All stages of a cell, and its report; the exit status."""
    from kuavo_train.reporting.run_analysis import analyse
    from kuavo_train.reporting.write_report import write_report

    status = train_all_stages(configs)
    if status == 0:
        write_report(analyse(StoredRun.open(configs[0].run_folder)))
    return status


@dataclass(frozen=True)
class StudyNotes:
    """What an engine does, on record in study.json; cells that share a first stage train it once."""

    study: StudyFile

    def waits(self, cell: Cell, running: Sequence[Cell]) -> bool:
        """For the first stage of one that runs."""
        from kuavo_train.runs.run_folder import stage_folder

        if stage_folder(cell.stages[0]).holds_files:
            return False
        alike = [other for other in running if other.first_stage == cell.first_stage]
        return any(stage_folder(other.stages[0]).status != "finished" for other in alike)

    def begins(self, cell: Cell) -> str | None:
        """Where another cell has finished the same first stage, this one goes on from there."""
        from kuavo_train.runs.first_stage import take_over
        from kuavo_train.runs.run_folder import StageFolder, stage_folder

        self.study.write(cell, "running")
        first, target = cell.stages[0], stage_folder(cell.stages[0])
        if target.holds_files:
            return None
        for other in self.study.with_first_stage_of(cell):
            about = {"run": other["run"], "settings": cell.first_stage}
            if take_over(StageFolder(Path(other["folder"]) / target.path.name), target, first, about):
                return f"stage 1 of {cell.run} goes on from the last step of that of {other['run']}"
        return None

    def ends(self, cell: Cell, state: Ended, *, seconds: float) -> None:
        self.study.write(cell, state, seconds=seconds)


def compose_cells(arguments: Sequence[str]) -> tuple[str, list[str], list[Cell]]:
    """The study's name, the overrides that its cells share, and the cells, one seed after another.

    Raises:
        ConfigError: commas for what cannot change a result, or anything wrong with any cell's configuration.
    """
    arguments = config_dir_as_key(arguments)
    check_overrides(arguments)
    values, shared = split_varied(arguments, VARIED)
    for axis in values:
        require(not is_free(axis), axis, "have one value, since a study varies what can change a result", values[axis])
    (named, *_), _ = _configs({axis: found[0] for axis, found in values.items()}, shared)
    run = named.run
    values, shared = split_varied(arguments, VARIED, also=axes_of(_study_file(named.outputs, run)))
    cells: dict[str, Cell] = {}
    for seed, strategy, *others in product(*(values[axis] for axis in ("seed", "strategy", *_others(values)))):
        chosen = dict(zip(("seed", "strategy", *_others(values)), (seed, strategy, *others), strict=True))
        configs, axes = _configs(chosen, shared, run)
        cell = Cell(strategy, configs[0].seed, configs, axes)
        known = cells.setdefault(cell.run, cell)  # one strategy's settings are no axis for another's cells
        rule = "differ in letters and digits, since they name a run"
        require(known.axes == axes, ", ".join(axes), rule, [list(known.axes.values()), list(axes.values())])
    return run, [override for override in shared if not override.startswith("run=")], list(cells.values())


def _others(axes: Mapping[str, object]) -> list[str]:
    return [axis for axis in axes if axis not in VARIED]


def _configs(
    chosen: Mapping[str, str], shared: Sequence[str], run: str | None = None
) -> tuple[list[RunConfig], dict[str, str]]:
    """Those of a cell, and what of the axes beside strategy and seed it has.

    Args:
        run: of the study, which the cell's own is named by.
    """
    strategy, seed = chosen["strategy"], chosen["seed"]
    words = {axis: f"{axis}={chosen[axis]}" for axis in _others(chosen)}
    own = _for(strategy, [*words.values(), *shared])
    axes = {axis: chosen[axis] for axis, word in words.items() if word in own}
    own = [f"strategy={strategy}", f"seed={seed}", *own]
    if run is None:
        return compose_run(own), axes
    parts = [
        run,
        strategy,
        *(f"{axis.rpartition('.')[2]}_{_as_name(value)}" for axis, value in axes.items()),
        f"s{seed}",
    ]
    configs = compose_run([*own, f"run={'-'.join(parts)}"])
    return [replace(config, axes=axes) for config in configs], axes


def _as_name(value: str) -> str:
    """As a part of a folder's name."""
    return re.sub(r"[^A-Za-z0-9.]+", "_", value).strip("_")


def _for(strategy: str, overrides: Sequence[str]) -> list[str]:
    """Without what only another strategy has settings for."""
    mixed = any(override.startswith("mixture=") for override in overrides)  # then the configuration says who replays
    others = tuple(
        f"{group}."
        for group, strategies in OF_STRATEGIES.items()
        if strategy not in strategies and not (mixed and group == "replay")
    )
    return [override for override in overrides if not override.startswith(others)]


def _compare(study: StudyFile) -> None:
    from kuavo_train.reporting.strategy_comparison import compare
    from kuavo_train.reporting.text_report import comparison_table
    from kuavo_train.reporting.write_report import write_comparison

    runs = finished_cells(study.path)
    if len(runs) < 2:
        print(f"\nnothing to compare yet: {len(runs)} finished runs in {study.path}")
        return
    comparison = compare([StoredRun.open(run) for run in runs])
    page = write_comparison(comparison, study.path.parent / "report")
    print(f"\n{comparison_table(comparison)}\n\ncomparison: {page}")


def command() -> NoReturn:
    end_on_signals()
    sys.exit(errors_in_one_line(lambda: main(sys.argv[1:])))


if __name__ == "__main__":
    command()
