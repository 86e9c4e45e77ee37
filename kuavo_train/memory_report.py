"""What a policy's memory does, as pictures and numbers: is it written, is it used, what for.

    python -m kuavo_train.memory_report checkpoint=outputs/<run>/stage2_weighing/checkpoints/best task=weighing
    python -m kuavo_train.memory_report checkpoint=… task=… data=outputs/probe/weighing   # other episodes of the task
    python -m kuavo_train.memory_report checkpoint=… task=… episodes=4 output=some/folder

Takes the run's held-out episodes of the task, or all of `data`, a dataset that was never trained on. Writes
memory.json, memory_trace.png and, where the task has cues, memory_cue.png to `output` (default:
<stage folder>/memory_<task>). What is asked of the memory is told in `kuavo_train.probing.memory_walk`.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from kuavo_train.command_line import key_values
from kuavo_train.errors import ConfigError, RunFolderError, require
from kuavo_train.interruption import main_ends_on_signals
from kuavo_train.probing.memory_report import report, summary

KEYS = ("checkpoint", "task", "data", "episodes", "output")


def main(words: Sequence[str]) -> int:
    """Command line: key=value arguments; 0, or 2 with the error on stderr."""
    if {"-h", "--help", "help"} & set(words):
        print(__doc__)
        return 0
    try:
        given = key_values(words, KEYS)
        for key in ("checkpoint", "task"):
            require(key in given, key, "be given", "nothing")
        episodes = given.get("episodes")
        require(episodes is None or episodes.isdigit(), "episodes", "be a whole number", episodes)
        found = report(
            Path(given["checkpoint"]),
            given["task"],
            data=Path(given["data"]) if "data" in given else None,
            episodes=int(episodes) if episodes is not None else None,
            output=Path(given["output"]) if "output" in given else None,
        )
    except (ConfigError, RunFolderError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(summary(found))
    return 0


if __name__ == "__main__":
    main_ends_on_signals(main)
