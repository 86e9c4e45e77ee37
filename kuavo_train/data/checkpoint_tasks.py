"""What a checkpoint knows of its tasks: tasks.json in pretrained_model/, all that a robot needs beside the weights."""

import difflib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

from lerobot.utils.constants import OBS_STATE

from kuavo_train.data.feature_space import FeatureSpace
from kuavo_train.data.normalization import Normalization
from kuavo_train.data.task import Task
from kuavo_train.reading import read_json

FILE_NAME = "tasks.json"
REMEMBERED = 256
"""Instructions whose likeness is kept: more than tasks have, and not all that a server is ever asked for."""


def trained_space(folder: Path) -> FeatureSpace | None:
    """The dimensions that the checkpoint in `folder` says it was trained with; None where it says none."""
    if not (folder / FILE_NAME).is_file():
        return None
    known = KnownTasks.load(folder)
    return FeatureSpace(known.state_names, known.action_names)


@dataclass(frozen=True)
class KnownTask:
    """A task the policy has learnt; names are in the order of the task's own dataset.

    Attributes:
        instructions: all that it was trained with; the first stands for the task.
        action_limits: action name → (least, greatest, greatest change from one frame to the next) in its training
            episodes, in robot units; empty in a checkpoint that is older than them.
    """

    name: str
    instructions: tuple[str, ...]
    state_names: tuple[str, ...]
    action_names: tuple[str, ...]
    action_limits: dict[str, tuple[float, float, float]] = field(default_factory=dict)

    @classmethod
    def of(cls, task: Task) -> "KnownTask":
        return cls(task.name, task.instructions.texts, task.state_names, task.action_names, _action_limits(task))

    @property
    def instruction(self) -> str:
        return self.instructions[0]


@dataclass(frozen=True)
class Likeness:
    """How like an instruction is to one that `task` was trained with, in [0, 1]; 1 is word for word."""

    task: KnownTask
    instruction: str
    ratio: float


@dataclass(frozen=True)
class KnownTasks:
    """
    Attributes:
        tasks: those learnt so far, in the order of learning.
        fps: queries are `n_action_steps` frames at this rate apart.
        state_names, action_names: the policy's dimensions, the union over all tasks of its run.
        absent_state: [S] what the policy sees in a state dimension that a task lacks, in robot units.
        camera_sizes: camera → [height, width] of the datasets' pictures, before data.image_size.
    """

    tasks: tuple[KnownTask, ...]
    fps: float
    state_names: tuple[str, ...]
    action_names: tuple[str, ...]
    absent_state: tuple[float, ...]
    camera_sizes: dict[str, tuple[int, int]]

    @classmethod
    def of(cls, tasks: Sequence[Task], normalization: Normalization) -> "KnownTasks":
        space = normalization.space
        return cls(
            tasks=tuple(KnownTask.of(task) for task in tasks),
            fps=tasks[0].recording.fps,
            state_names=space.state_names,
            action_names=space.action_names,
            absent_state=tuple(normalization.array(OBS_STATE, "mean").tolist()),
            camera_sizes={camera: tasks[0].camera_size(camera) for camera in tasks[0].cameras},
        )

    def closest(self, instruction: str) -> "Likeness":
        """The task one of whose instructions is most like this one, by their words in order."""
        if instruction not in self._compared:
            if len(self._compared) >= REMEMBERED:
                self._compared.clear()
            self._compared[instruction] = self._compare(instruction)
        return self._compared[instruction]

    @cached_property
    def _compared(self) -> dict[str, "Likeness"]:
        """Of the instructions met so far: a robot asks at every step, and there may be hundreds to compare with."""
        return {}

    def _compare(self, instruction: str) -> "Likeness":
        words = instruction.lower().split()
        sentences = [(task, text) for task in self.tasks for text in task.instructions]
        exact = next((task for task, text in sentences if text == instruction), None)
        if exact is not None:
            return Likeness(exact, instruction, 1.0)
        compared = (
            Likeness(task, text, difflib.SequenceMatcher(None, words, text.lower().split()).ratio())
            for task, text in sentences
        )
        return max(compared, key=lambda each: each.ratio)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False)

    @classmethod
    def load(cls, folder: Path) -> "KnownTasks":
        """Raises `FileNotFoundError`: the checkpoint is of another trainer, or older than the file."""
        path = folder / FILE_NAME
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} must be there: a policy alone does not know its tasks. Take it from another checkpoint of the "
                f"same stage; without one, LeRobot's own commands open the policy (--policy.path={folder})"
            )
        stored = read_json(path, keys=("tasks", "fps", "state_names", "action_names", "absent_state", "camera_sizes"))
        names = {key: tuple(stored[key]) for key in ("state_names", "action_names", "absent_state")}
        tasks = tuple(
            KnownTask(
                each["name"],
                tuple(each["instructions"] if "instructions" in each else [each["instruction"]]),  # older: only one
                tuple(each["state_names"]),
                tuple(each["action_names"]),
                {name: tuple(limits) for name, limits in each.get("action_limits", {}).items()},
            )
            for each in stored["tasks"]
        )
        sizes = {camera: (size[0], size[1]) for camera, size in stored["camera_sizes"].items()}
        return cls(tasks=tasks, fps=stored["fps"], camera_sizes=sizes, **names)


def _action_limits(task: Task) -> dict[str, tuple[float, float, float]]:
    columns = task.action_limits.tolist()
    return {name: (column[0], column[1], column[2]) for name, column in zip(task.action_names, columns, strict=True)}
