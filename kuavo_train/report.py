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

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kuavo_train.command_line import key_values
from kuavo_train.interruption import main_ends_on_signals
from kuavo_train.metrics.verdict import RetentionLimits
from kuavo_train.reporting.run_analysis import analyse, stored_limits
from kuavo_train.reporting.strategy_comparison import compare
from kuavo_train.reporting.text_report import comparison_table, summary_table
from kuavo_train.reporting.write_report import run_folders, write_comparison, write_report
from kuavo_train.runs.stored_run import StoredRun, newest_run

OUTPUTS = Path("outputs")


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
    joint = StoredRun.open(given["joint"]) if "joint" in given else None
    analysis = analyse(StoredRun.open(run_folder), limits=limits, joint=joint)
    page = write_report(analysis)
    print(f"{summary_table(analysis)}\n\nreport: {page}")


def _report_several(given: dict[str, str], wanted: dict[str, Any]) -> None:
    for key in ("run", "joint"):
        _refuse_together(given, key, "runs")
    runs, output = run_folders(given["runs"])
    comparison = compare([StoredRun.open(run) for run in runs], RetentionLimits(**wanted))
    page = write_comparison(comparison, Path(given.get("output", output)))
    print(f"{comparison_table(comparison)}\n\ncomparison: {page}")


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
