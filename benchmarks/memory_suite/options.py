"""What a study of the suite is given, and the combinations that it makes."""

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from benchmarks.memory_suite.data import VERSION
from benchmarks.memory_suite.layouts import TASKS
from kuavo_train.command_line import option
from kuavo_train.config_folders import quoted
from kuavo_train.errors import one_of, require

HERE = Path(__file__).resolve().parent
MEMORIES = {
    "recurrent": (),
    "frames": ("memory=frames",),
    "both": ("memory=both",),
    "none": ("policy.num_mem_tokens=0",),
}
"""Kind of memory → what is set for it."""
FROZEN = "training.freeze_first_stage=[vision,connector,vlm_text]"

Situation = Literal["nothing", "twin", "frozen"]


def of_memory(key: str) -> bool:
    """Whether a field of the policy is of its memory, and means nothing where there is none."""
    return "mem_" in key


def of_frames(key: str) -> bool:
    """Whether it is of the frames that a memory keeps, and means nothing where it keeps none."""
    return key.startswith("mem_frame")


@dataclass(frozen=True)
class Options:
    task: tuple[str, ...] = option(f"of {', '.join(TASKS)}", ("colour",))
    situation: tuple[Situation, ...] = option("what the memory joins, see benchmarks/memory_suite", ("frozen",))
    memory: tuple[str, ...] = option(f"of {', '.join(MEMORIES)}", ("recurrent",))
    seed: tuple[int, ...] = option("of new weights and of the order of samples", (0,))
    steps: int = option("of training", 1200)
    twin_steps: int = option("of training the policy without memory that it joins", 600)
    episodes: int = option("written per task; eight of them are for validation", 240)
    decisions: int = option("episodes evaluated at trained delays, and again at twice the longest", 96)
    output: Path = option("folder for data, runs and results.jsonl", Path("outputs/memory_suite"))
    policy: dict[str, Any] = option(
        "fields of the policy, in every run; those of its memory where it has one", takes="policy.KEY"
    )
    training: dict[str, Any] = option("of kuavo_train, in every run", takes="training.KEY")
    validation: dict[str, Any] = option("of kuavo_train, in every run", takes="validation.KEY")
    tiny_vlm: dict[str, Any] = option("of kuavo_train, in every run", takes="tiny_vlm.KEY")

    def __post_init__(self) -> None:
        for key, known in (("task", TASKS), ("memory", MEMORIES)):
            for value in getattr(self, key):
                one_of(key, value, known)
        for key in ("steps", "twin_steps", "decisions"):
            require(getattr(self, key) >= 1, key, "be at least 1", getattr(self, key))
        require(self.episodes >= 16, "episodes", "be at least 16", self.episodes)

    @property
    def results(self) -> Path:
        return self.output / "results.jsonl"

    @property
    def data(self) -> Path:
        """Folder of the datasets."""
        return self.output / "data" / f"v{VERSION}_{self.episodes}"

    def combinations(self) -> Iterator["Combination"]:
        for task, situation, memory, seed in itertools.product(self.task, self.situation, self.memory, self.seed):
            yield Combination(self, task, situation, memory, seed)


@dataclass(frozen=True)
class Combination:
    """One run. `twin` is the run that one in another situation than `nothing` joins."""

    options: Options
    task: str
    situation: Situation
    memory: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.task}-{self.situation}-{self.memory}-seed{self.seed}"

    @property
    def twin(self) -> "Combination | None":
        if self.situation == "nothing":
            return None
        options = replace(self.options, steps=self.options.twin_steps)
        return Combination(options, self.task, "nothing", "none", self.seed)

    def words(self) -> list[str]:
        """For kuavo_train, but for where the run lies and what it begins with."""
        options = self.options
        words = [
            f"config_dir={quoted(str(HERE / 'configs'))}",
            f"tasks_dir={quoted(str(HERE / 'tasks' / self.task))}",
            "profile=memory_suite",
            "strategy=decisions",
            f"outputs={quoted(str(options.output / 'runs'))}",
            f"data.root={quoted(str(options.data))}",
            f"seed={self.seed}",
            f"training.max_steps={options.steps}",
            *MEMORIES[self.memory],
            *([FROZEN] if self.situation == "frozen" else []),
        ]
        for section in ("policy", "training", "validation", "tiny_vlm"):
            given = getattr(options, section).items()
            kept = [(key, value) for key, value in given if not (self.memory == "none" and of_memory(key))]
            words += [f"{section}.{key}={json.dumps(value)}" for key, value in kept]
        return words
