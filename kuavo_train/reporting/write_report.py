"""Reports written: the page of a run, with its figures and tables, or of several runs side by side."""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from kuavo_train.errors import RunFolderError
from kuavo_train.reading import Json
from kuavo_train.reporting.films import FILMS
from kuavo_train.reporting.html_page import write_page
from kuavo_train.reporting.run_analysis import SIGN_CONVENTION, Analysis, write_matrix, write_numbers
from kuavo_train.reporting.strategy_comparison import Comparison, Estimate
from kuavo_train.reporting.text_report import about_intervals, evidence, outcome
from kuavo_train.runs.files import in_one_move
from kuavo_train.runs.stored_run import finished_cells

TRAINING_COLUMNS = ("stage", "step", "epoch", "loss", "penalty", "distillation", "lr", "grad_norm", "samples_per_s")
"""Of training.csv, from the lines of metrics.jsonl."""
COMPARISON_COLUMNS = ("what", "strategy", "seed", "measure", "task", "estimate", "low", "high", "level", "seeds")
"""Of comparison.csv."""


def write_report(analysis: Analysis) -> Path:
    """Write report/ in the run folder and return the path of report.html."""
    from kuavo_train.reporting.figures.probes import probe_figures
    from kuavo_train.reporting.figures.run import run_figures
    from kuavo_train.reporting.figures.style import save_figures  # matplotlib: slow to import, needed only here

    write_matrix(analysis)
    matrix, stages = analysis.matrix, analysis.run.stages
    lines = [{"stage": stage.index, **asdict(line)} for stage in stages for line in stage.metrics]
    _write_csv(analysis.folder / "training.csv", TRAINING_COLUMNS, lines)
    drawings = {**run_figures(matrix, stages), **probe_figures(matrix["probes"])}
    figures = save_figures(analysis.folder, drawings)
    films = {film["file"]: analysis.run.folder / FILMS / film["file"] for film in matrix["films"]["shown"]}
    return write_page(analysis.folder / "report.html", "report.html.jinja", matrix, figures, films)


def write_comparison(comparison: Comparison, into: Path) -> Path:
    """Write comparison.json, its page, its table as CSV and its figures; returns the path of comparison.html."""
    from kuavo_train.reporting.figures.comparison import comparison_figures
    from kuavo_train.reporting.figures.style import save_figures

    content = comparison_content(comparison)
    into.mkdir(parents=True, exist_ok=True)
    write_numbers(into / "comparison.json", content)
    _write_csv(into / "comparison.csv", COMPARISON_COLUMNS, _comparison_rows(comparison))
    figures = save_figures(into, comparison_figures(content))
    return write_page(into / "comparison.html", "comparison.html.jinja", content, figures)


def comparison_content(comparison: Comparison) -> Json:
    """Of comparison.json: the numbers, and the sentences that the page shows beside them."""
    return {
        "reference": comparison.reference,
        "seeds": comparison.seeds,
        "held_out_episodes": comparison.held_out_episodes,
        "layouts": comparison.layouts,
        "tasks": [{"name": name, "index": index} for name, index in comparison.tasks.items()],
        "partial": comparison.partial,
        "missing": comparison.missing,
        "sign_convention": SIGN_CONVENTION,
        "limits": asdict(comparison.limits),
        "rule": comparison.limits.rule,
        "intervals": about_intervals(comparison),
        "strategies": [
            {**asdict(entry), "outcome": outcome(entry), "evidence": evidence(entry, comparison)}
            for entry in comparison.strategies
        ],
        "runs": comparison.runs,
    }


def _comparison_rows(comparison: Comparison) -> list[Json]:
    """One for each number, of strategies over their seeds and of single runs."""
    rows: list[Json] = []
    for entry in comparison.strategies:
        for measure, named in entry.metrics.items():
            about = {"strategy": entry.strategy, "measure": measure}
            for metric, found in named.items():
                rows += _rows_of(metric, found.value, about)
                rows += _rows_of(f"{metric}: difference from {comparison.reference}", found.difference, about)
        for task in entry.tasks:
            about = {"strategy": entry.strategy, "measure": "loss", "task": task.task}
            for key in ("when_learnt", "now", "relative_change"):
                rows += _rows_of(key, getattr(task, key), about)
        for performed in entry.closed_loop:
            about = {"strategy": entry.strategy, "measure": "success", "task": performed.task}
            for key in ("when_learnt", "now"):
                rows += _rows_of(key, getattr(performed, key), about)
        for what in ("own_frames", "own_passes"):
            rows += [
                {"what": what, "strategy": entry.strategy, "task": task, "estimate": value}
                for task, value in getattr(entry.exposure, what).items()
            ]
    return rows + [row for run in comparison.runs for row in _cells_of(run)]


def _rows_of(what: str, estimate: Estimate | None, about: Json) -> list[Json]:
    """The mean over seeds, then each seed's own value."""
    if estimate is None:
        return []
    known = {key: getattr(estimate, key) for key in ("estimate", "low", "high", "level")}
    return [
        {"what": what, **about, **known, "seeds": len(estimate.by_seed)},
        *(
            {"what": what, **about, "seed": int(seed), "estimate": value, "seeds": 1}
            for seed, value in estimate.by_seed.items()
        ),
    ]


def _cells_of(run: Json) -> list[Json]:
    about = {"strategy": run["strategy"], "seed": run["seed"]}
    return [
        {"what": f"R after stage {row['stage']}", **about, "measure": measure, "task": task, "estimate": value}
        for measure, matrix in run["matrices"].items()
        for row in matrix["rows"]
        for task, value in row["values"].items()
        if value is not None
    ]


def _write_csv(path: Path, columns: Sequence[str], rows: Iterable[Json]) -> None:
    """What a row has beyond the columns is left out."""
    with in_one_move(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


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
