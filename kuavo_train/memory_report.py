"""What a policy's memory does, as pictures and numbers: is it written, is it used, what for.

    python -m kuavo_train.memory_report checkpoint=outputs/<run>/stage2_weighing/checkpoints/best task=weighing
    python -m kuavo_train.memory_report checkpoint=… task=… data=outputs/probe/weighing   # other episodes of the task
    python -m kuavo_train.memory_report checkpoint=… task=… episodes=4 output=some/folder

    python -m kuavo_train.memory_report checkpoint=… task=… cue_column=lamp_colour        # a column that names the cue

Takes the run's held-out episodes of the task, or all of `data`, a dataset that was never trained on. Writes
memory.json, memory_trace.png, memory_loss.png and, where the task has cues, memory_cue.png to `output` (default:
<stage folder>/memory_<task>). `kuavo_train.probing.memory_walk` says what is measured, and
`kuavo_train.probing.recorded_cues` how by columns of a dataset.
"""

from collections.abc import Sequence
from typing import NoReturn

from kuavo_train.command_line import errors_in_one_line, parse
from kuavo_train.interruption import main_ends_on_signals
from kuavo_train.probing.memory_report import Options, report, summary


def main(words: Sequence[str]) -> int:
    """Command line: key=value arguments; the exit status."""
    return errors_in_one_line(lambda: _report(parse(Options, words, help=__doc__)))


def _report(options: Options) -> int:
    print(summary(report(options)))
    return 0


def command() -> NoReturn:
    main_ends_on_signals(main)


if __name__ == "__main__":
    command()
