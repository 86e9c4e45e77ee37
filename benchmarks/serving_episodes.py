"""A robot in its old Python plays the simulated jobs through the network, and so does the policy in process.

    python -m benchmarks.serving_episodes checkpoint=outputs/<run>                    # its last stage; 20 layouts a job
    python -m benchmarks.serving_episodes checkpoint=<checkpoint> n_episodes=1 robot_python=python3.8

The server is `python -m kuavo_train.serve` in a process of its own, the robot kuavo_client in another, under the oldest
Python from 3.8 on that pyenv has or that robot_python names. The world is kuavo_sim's, in this process.

First the robot's loop waits for its answers and the world stands still, as in `evaluate`. Then every answer takes
delay_ms, while the robot goes on by each hand-over. The same layouts are played in process, one robot at a time, as
`evaluate parallel=1` does. Compared are the actions, tick by tick and bit by bit, and the success of both.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kuavo_client import HANDOVERS
from kuavo_train.command_line import errors_in_one_line, option, parse, quieten_libraries
from kuavo_train.errors import one_of, require


@dataclass(frozen=True)
class Options:
    checkpoint: Path = option("a checkpoint, or a run folder, for the best of its last stage")
    n_episodes: int = option("layouts per job", 20)
    tasks: tuple[str, ...] | None = option("by name; none: all that it has learnt", None)
    robot_python: str | None = option("an interpreter; none: the oldest from 3.8 on that pyenv has", None)
    delay_ms: float = option("from a look to its answer, in the second part", 200.0)
    handover: tuple[str, ...] = option(f"in the second part: {', '.join(HANDOVERS)}", HANDOVERS)
    standing: bool = option("play the first part, in which the world waits for answers", True)
    seed: int = option("of the layouts, and of the policy's noise", 0)
    device: str = option("cpu or cuda", "cpu")
    max_steps: int | None = option("time limit of an episode; none: the environment's own", None)
    output: Path = option("the JSON", Path("serving_episodes.json"))

    def __post_init__(self) -> None:
        require(self.n_episodes >= 1, "n_episodes", "be at least 1", self.n_episodes)
        require(self.seed >= 0, "seed", "not be negative", self.seed)
        require(self.delay_ms >= 0, "delay_ms", "not be negative", self.delay_ms)
        require(self.max_steps is None or self.max_steps >= 1, "max_steps", "be at least 1", self.max_steps)
        require(self.output.suffix == ".json", "output", "be a .json file", str(self.output))
        for kind in self.handover:
            one_of("handover", kind, HANDOVERS)


def main(words: Sequence[str]) -> int:
    return errors_in_one_line(lambda: _run(parse(Options, words, help=__doc__)))


def _run(options: Options) -> int:
    quieten_libraries()
    from benchmarks.network_episodes import compare  # not above: each process of a world imports this module anew

    return compare(options)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
