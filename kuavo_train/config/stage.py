"""A task, the recipe of the stage that learns it, and the order of stages."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction

from kuavo_train.errors import require
from kuavo_train.reading import Json

FROM_DATASET = "dataset"
"""`stage.instruction` that takes the dataset's own sentences."""


@dataclass(frozen=True)
class StageConfig:
    """One file of configs/tasks/: a task and the recipe of the stage that learns it."""

    name: str  # of the task: folders, reports and replay shares call it so
    index: int  # place in the order of learning, from 1
    instruction: list[str] | str  # one sentence; several, of which each episode gets one; or `dataset`: its own
    epochs: int  # passes over this task's training frames
    lr: float  # learning rate at the end of the warm-up
    warmup_steps: int  # optimizer steps from 0 to lr
    decay_steps: int  # optimizer steps from lr to training.decay_lr, a cosine
    replay: dict[str, float]  # task name → share of the samples, this task included
    root: str  # folder of the LeRobot dataset
    loss_target: float = 0.7  # training loss expected at the stage's end
    final_loss_limit: float = 0.9  # held-out loss the final model should stay under
    episodes: list[int] | None = None  # [first, last] episode to use; all when absent
    cameras: dict[str, str] = field(default_factory=dict)  # name in the dataset → name in the policy
    repo_id: str | None = None  # of the dataset on the hub, fetched to `root` when it is not there
    revision: str | None = None  # of that: a branch, a tag or a commit; None: the tag of the format that LeRobot reads
    state_names: list[str] | None = None  # in place of the dataset's, where they are wrong or missing
    action_names: list[str] | None = None  # as state_names
    scale: dict[str, float] = field(default_factory=dict)  # "action.left_claw" → factor on the dataset's values
    cue_column: str | None = None  # says what memory must provide; None: `cue` where the dataset has it; "": none
    cue_visible_column: str | None = None  # true where the cue shows; None: `cue_visible` where it is there
    decision_column: str | None = None  # true where the cue must be acted on; None: `decision` where it is there
    simulation_task: str | None = None  # kuavo_sim's name of the task, when it can be simulated
    environment: str | None = None  # gymnasium's id of another environment to roll the task out in, "module:id"
    environment_settings: Json = field(default_factory=dict)  # of that environment

    def __post_init__(self) -> None:
        require(
            bool(re.fullmatch(r"[a-z0-9_]+", self.name)),
            "stage.name",
            "consist of lower-case letters, digits and _",
            self.name,
        )
        where = f"stage {self.index} ({self.name}):"
        require(self.index >= 1, f"{where} index", "be at least 1", self.index)
        self._check_instruction(f"{where} instruction")
        named = self.revision is None or self.repo_id is not None
        require(named, f"{where} revision", "come with the repo_id that it is of", self.revision)
        require(self.epochs >= 1, f"{where} epochs", "be at least 1", self.epochs)
        require(self.lr > 0, f"{where} lr", "be positive", self.lr)
        require(self.warmup_steps >= 0, f"{where} warmup_steps", "not be negative", self.warmup_steps)
        require(self.decay_steps >= 1, f"{where} decay_steps", "be at least 1", self.decay_steps)
        require(bool(self.replay), f"{where} replay", "give the task itself a share", self.replay)
        check_shares(self.replay, f"{where} replay share of task")
        require(self.replay.get(self.name, 0) > 0, f"{where} replay", "give the task itself a share", self.replay)
        if self.episodes is not None:
            valid = len(self.episodes) == 2 and 0 <= self.episodes[0] <= self.episodes[1]
            require(valid, f"{where} episodes", "be [first, last] with 0 <= first <= last", self.episodes)
        for name, factor in self.scale.items():
            valid = name.startswith(("state.", "action.")) and factor != 0
            require(valid, f"{where} scale", "give state.NAME or action.NAME a factor that is not 0", {name: factor})

    def _check_instruction(self, key: str) -> None:
        texts = [self.instruction] if isinstance(self.instruction, str) else self.instruction
        require(bool(texts) and all(text.strip() for text in texts), key, "not be empty", self.instruction)
        words = [" ".join(text.split()) for text in texts]
        require(len(set(words)) == len(words), key, "not say one sentence twice", self.instruction)
        alone = len(words) == 1 or FROM_DATASET not in words
        require(alone, key, f"be {FROM_DATASET} alone, or sentences", self.instruction)

    @property
    def folder_name(self) -> str:
        return f"stage{self.index}_{self.name}"


def check_shares(shares: Mapping[str, float], key: str) -> None:
    """Replay shares are fractions in [0, 1] whose sum is 1, compared as the decimals the user typed."""
    for task, share in shares.items():
        require(0 <= share <= 1, f"{key} {task}", "be in [0, 1]", share)
    total = sum((Fraction(str(share)) for share in shares.values()), Fraction())
    require(abs(total - 1) <= Fraction(1, 10**6), f"{key}s {', '.join(shares)}: their sum", "be 1", float(total))


def check_curriculum(tasks: list[StageConfig]) -> None:
    """Replay names only tasks learnt before."""
    names = [task.name for task in tasks]
    for place, task in enumerate(tasks):
        for replayed in (name for name, share in task.replay.items() if share > 0):
            require(
                replayed in names[: place + 1],
                f"stage {task.index} ({task.name}): replay",
                f"name only tasks learnt by then ({', '.join(names[: place + 1])})",
                replayed,
            )
