"""What is wrong with a stage, or worth a note: each check looks at one thing and gives sentences.

LeRobot cuts long instructions, drops missing cameras and passes features without statistics on unnormalized, all
without a word.
"""

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies.pretrained import PreTrainedPolicy

from kuavo_train.config import RunConfig
from kuavo_train.data.images.plan import size_text
from kuavo_train.data.normalization import Normalization
from kuavo_train.data.recordings.checks import listed_counts, little_used
from kuavo_train.data.replay.exported_file import ExportedTask
from kuavo_train.data.task import Task
from kuavo_train.training.parameter_groups import dtype_names, parameter_groups, trainable_parameters


def instruction_problems(limit: int | None, task: Task, lengths: Sequence[int]) -> list[str]:
    longest = max(lengths, default=0)
    if limit is None or longest <= limit:
        return []
    text = task.instructions.texts[lengths.index(longest)]
    which = f' ("{textwrap.shorten(text, 60, placeholder=" …")}")' if len(lengths) > 1 else ""
    return [
        f"instruction of {task.name}{which} must fit policy.tokenizer_max_length={limit} tokens, got {longest}; "
        f"LeRobot would cut it: set policy.tokenizer_max_length={longest} or more"
    ]


def policy_notes(policy: str, tasks: Sequence[Task]) -> list[str]:
    """What a policy without language cannot do that several tasks would ask of it."""
    if len(tasks) < 2:
        return []
    notes = [
        f"policy {policy} reads no instruction: it can tell {len(tasks)} tasks apart by pictures and state alone, and "
        "nobody can tell it which to do"
    ]
    names = dict.fromkeys(name for task in tasks for name in task.action_names)
    lacking = [task.name for task in tasks if set(names) - set(task.action_names)]
    if lacking:
        notes.append(
            f"policy {policy} cannot mask action dimensions: those that {', '.join(lacking)} lack count in its loss, "
            "where the mean is learnt for them; action errors leave them out"
        )
    return notes


def agreement_problems(tasks: Sequence[Task], image_shapes: Mapping[str, Mapping[str, tuple[int, ...]]]) -> list[str]:
    problems = []
    cameras_of: dict[tuple[tuple[str, tuple[int, ...]], ...], list[str]] = {}  # sizes by task → cameras of these
    for camera in tasks[0].cameras if tasks else ():
        sizes = tuple((task, shapes[camera][1:]) for task, shapes in image_shapes.items() if camera in shapes)
        cameras_of.setdefault(sizes, []).append(camera)
    for sizes, cameras in cameras_of.items():
        if len({size for _, size in sizes}) > 1:
            height, width = min(size for _, size in sizes)
            problems.append(
                f"{', '.join(cameras)} must have one size (height, width) in all tasks, got {dict(sizes)}; bring them "
                f"to one, such as data.image_size=[{height},{width}]"
            )
    for task in tasks:
        others = {text for other in tasks if other is not task for text in other.instructions.texts}
        for text in dict.fromkeys(text for text in task.instructions.texts if text in others):
            problems.append(
                f"instruction of {task.name} must differ from all others, or the policy cannot tell the tasks apart, "
                f'got "{text}"'
            )
    return problems


def width_problems(policy_config: PreTrainedConfig, normalization: Normalization) -> list[str]:
    space = normalization.space
    return [
        f"policy.{key} must be at least {len(names)}, the number of dimensions of all tasks together, "
        f"got {getattr(policy_config, key)}"
        for key, names in (("max_state_dim", space.state_names), ("max_action_dim", space.action_names))
        if hasattr(policy_config, key) and getattr(policy_config, key) < len(names)
    ]


def precision_problems(policy: PreTrainedPolicy) -> list[str]:
    """A step of training is smaller than what the weights of a narrower type can tell apart."""
    trained, problems = trainable_parameters(policy), []
    for group, names in parameter_groups(policy).items():
        narrow = [trained[name].dtype for name in names if name in trained and trained[name].dtype != torch.float32]
        if narrow:
            problems.append(
                f"parameter group {group} is trained and must be float32, got {dtype_names(narrow)}, which rounds its "
                f"steps away; set the policy's own dtype, or hold it fixed (training.freeze=[{group}])"
            )
    return problems


def precision_notes(policy: PreTrainedPolicy, stored: Mapping[str, torch.dtype]) -> list[str]:
    parameters, notes = dict(policy.named_parameters()), []
    for group, names in parameter_groups(policy).items():
        before = {name: stored.get(name.replace(".base_layer.", "."), parameters[name].dtype) for name in names}
        narrower = [dtype for name, dtype in before.items() if dtype != parameters[name].dtype]
        if narrower:
            notes.append(
                f"{group} was stored in {dtype_names(narrower)}: taken over as it is, and float32 from here on, in "
                "which training rounds nothing away"
            )
    return notes


def room_problems(config: RunConfig, memory_bytes: Mapping[str, int], disk_bytes: Mapping[str, int]) -> list[str]:
    problems = []
    needed = sum(memory_bytes.values()) - memory_bytes["there"]
    if needed > memory_bytes["there"]:
        problems.append(
            f"weights, gradients and optimizer need {size_text(needed)}, {config.training.device} has "
            f"{size_text(memory_bytes['there'])}; freeze more groups (training.freeze) or take a smaller model"
        )
    if disk_bytes["checkpoints"] > disk_bytes["free"]:
        problems.append(
            f"the checkpoints need {size_text(disk_bytes['checkpoints'])} below {config.outputs}, "
            f"{size_text(disk_bytes['free'])} are free; free some or set outputs to another disk"
        )
    return problems


def step_notes(config: RunConfig, memory_bytes: Mapping[str, int]) -> list[str]:
    """No problem: what a step holds is known of a batch whose instructions are all as long as the longest."""
    needed = sum(size for name, size in memory_bytes.items() if name not in ("there", "merging"))
    if needed <= memory_bytes["there"]:
        return []
    return [
        f"a step needs {size_text(needed)}, {config.training.device} has {size_text(memory_bytes['there'])}: take a "
        f"training.batch_size of less than {config.training.batch_size} (and training.gradient_accumulation_steps), "
        "policy.gradient_checkpointing=true, or freeze more groups (training.freeze)"
    ]


def task_notes(task: Task, claw_limits: Sequence[float] | None) -> list[str]:
    if isinstance(task, ExportedTask):
        return [f"{task.name}: read from {task.file}, exported from {task.root}"]
    notes = [f"{task.name}: {', '.join(task.unused)} not used"] if task.unused else []
    notes += [f"{task.name}: {note}" for note in (*_instruction_notes(task), *task.notes)]
    constant: list[str] = []
    for kind, names, values in (
        ("action", task.action_names, task.action),
        ("state", task.state_names, task.state),
    ):
        resting, still = constant, np.ptp(values[task.train_rows], axis=0) == 0
        constant = [name for name, stays in zip(names, still, strict=True) if stays]
        if constant:
            notes.append(f"{task.name}: {kind} never changes in {', '.join(constant)}")
        little = little_used(kind, names, values[task.train_rows], claw_limits, resting=resting)
        notes += [f"{task.name}: {note}" for note in little]
    return notes


def _instruction_notes(task: Task) -> list[str]:
    """What the dataset says was to be done, where the task has another instruction."""
    instructions = task.instructions
    agrees = len(instructions.recorded) == 1 and set(instructions.recorded) <= set(instructions.texts)
    if instructions.own or agrees or not instructions.recorded:
        return []
    return [
        f"the dataset says {listed_counts(instructions.recorded, 'episode')}, its task's file another instruction, "
        "which is trained; instruction: dataset takes what the dataset says"
    ]


def naming_notes(first: Task, task: Task) -> list[str]:
    """One joint under two names would be learnt as two dimensions, each by a part of the tasks."""
    notes = []
    for kind, names, others in (
        ("state", first.state_names, task.state_names),
        ("action", first.action_names, task.action_names),
    ):
        pairs = zip(names, others, strict=False)
        renamed = {other: name for name, other in pairs if name not in others and other not in names}
        if renamed:
            notes.append(
                f"{task.name}: {kind} has {', '.join(renamed)} where {first.name} has {', '.join(renamed.values())}; "
                f"if they are the same, give them one name with {kind}_names in the task's file"
            )
    return notes
