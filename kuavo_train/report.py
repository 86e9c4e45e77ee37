"""What was kept and what was lost: a run, or several runs side by side, as one self-contained HTML file.

    python -m kuavo_train.report run=outputs/<run>              # no run: the one modified last under outputs/
    python -m kuavo_train.report run=outputs/<run> joint=outputs/<joint run>          # adds intransigence
    python -m kuavo_train.report run=outputs/<run> slight_change=0.2                  # other limits for the verdict
    python -m kuavo_train.report run=outputs/<run> films=true   # films of the final policy anew, in a simulated run
    python -m kuavo_train.report runs=outputs/<a>,outputs/<b>   # strategies × seeds compared
    python -m kuavo_train.report runs=outputs/<run>-study       # the same, all runs of a study
    python -m kuavo_train.report runs=… output=some/folder

A run's report is written to outputs/<run>/report: report.html, matrix.json, training.csv (the curves of loss and
learning rate), figures as PNG. A comparison is written
to the study's report/, or to comparison/ beside the first run: comparison.html, comparison.json, comparison.csv and
figures. Every number on a page stands in a file beside it.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from kuavo_train.command_line import errors_in_one_line, option, parse
from kuavo_train.errors import ConfigError, require
from kuavo_train.interruption import main_ends_on_signals
from kuavo_train.metrics.verdict import RetentionLimits
from kuavo_train.reading import Json
from kuavo_train.reporting.run_analysis import analyse, stored_limits
from kuavo_train.reporting.strategy_comparison import compare
from kuavo_train.reporting.text_report import comparison_table, success_table, summary_table
from kuavo_train.reporting.write_report import run_folders, write_comparison, write_report
from kuavo_train.runs.stored_run import OUTPUTS, StoredRun, newest_run


@dataclass(frozen=True)
class Options:
    run: Path | None = option("folder of a run; none: the one modified last under outputs/", None)
    joint: Path | None = option("folder of a jointly trained run on the same data, for intransigence", None)
    films: bool = option("play each job's best and typical episode again and film them, at the top of the page", False)
    runs: str | None = option("folders of runs, of a study, or that hold runs, with commas between: compare them", None)
    output: Path | None = option("where the comparison goes", None)
    limits: Json = option("of the verdict; none: as the report was last written", takes=RetentionLimits)

    def __post_init__(self) -> None:
        apart = [("output", "run")] if self.runs is None else [("run", "runs"), ("joint", "runs"), ("films", "runs")]
        for key, other in apart:
            value = getattr(self, key)
            require(not value, key, f"not be given with {other}=", value and str(value))


def main(words: Sequence[str]) -> int:
    """Command line: key=value arguments; the exit status."""
    return errors_in_one_line(lambda: _report(parse(Options, words, help=__doc__)))


def _report(options: Options) -> int:
    if options.runs is None:
        _report_one(options)
    else:
        _report_several(options, options.runs)
    return 0


def _report_one(options: Options) -> None:
    folder = options.run
    if folder is None:
        folder = newest_run(OUTPUTS)
        print(f"no run given: taking the one modified last, {folder}")
    limits = _limits(options, stored_limits(folder) or RetentionLimits())
    joint = None if options.joint is None else StoredRun.open(options.joint)
    run = StoredRun.open(folder)
    if options.films:
        from kuavo_train.evaluation.films import make_films  # torch and the simulation: slow to import

        require(bool(make_films(run)), "films", "be of a run that is rolled out (rollout.episodes)", str(folder))
    analysis = analyse(run, limits=limits, joint=joint)
    page = write_report(analysis)
    print(f"{summary_table(analysis)}\n\nreport: {page}{success_table(analysis)}")


def _report_several(options: Options, runs: str) -> None:
    folders, output = run_folders(runs)
    comparison = compare([StoredRun.open(folder) for folder in folders], _limits(options, RetentionLimits()))
    page = write_comparison(comparison, options.output or output)
    print(f"{comparison_table(comparison)}\n\ncomparison: {page}")


def _limits(options: Options, before: RetentionLimits) -> RetentionLimits:
    try:
        return dataclasses.replace(before, **options.limits)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def command() -> NoReturn:
    main_ends_on_signals(main)


if __name__ == "__main__":
    command()
