"""Several strategies × seeds, a run each, and a report that compares them.

    python -m kuavo_train.study                                     # replay, sequential and joint, seeds 0 and 1
    python -m kuavo_train.study strategy=replay,ewc,merge seed=0,1,2 profile=smoke
    python -m kuavo_train.study run=long training.epochs=20         # other settings: another name

Any override that holds for all stages may be given; commas are for strategy and seed alone. One of ewc.… or merge.…
goes to the cells of that strategy. The run of a cell is named <run>-<strategy>-s<seed>. Finished cells are skipped and
an interrupted one goes on, so the same command continues what was cut off, and one with more strategies or seeds adds
to it. outputs/<run>-study/ holds study.json and report/, the comparison of all finished cells.
"""

import sys
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import NoReturn

from kuavo_train.command_line import check_folders, config_dir_as_key, errors_in_one_line, quieten_libraries, set_hub
from kuavo_train.compose import check_overrides, compose_run, split_varied
from kuavo_train.curriculum import check_curriculum_settings, train_all_stages
from kuavo_train.errors import RunError
from kuavo_train.interruption import end_on_signals
from kuavo_train.runs.lease import held
from kuavo_train.runs.stored_run import StoredRun, finished_cells
from kuavo_train.runs.study_file import Cell, StudyFile

VARIED = {"strategy": ["replay", "sequential", "joint"], "seed": ["0", "1"]}
"""What a study varies, and over what when nothing is said."""

OF_ONE_STRATEGY = ("ewc", "merge")
"""Groups of settings that only the strategy of that name has."""


def main(arguments: Sequence[str]) -> int:
    if {"-h", "--help", "help"} & set(arguments):
        print(__doc__)
        return 0
    run, shared, cells = compose_cells(arguments)
    first = cells[0].configs[0]
    quieten_libraries()
    check_folders(first)
    set_hub(first)
    path = Path(first.outputs) / f"{run}-study" / "study.json"
    with held(path.parent, f"study {run}"):
        return _carry_out(StudyFile(path, run, shared), cells)


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
    for number, cell in enumerate(cells, start=1):
        status = _run_cell(cell, study, f"run {number} of {len(cells)}: {cell.strategy}, seed {cell.seed}")
        if status:
            return status
    _compare(study)
    return 0 if all(cell.finished for cell in cells) else 1


def compose_cells(arguments: Sequence[str]) -> tuple[str, list[str], list[Cell]]:
    """The study's name, the overrides that its cells share, and the cells, one seed after another.

    Raises:
        ConfigError: commas elsewhere than in strategy and seed, or anything wrong with any cell's configuration.
    """
    arguments = config_dir_as_key(arguments)
    check_overrides(arguments)
    varied, shared = split_varied(arguments, VARIED)
    cells, run = [], ""
    for seed, strategy in product(varied["seed"], varied["strategy"]):
        own = [f"strategy={strategy}", f"seed={seed}", *_for(strategy, shared)]
        run = run or compose_run(own)[0].run
        configs = compose_run([*own, f"run={run}-{strategy}-s{seed}"])
        cells.append(Cell(configs[0].strategy, configs[0].seed, configs))
    return run, [override for override in shared if not override.startswith("run=")], cells


def _for(strategy: str, overrides: Sequence[str]) -> list[str]:
    """Without what only another strategy has settings for."""
    others = tuple(f"{group}." for group in OF_ONE_STRATEGY if group != strategy)
    return [override for override in overrides if not override.startswith(others)]


def _run_cell(cell: Cell, study: StudyFile, title: str) -> int:
    """Train what the cell lacks; a failure is reported and the study goes on, an interruption ends it."""
    from kuavo_train.reporting.run_analysis import analyse
    from kuavo_train.reporting.write_report import write_report

    if cell.finished:
        print(f"{title} is finished in {cell.folder}", flush=True)
        return 0
    print(f"\n=== {title}, in {cell.folder}", flush=True)
    study.write(cell, "running")
    began, outcome = time.monotonic(), "failed"
    try:
        status = train_all_stages(cell.configs)
        if status:
            outcome = "interrupted"
            return status
        write_report(analyse(StoredRun.open(cell.folder)))
        outcome = "finished"
    except RunError as error:
        print(f"error: {title}: {error}", file=sys.stderr, flush=True)
    except (KeyboardInterrupt, SystemExit):
        outcome = "interrupted"
        raise
    finally:
        study.write(cell, outcome, seconds=time.monotonic() - began)
    return 0


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
