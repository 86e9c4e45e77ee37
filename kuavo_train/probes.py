"""Questions to a trained run that its losses do not answer: three probes, each a section of its report.

    python -m kuavo_train.probes run=outputs/<run>                         # all three; no run: the one modified last
    python -m kuavo_train.probes run=outputs/<run> probe=recovery steps=50 # is what was forgotten lost, or suppressed?
    python -m kuavo_train.probes run=outputs/<run> probe=instruction_swap  # does it listen to language?
    python -m kuavo_train.probes run=outputs/<run> probe=memory            # what is the memory worth, stage by stage?

Writes outputs/<run>/report/probes/<probe>.json and the report anew. The same run gives the same numbers again: noise
and order of samples are functions of the run's seed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from kuavo_train.command_line import errors_in_one_line, option, parse
from kuavo_train.errors import one_of, require
from kuavo_train.interruption import main_ends_on_signals
from kuavo_train.probing.run_probes import PROBES, run_probe
from kuavo_train.probing.validated_run import NothingToProbe
from kuavo_train.reporting.run_analysis import analyse
from kuavo_train.reporting.write_report import write_report
from kuavo_train.runs.stored_run import OUTPUTS, StoredRun, newest_run


@dataclass(frozen=True)
class Options:
    run: Path | None = option("folder of a run; none: the one modified last under outputs/", None)
    probe: str | None = option(f"{', '.join(PROBES)}; none: all that the run has something for", None)
    steps: int | None = option("that recovery learns a task again in; none: 100", None)

    def __post_init__(self) -> None:
        one_of("probe", self.probe or "recovery", PROBES)
        require(self.steps is None or self.probe in (None, "recovery"), "steps", "go with probe=recovery", self.steps)


def main(words: Sequence[str]) -> int:
    """Command line: key=value arguments; the exit status."""
    return errors_in_one_line(lambda: _probe(parse(Options, words, help=__doc__)))


def _probe(options: Options) -> int:
    folder = options.run or newest_run(OUTPUTS)
    settings = {"recovery": {} if options.steps is None else {"steps": options.steps}}
    for name in PROBES if options.probe is None else [options.probe]:
        try:
            print(f"{name}: {run_probe(name, folder, **settings.get(name, {}))}")
        except NothingToProbe as nothing:
            if options.probe is not None:
                raise
            print(f"{name}: left out: {nothing}")
    print(f"report: {write_report(analyse(StoredRun.open(folder)))}")
    return 0


def command() -> NoReturn:
    main_ends_on_signals(main)


if __name__ == "__main__":
    command()
