"""Compare checkpoints: success rate, speed, and how much language, memory and each camera contribute.

    python -m kuavo_train.evaluate final=outputs/embedded                         # a run's last stage
    python -m kuavo_train.evaluate baseline=<checkpoint> memory=<checkpoint>      # all tasks that both have learnt
    python -m kuavo_train.evaluate … tasks=weighing,sorting n_episodes=100 seed=1  # other layouts
    python -m kuavo_train.evaluate … ablate=language,memory,cameras               # a row each, without it
    python -m kuavo_train.evaluate … n_action_steps=1,2,4,8                       # a row each, so many steps per look
    python -m kuavo_train.evaluate … sampling_temperature=0,0.5,1                 # a row each, so much noise
    python -m kuavo_train.evaluate … videos=3                                     # best, typical and worst episode
    python -m kuavo_train.evaluate … environment.renderer=egl max_steps=150       # other settings of the simulation
    python -m kuavo_train.evaluate … tasks=weighing environment=my_module:my/Env-v0    # another gymnasium environment
    python -m kuavo_train.evaluate … data=outputs/data                            # demonstrations, no simulator

A checkpoint is NAME=PATH: a run, for the best of its last stage, a stage, a folder `checkpoints/best`, its
`pretrained_model`, or a hub id. Every one plays the same layouts, which no demonstration shows. The others are compared
with the first, and the rows of ablate, n_action_steps and sampling_temperature (of the noise that actions are denoised
from) with their own checkpoint as it is. With data=, a LeRobot dataset or a folder of them by task, the policies are
walked through demonstrations instead, those that their run held out where it was trained on them: how far off are they?

Other options: seed, output=evaluation_results.json, parallel (robots at a time), workers (processes), device. Writes
the JSON; beside it, under the same name, a page, its figures and the videos.
"""

from collections.abc import Sequence
from typing import NoReturn

from kuavo_train.interruption import main_ends_on_signals


def main(words: Sequence[str]) -> int:
    """Command line: key=value arguments; the exit status."""
    # Not at the top: the processes that simulate import this module anew, and need nothing of it.
    from kuavo_train.command_line import errors_in_one_line, parse
    from kuavo_train.evaluation.checkpoint_evaluation import write_evaluation
    from kuavo_train.evaluation.options import Options
    from kuavo_train.reporting.text_report import evaluation_lines

    def evaluated() -> int:
        options = parse(Options, words, help=__doc__)
        found = write_evaluation(options)
        print(f"{evaluation_lines(found)}\n\n{options.output}, {options.output.with_suffix('.html')}")
        return 0

    return errors_in_one_line(evaluated)


def command() -> NoReturn:
    main_ends_on_signals(main)


if __name__ == "__main__":
    command()
