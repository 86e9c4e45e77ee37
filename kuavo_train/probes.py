"""Questions to a trained run that its losses do not answer: three probes, each a section of its report.

    python -m kuavo_train.probes run=outputs/<run>                         # all three; no run: the one modified last
    python -m kuavo_train.probes run=outputs/<run> probe=recovery steps=50 # is what was forgotten lost, or suppressed?
    python -m kuavo_train.probes run=outputs/<run> probe=instruction_swap  # does it listen to language?
    python -m kuavo_train.probes run=outputs/<run> probe=memory            # what is the memory worth, stage by stage?

Writes outputs/<run>/report/probes/<probe>.json and the report anew. The same run gives the same numbers again: noise
and order of samples are functions of the run's seed.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from kuavo_train.command_line import key_values
from kuavo_train.errors import ConfigError, RunFolderError, one_of, require
from kuavo_train.interruption import main_ends_on_signals
from kuavo_train.probing.run_probes import PROBES, run_probe
from kuavo_train.probing.validated_run import NothingToProbe
from kuavo_train.report import OUTPUTS
from kuavo_train.reporting.run_analysis import analyse
from kuavo_train.reporting.write_report import write_report
from kuavo_train.runs.stored_run import StoredRun, newest_run


def main(words: Sequence[str]) -> int:
    """Command line: key=value arguments; 0, or 2 with the error on stderr."""
    if {"-h", "--help", "help"} & set(words):
        print(__doc__)
        return 0
    try:
        given = key_values(words, ("run", "probe", "steps"))
        folder = Path(given["run"]) if "run" in given else newest_run(OUTPUTS)
        one_of("probe", given.get("probe", "recovery"), PROBES)
        names = [given["probe"]] if "probe" in given else list(PROBES)
        settings = {"recovery": {"steps": _whole("steps", given["steps"])} if "steps" in given else {}}
        require("steps" not in given or "recovery" in names, "steps", "go with probe=recovery", given.get("steps"))
        for name in names:
            try:
                print(f"{name}: {run_probe(name, folder, **settings.get(name, {}))}")
            except NothingToProbe as nothing:
                if "probe" in given:
                    raise
                print(f"{name}: left out: {nothing}")
        print(f"report: {write_report(analyse(StoredRun.open(folder)))}")
    except (ConfigError, RunFolderError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _whole(key: str, text: str) -> int:
    require(text.isdigit(), key, "be a whole number", text)
    return int(text)


if __name__ == "__main__":
    main_ends_on_signals(main)
