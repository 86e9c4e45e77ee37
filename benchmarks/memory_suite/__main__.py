"""Decisions that memory alone can make, by task, situation and memory, trained by kuavo_train itself.

    python -m benchmarks.memory_suite                                             # colour, frozen, recurrent, seed 0
    python -m benchmarks.memory_suite task=colour,order situation=nothing,frozen memory=recurrent,none seed=0,1,2
    python -m benchmarks.memory_suite task=colour policy.mem_backprop_depth=4     # fields of the policy, for all runs

Every combination of the values given is trained and evaluated, and becomes a line of OUTPUT/results.jsonl. A
combination that is there with the very same settings is skipped; a run that was cut off goes on. So the same command
continues a study.
"""

import os
import sys
from collections.abc import Sequence

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here needs the hub

from benchmarks.memory_suite.options import Options
from benchmarks.memory_suite.study import run_study
from benchmarks.memory_suite.table import table
from kuavo_train.command_line import errors_in_one_line, parse, quieten_libraries


def main(words: Sequence[str]) -> int:
    return errors_in_one_line(lambda: _run(parse(Options, words, help=__doc__)))


def _run(options: Options) -> int:
    quieten_libraries()
    records = run_study(options)
    print(f"\n{table(records)}\n\n{options.results}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
