"""Reports written: the page of a run, with its figures and tables, or of several runs side by side."""

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kuavo_train.errors import RunFolderError
from kuavo_train.metrics.verdict import RetentionLimits
from kuavo_train.reporting.html_page import write_page
from kuavo_train.reporting.run_analysis import analyse, stored_limits, write_matrix
from kuavo_train.reporting.strategy_comparison import CSV_COLUMNS, compare, comparison_rows
from kuavo_train.reporting.text_report import comparison_lines, run_lines
from kuavo_train.runs.stored_run import finished_cells, read_run

TRAINING_COLUMNS = ("stage", "step", "epoch", "loss", "penalty", "lr", "grad_norm", "samples_per_s")
"""Of training.csv, from the lines of metrics.jsonl."""


def write_report(
    run_folder: Path | str, *, limits: RetentionLimits | None = None, joint: Path | str | None = None
) -> Path:
    """Write report/ in the run folder and return the path of report.html. Arguments and errors as `write_matrix`."""
    from kuavo_train.reporting.figures.probes import probe_figures
    from kuavo_train.reporting.figures.run import run_figures
    from kuavo_train.reporting.figures.style import save_figures  # matplotlib: slow to import, needed only here

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
    from kuavo_train.reporting.figures.comparison import comparison_figures
    from kuavo_train.reporting.figures.style import save_figures

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
