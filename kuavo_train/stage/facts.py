"""What preflight says of a stage, as its table shows it and `--json` gives it to machines."""

from typing import TypedDict

from kuavo_train.training.parameter_groups import GroupCounts


class CameraFacts(TypedDict):
    """Of a camera of a task. `size` is [height, width]; None where its videos do not decode."""

    in_dataset: str
    size: list[int] | None


class KeptFacts(TypedDict):
    """What of a task is kept for replay once it is learnt, of how much; `frames` is None until that is chosen."""

    episodes: int
    of_episodes: int
    frames: int | None
    of_frames: int
    unit: str
    chosen: str


class TaskFacts(TypedDict):
    """Of a task that could be opened.

    `frames`, `hours` and `episode_seconds` (shortest, median, longest) are of its training episodes. `share` is its
    part of the stage's samples, `tokens` are those of its longest instruction; both are None until they are known.
    `state` and `action` are joint group → dimensions. `kept` is None where all is kept for replay.
    """

    name: str
    instruction: str
    instructions: list[str]
    train_episodes: int
    held_out_episodes: int
    validated_episodes: int
    choosing_episodes: int
    frames: int
    hours: float
    episode_seconds: tuple[float, float, float]
    fps: float
    share: float | None
    cameras: dict[str, CameraFacts]
    state: dict[str, int]
    action: dict[str, int]
    unused: list[str]
    tokens: int | None
    kept: KeptFacts | None


class ClipFacts(TypedDict):
    """What gradients flow through: K `queries` of an episode, one every `steps` frames."""

    queries: int
    steps: int


class TrainingFacts(TypedDict):
    """`of` is the task that epochs are counted in."""

    steps: int
    samples_per_step: int
    epochs: int
    of: str
    lr: float


class StepFacts(TypedDict):
    """Bytes that a step on so many `samples` holds between forward and backward: `fixed` + `per_sample` · samples."""

    samples: int
    fixed: int
    per_sample: int


class ValidationFacts(TypedDict):
    """What the validations of a stage cost: `queries` of them all, beside the `samples` that are trained on."""

    times: int
    queries: int
    samples: int
    limit: float | None


class Facts(TypedDict, total=False):
    """As far as they could be found out.

    `widened`: layer → its dimensions before and now. `clip` is there where a memory is trained through time.
    `step` is there once preflight has followed one.
    """

    tasks: list[TaskFacts]
    token_limit: int | None
    parameters: list[GroupCounts]
    widened: dict[str, tuple[int, int]]
    memory_bytes: dict[str, int]
    step: StepFacts
    disk_bytes: dict[str, int]
    images: str
    clip: ClipFacts
    training: TrainingFacts
    validation: ValidationFacts
