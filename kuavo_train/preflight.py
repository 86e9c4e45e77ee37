"""What would fail silently, found before any training time is spent.

LeRobot cuts long instructions, drops missing cameras and passes features without statistics on unnormalized,
all without a word. Here each is a problem with its fix, and all problems are told at once.
"""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from kuavo_train.config import ConfigError, RunConfig
from kuavo_train.data.images import Images
from kuavo_train.data.normalization import Normalization
from kuavo_train.data.tasks import Task

GIB = 2**30


def check_stage(
    config: RunConfig,
    *,
    tasks: Sequence[Task],
    normalization: Normalization,
    image_shapes: Sequence[Mapping[str, tuple[int, ...]]],
    images: Images,
    policy: Any,
    shares: Mapping[str, float],
    steps: int,
) -> str:
    """The stage as a table of text.

    Args:
        tasks: all tasks of the run, opened.
        shares: task → its part of the stage's samples.
        image_shapes: of each task, camera → (3, H, W).
        images: what the stage's images come from.

    Raises:
        ConfigError: one or more problems, each with its fix.
    """
    lengths = token_counts(policy.config, [task.instruction for task in tasks])
    problems = [
        *_instruction_problems(policy.config, tasks, lengths),
        *_agreement_problems(tasks, image_shapes),
        *_width_problems(policy.config, normalization),
        *_disk_problems(config, policy),
        *images.problems,
    ]
    if problems:
        raise ConfigError("preflight found problems\n" + "\n".join(f"  - {problem}" for problem in problems))
    return f"{_table(config, tasks, lengths, shares, steps)}\n{images.description}"


def token_counts(policy_config: Any, instructions: Sequence[str]) -> list[int | None]:
    """Tokens of each instruction as the policy reads it, or None for a policy without language."""
    if not hasattr(policy_config, "tokenizer_max_length"):
        return [None for _ in instructions]
    tokenizer = AutoTokenizer.from_pretrained(policy_config.vlm_model_name)
    return [len(tokenizer(instruction + "\n").input_ids) for instruction in instructions]


def _instruction_problems(policy_config: Any, tasks: Sequence[Task], lengths: Sequence[int | None]) -> list[str]:
    limit = getattr(policy_config, "tokenizer_max_length", None)
    return [
        f"instruction of {task.name} must fit policy.tokenizer_max_length={limit} tokens, got {length}; LeRobot would "
        f"cut it: set policy.tokenizer_max_length={length} or more"
        for task, length in zip(tasks, lengths, strict=True)
        if length is not None and limit is not None and length > limit
    ]


def _agreement_problems(tasks: Sequence[Task], image_shapes: Sequence[Mapping[str, tuple[int, ...]]]) -> list[str]:
    problems = []
    rates = {task.name: task.meta.fps for task in tasks}
    if len(set(rates.values())) > 1:
        problems.append(f"fps must be equal for all tasks, got {rates}; re-record or resample")
    for camera in tasks[0].cameras:
        shapes = {task.name: shape[camera] for task, shape in zip(tasks, image_shapes, strict=True)}
        if len(set(shapes.values())) > 1:
            problems.append(f"{camera} must have one size in all tasks, got {shapes}; set data.image_size=[H,W]")
    instructions = [task.instruction for task in tasks]
    for task in tasks:
        if instructions.count(task.instruction) > 1:
            problems.append(
                f"instruction of {task.name} must differ from all others, or the policy cannot tell the tasks apart"
            )
    return problems


def _width_problems(policy_config: Any, normalization: Normalization) -> list[str]:
    space = normalization.space
    return [
        f"policy.{key} must be at least {len(names)}, the number of dimensions of all tasks together, "
        f"got {getattr(policy_config, key)}"
        for key, names in (("max_state_dim", space.state_names), ("max_action_dim", space.action_names))
        if hasattr(policy_config, key) and getattr(policy_config, key) < len(names)
    ]


def _disk_problems(config: RunConfig, policy: Any) -> list[str]:
    """Three checkpoints (last, best and the one being written) with two optimizer moments each."""
    weights = sum(parameter.numel() * parameter.element_size() for parameter in policy.parameters())
    moments = 2 * sum(p.numel() * p.element_size() for p in policy.parameters() if p.requires_grad)
    needed = 3 * (weights + moments)
    folder = Path(config.outputs)
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if needed <= free:
        return []
    return [
        f"the checkpoints need {needed / GIB:.1f} GiB below {folder}, {free / GIB:.1f} GiB are free; free some or set "
        "outputs to another disk"
    ]


def _table(
    config: RunConfig, tasks: Sequence[Task], lengths: Sequence[int | None], shares: Mapping[str, float], steps: int
) -> str:
    columns = ("task", "train", "held out", "frames", "hours", "fps", "state", "action", "tokens", "share")
    rows = [
        (
            task.name,
            len(task.train_episodes),
            len(task.held_out_episodes),
            f"{len(task.train_rows):,}",
            f"{len(task.train_rows) / task.meta.fps / 3600:.2f}",
            task.meta.fps,
            len(task.state_names),
            len(task.action_names),
            "–" if length is None else length,
            f"{shares.get(task.name, 0):.2f}",
        )
        for task, length in zip(tasks, lengths, strict=True)
    ]
    lines = [f"  {row[0]:<14}" + "".join(f"{value!s:>9}" for value in row[1:]) for row in (columns, *rows)]
    training = config.training
    return "\n".join(
        [
            *lines,
            f"  {steps:,} steps of {training.batch_size * training.gradient_accumulation_steps} samples, "
            f"{training.epochs} epochs of {config.learns[0]}, learning rate {training.lr:g}",
        ]
    )
