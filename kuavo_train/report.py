"""What was kept and what was lost: a run, or several runs side by side, as one self-contained HTML file.

    python -m kuavo_train.report run=outputs/<run>              # no run: the one modified last under outputs/
    python -m kuavo_train.report run=outputs/<run> joint=outputs/<joint run>          # adds intransigence
    python -m kuavo_train.report run=outputs/<run> slight_change=0.2                  # other limits for the verdict
    python -m kuavo_train.report runs=outputs/<a>,outputs/<b>   # strategies × seeds compared
    python -m kuavo_train.report runs=outputs/<run>-study       # the same, all runs of a study
    python -m kuavo_train.report runs=… output=some/folder

A run's report is written to outputs/<run>/report: report.html, matrix.json, training.csv (the curves of loss and
learning rate), figures as PNG. A comparison is written
to the study's report/, or to comparison/ beside the first run: comparison.html, comparison.json, comparison.csv and
figures. Every number on a page stands in a file beside it.
"""

import csv
import dataclasses
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kuavo_train.command_line import key_values
from kuavo_train.errors import RunFolderError
from kuavo_train.evaluation.comparison import CSV_COLUMNS, compare, comparison_rows
from kuavo_train.evaluation.matrix import analyse, stored_limits, write_matrix
from kuavo_train.evaluation.page import look_up, write_page
from kuavo_train.evaluation.stored_run import finished_cells, newest_run, read_run
from kuavo_train.evaluation.terminal import comparison_lines, run_lines
from kuavo_train.interruption import main_ends_on_signals
from kuavo_train.metrics.verdict import RetentionLimits

__all__ = ["comparison_table", "look_up", "main", "summary_table", "write_comparison", "write_matrix", "write_report"]

OUTPUTS = Path("outputs")
TRAINING_COLUMNS = ("stage", "step", "epoch", "loss", "penalty", "lr", "grad_norm", "samples_per_s")
"""Of training.csv, from the lines of metrics.jsonl."""


def write_report(
    run_folder: Path | str, *, limits: RetentionLimits | None = None, joint: Path | str | None = None
) -> Path:
    """Write report/ in the run folder and return the path of report.html. Arguments and errors as `write_matrix`."""
    from kuavo_train.evaluation.figure_style import save_figures  # matplotlib: slow to import, needed only here
    from kuavo_train.evaluation.figures import run_figures
    from kuavo_train.evaluation.probe_figures import probe_figures

    matrix = write_matrix(run_folder, limits=limits, joint=joint)
    run = read_run(run_folder)
    folder = run.folder / "report"
    metrics = [(stage.index, stage.metrics) for stage in run.stages]
    lines = [{"stage": stage, **line} for stage, of_stage in metrics for line in of_stage]
    _write_csv(folder / "training.csv", TRAINING_COLUMNS, lines)
    figures = save_figures(folder, {**run_figures(matrix, metrics), **probe_figures(matrix["probes"])})
    return write_page(folder / "report.html", "report.html.jinja", matrix, figures)


def write_comparison(runs: Sequence[Path], into: Path, *, limits: RetentionLimits | None = None) -> Path:
    """Write the comparison of run folders and return the path of comparison.html.

    Raises:
        RunFolderError: as `compare`.
    """
    from kuavo_train.evaluation.comparison_figures import comparison_figures
    from kuavo_train.evaluation.figure_style import save_figures

    comparison = compare(runs, limits)
    into.mkdir(parents=True, exist_ok=True)
    partial = into / "comparison.json.partial"
    partial.write_text(json.dumps(comparison, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    partial.replace(into / "comparison.json")
    _write_csv(into / "comparison.csv", CSV_COLUMNS, comparison_rows(comparison))
    figures = save_figures(into, comparison_figures(comparison))
    return write_page(into / "comparison.html", "comparison.html.jinja", comparison, figures)


def _write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """What a row has beyond the columns is left out."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def summary_table(run_folder: Path | str) -> str:
    """The run in a few lines for a terminal. Raises RunFolderError as `write_matrix` does; writes nothing."""
    run = read_run(run_folder)
    return run_lines(analyse(run, stored_limits(run.folder) or RetentionLimits()))


def comparison_table(runs: Sequence[Path], *, limits: RetentionLimits | None = None) -> str:
    """The comparison in a few lines for a terminal. Raises RunFolderError as `compare` does; writes nothing."""
    return comparison_lines(compare(runs, limits))


def main(arguments: Sequence[str]) -> int:
    """Command line: key=value arguments; 0, or 1 with the error on stderr."""
    if {"-h", "--help", "help"} & set(arguments):
        print(__doc__)
        return 0
    settings = {field.name: field for field in dataclasses.fields(RetentionLimits)}
    try:
        given = key_values(arguments, ["run", "joint", "runs", "output", *settings])
        wanted = {key: _parse(key, text) for key, text in given.items() if key in settings}
        if "runs" in given:
            _report_several(given, wanted)
        else:
            _report_one(given, wanted)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _report_one(given: dict[str, str], wanted: dict[str, Any]) -> None:
    _refuse_together(given, "output", "run")
    if "run" in given:
        run_folder = Path(given["run"])
    else:
        run_folder = newest_run(OUTPUTS)
        print(f"no run given: taking the one modified last, {run_folder}")
    limits = None
    if wanted:
        limits = dataclasses.replace(stored_limits(run_folder) or RetentionLimits(), **wanted)
    page = write_report(run_folder, limits=limits, joint=given.get("joint"))
    print(f"{run_lines(_stored(page.with_name('matrix.json')))}\n\nreport: {page}")


def _report_several(given: dict[str, str], wanted: dict[str, Any]) -> None:
    for key in ("run", "joint"):
        _refuse_together(given, key, "runs")
    runs, output = run_folders(given["runs"])
    limits = RetentionLimits(**wanted)
    page = write_comparison(runs, Path(given.get("output", output)), limits=limits)
    print(f"{comparison_lines(_stored(page.with_name('comparison.json')))}\n\ncomparison: {page}")


def _stored(path: Path) -> dict[str, Any]:
    """What was just written: the terminal tells the same as the page."""
    return json.loads(path.read_text(encoding="utf-8"))


def run_folders(text: str) -> tuple[list[Path], Path]:
    """`runs=` → the run folders, and where their comparison belongs.

    Args:
        text: folders with commas between them; each a run, a study (its finished runs), or a folder that holds runs.

    Raises:
        RunFolderError: a folder that is none of these.
    """
    runs: list[Path] = []
    output = None
    for name in filter(None, text.split(",")):
        folder = Path(name)
        if (folder / "run.json").is_file():
            runs.append(folder)
            output = output or folder.parent / "comparison"
        elif (folder / "study.json").is_file():
            runs += finished_cells(folder / "study.json")
            output = output or folder / "report"
        elif found := sorted(path.parent for path in folder.glob("*/run.json")):
            runs += found
            output = output or folder / "comparison"
        else:
            raise RunFolderError(f"{folder} is no run, no study and holds no runs: give runs=outputs/<a>,outputs/<b>")
    if output is None:
        raise RunFolderError("runs must name at least two run folders, got none: give runs=outputs/<a>,outputs/<b>")
    return runs, output


def _refuse_together(given: dict[str, str], key: str, with_key: str) -> None:
    if key in given:
        raise ValueError(f"{key}= does not go together with {with_key}=: `python -m kuavo_train.report --help`")


def _parse(key: str, text: str) -> Any:
    """A limit from the command line."""
    try:
        return int(text) if key == "resamples" else float(text)
    except ValueError as error:
        raise ValueError(f"{key} must be a number, got {text!r}") from error


if __name__ == "__main__":
    main_ends_on_signals(main)
