"""What would fail silently, found before any training time is spent: problems, notes, and a table of the facts.

LeRobot cuts long instructions, drops missing cameras and passes features without statistics on unnormalized,
all without a word. Here each is a problem with its fix, and all problems are told at once.
"""

import json
import os
import shutil
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.configs import PreTrainedConfig
from transformers import AutoTokenizer

from kuavo_train.config import RunConfig, StageConfig
from kuavo_train.data.images.plan import Images, size_text
from kuavo_train.data.joint_groups import columns_by_group
from kuavo_train.data.mixture import mixture_of
from kuavo_train.data.normalization import Normalization
from kuavo_train.data.policy_traits import PolicyTraits
from kuavo_train.data.recording import recorded_fps
from kuavo_train.data.task import Task
from kuavo_train.data.task_checks import listed_counts, little_used
from kuavo_train.errors import ConfigError, Problems
from kuavo_train.training.lora import adapted_state
from kuavo_train.training.parameter_groups import dtype_names, parameter_counts, parameter_groups, trainable_parameters

ADAM_MOMENTS = 2
AVERAGED_AND_NOT = 2  # a checkpoint's training state holds the trained weights both ways, where they are averaged
CHECKPOINTS_AT_ONCE = 3  # last, best and the one being written


@dataclass
class Findings:
    """What is known of a stage before it starts.

    Attributes:
        facts: what the table shows, as far as it could be found out.
        problems: why the stage must not start, each with its fix.
        notes: what is worth a look but stops nothing.
    """

    facts: dict[str, Any] = field(default_factory=dict)
    problems: Problems = field(default_factory=Problems)
    notes: list[str] = field(default_factory=list)

    def raise_problems(self) -> None:
        """Raises `ConfigError` with all of them."""
        if self.problems:
            raise ConfigError(f"preflight found problems\n{listed(self.problems)}")

    def look_at_datasets(self, curriculum: Sequence[StageConfig]) -> None:
        """What can be said of all of them, those too that do not open."""
        rates = {stage.name: fps for stage in curriculum if (fps := recorded_fps(Path(stage.root))) is not None}
        if len(set(rates.values())) > 1:
            self.problems.append(f"fps must be equal for all tasks, got {rates}; re-record or resample")

    def look_at_tasks(
        self,
        tasks: Sequence[Task],
        image_shapes: Mapping[str, Mapping[str, tuple[int, ...]]],
        claw_limits: Sequence[float] | None,
    ) -> None:
        """
        Args:
            tasks: those that could be opened.
            image_shapes: task → camera → (3, H, W), of the tasks whose videos decode.
            claw_limits: open and closed; None where claws are taken as they are.
        """
        self.facts["tasks"] = [_task_facts(task, image_shapes.get(task.name, {})) for task in tasks]
        self.problems += _agreement_problems(tasks, image_shapes)
        for task in tasks:
            self.notes += _task_notes(task, claw_limits)
            self.notes += _naming_notes(tasks[0], task)

    def look_at_policy_config(
        self, policy_config: PreTrainedConfig, tasks: Sequence[Task], normalization: Normalization
    ) -> None:
        """The policy as it is configured, with or without its weights."""
        limit = PolicyTraits.of(policy_config).token_limit
        self.facts["token_limit"] = limit
        for facts, task in zip(self.facts["tasks"], tasks, strict=True):
            lengths = token_counts(policy_config, task.instructions.texts)
            facts["tokens"] = max(lengths) if lengths else None
            self.problems += _instruction_problems(limit, task, lengths)
        if limit is None:
            self.notes += _policy_notes(policy_config.type, tasks)
        self.problems += _width_problems(policy_config, normalization)

    def look_at_policy(self, config: RunConfig, policy: Any, stored: Mapping[str, torch.dtype]) -> None:
        """Parameters per group and their types, and the memory and disk that they take.

        Args:
            stored: parameter → the type that its weights were stored in; nothing of new ones.
        """
        weights = sum(parameter.numel() * parameter.element_size() for parameter in policy.parameters())
        trained = sum(p.numel() * p.element_size() for p in policy.parameters() if p.requires_grad)
        apart = sum(value.nbytes for layer in adapted_state(policy).values() for value in layer.values())
        outputs = Path(config.outputs).absolute()
        there = next(path for path in (outputs, *outputs.parents) if path.is_dir())
        on_gpu = config.training.device != "cpu" and torch.cuda.is_available()
        self.facts["parameters"] = parameter_counts(policy)
        self.facts["widened"] = getattr(policy, "widened", {})
        self.problems += _precision_problems(policy)
        self.notes += _precision_notes(policy, stored)
        self.facts["memory_bytes"] = {
            "weights": weights,
            "gradients": trained,
            "optimizer": ADAM_MOMENTS * trained,
            **({} if config.training.ema is None else {"average": trained}),
            "there": torch.cuda.get_device_properties(0).total_memory
            if on_gpu
            else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        }
        averaged = 0 if config.training.ema is None else AVERAGED_AND_NOT * trained
        self.facts["disk_bytes"] = {
            "checkpoints": CHECKPOINTS_AT_ONCE * (weights + ADAM_MOMENTS * trained + apart + averaged),
            "free": shutil.disk_usage(there).free,
        }
        self.problems += _room_problems(config, **{key: self.facts[key] for key in ("memory_bytes", "disk_bytes")})

    def look_at_plan(self, config: RunConfig, shares: Mapping[str, float], steps: int, images: Images) -> None:
        """
        Args:
            shares: task → its part of the stage's samples.
        """
        training, mixture = config.training, mixture_of(config)
        for task in self.facts["tasks"]:
            task["share"] = shares.get(task["name"], 0.0)
        if mixture.dealt:
            those = ", ".join(f"{name} {share:g}" for name, share in mixture.dealt.items())
            now = ", ".join(f"{name} {share:g}" for name, share in shares.items())
            self.notes.append(f"replay shares of tasks not learnt before ({those}) go to the others: {now}")
        self.facts["images"] = images.description
        self.problems += images.problems
        self.facts["training"] = {
            "steps": steps,
            "samples_per_step": training.batch_size * training.gradient_accumulation_steps,
            "epochs": training.epochs,
            "of": mixture.leading,
            "lr": training.lr,
        }

    @property
    def table(self) -> str:
        """The facts and notes as lines of text, indented by two."""
        facts = self.facts
        parts = [
            _task_table(facts.get("tasks", []), facts.get("token_limit")),
            *_groups_of_tasks("cameras", facts.get("tasks", []), _cameras_text),
            *_groups_of_tasks("state", facts.get("tasks", []), lambda task: _groups_text(task["state"])),
            *_groups_of_tasks("action", facts.get("tasks", []), lambda task: _groups_text(task["action"])),
            *(_instruction_text(task, _name_width(facts["tasks"])) for task in facts.get("tasks", [])),
        ]
        if "parameters" in facts:
            parts += [_parameter_table(facts["parameters"]), *_widened_text(facts["widened"])]
            parts.append(_room_text(facts["memory_bytes"], facts["disk_bytes"]))
        if "images" in facts:
            parts.append(facts["images"])
        if "training" in facts:
            parts.append(
                "  {steps:,} steps of {samples_per_step} samples, {epochs} epochs of {of}, learning rate {lr:g}".format(
                    **facts["training"]
                )
            )
        return "\n".join([*(part for part in parts if part), *(f"  note: {note}" for note in self.notes)])

    def for_machines(self) -> str:
        """JSON of facts, notes and problems."""
        return json.dumps({**self.facts, "notes": self.notes, "problems": self.problems}, indent=1, ensure_ascii=False)


def token_counts(policy_config: Any, instructions: Sequence[str]) -> list[int]:
    """Tokens of each instruction as the policy reads it; of a policy without language, none."""
    traits = PolicyTraits.of(policy_config)
    if traits.token_limit is None or traits.vlm_name is None:  # π0 brings its tokenizer along, under no name
        return []
    tokenizer = AutoTokenizer.from_pretrained(traits.vlm_name)
    return [len(tokenizer(instruction + "\n").input_ids) for instruction in instructions]


# ------------------------------------------------------------------------------------------------------ what is wrong


def _instruction_problems(limit: int | None, task: Task, lengths: Sequence[int]) -> list[str]:
    longest = max(lengths, default=0)
    if limit is None or longest <= limit:
        return []
    text = task.instructions.texts[lengths.index(longest)]
    which = f' ("{textwrap.shorten(text, 60, placeholder=" …")}")' if len(lengths) > 1 else ""
    return [
        f"instruction of {task.name}{which} must fit policy.tokenizer_max_length={limit} tokens, got {longest}; "
        f"LeRobot would cut it: set policy.tokenizer_max_length={longest} or more"
    ]


def _policy_notes(policy: str, tasks: Sequence[Task]) -> list[str]:
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


def _agreement_problems(tasks: Sequence[Task], image_shapes: Mapping[str, Mapping[str, tuple[int, ...]]]) -> list[str]:
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


def _width_problems(policy_config: Any, normalization: Normalization) -> list[str]:
    space = normalization.space
    return [
        f"policy.{key} must be at least {len(names)}, the number of dimensions of all tasks together, "
        f"got {getattr(policy_config, key)}"
        for key, names in (("max_state_dim", space.state_names), ("max_action_dim", space.action_names))
        if hasattr(policy_config, key) and getattr(policy_config, key) < len(names)
    ]


def _precision_problems(policy: Any) -> list[str]:
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


def _precision_notes(policy: Any, stored: Mapping[str, torch.dtype]) -> list[str]:
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


def _room_problems(config: RunConfig, memory_bytes: Mapping[str, int], disk_bytes: Mapping[str, int]) -> list[str]:
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


def _task_notes(task: Task, claw_limits: Sequence[float] | None) -> list[str]:
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
    """What the dataset says was to be done, where the task is told something else."""
    told = task.instructions
    agrees = len(told.recorded) == 1 and set(told.recorded) <= set(told.texts)
    if told.own or agrees or not told.recorded:
        return []
    return [
        f"the dataset says {listed_counts(told.recorded, 'episode')}, its task's file another instruction, which is "
        "trained; instruction: dataset takes what the dataset says"
    ]


def _naming_notes(first: Task, task: Task) -> list[str]:
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


# ------------------------------------------------------------------------------------------------- what can be printed


def _task_facts(task: Task, image_shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    frames = len(task.train_rows)
    return {
        "name": task.name,
        "instruction": task.instruction,
        "instructions": list(task.instructions.texts),
        "train_episodes": len(task.train_episodes),
        "held_out_episodes": len(task.held_out_episodes),
        "frames": frames,
        "hours": frames / task.recording.fps / 3600,
        "fps": task.recording.fps,
        "share": None,
        "cameras": {
            camera: {"in_dataset": name, "size": list(image_shapes[camera][1:]) if camera in image_shapes else None}
            for camera, name in task.cameras.items()
        },
        "state": {group: len(columns) for group, columns in columns_by_group(task.state_names).items()},
        "action": {group: len(columns) for group, columns in columns_by_group(task.action_names).items()},
        "unused": list(task.unused),
        "tokens": None,
    }


def _task_table(tasks: Sequence[Mapping[str, Any]], token_limit: int | None) -> str:
    columns = ("task", "train", "held out", "frames", "hours", "fps", "tokens", "share")
    rows = [
        (
            task["name"],
            task["train_episodes"],
            task["held_out_episodes"],
            f"{task['frames']:,}",
            f"{task['hours']:.2f}",
            task["fps"],
            "–" if task["tokens"] is None else f"{task['tokens']}/{token_limit}",
            "–" if task["share"] is None else f"{task['share']:.2f}",
        )
        for task in tasks
    ]
    width = _name_width(tasks)
    return "\n".join(
        f"  {row[0]:<{width}}" + "".join(f"{value!s:>10}" for value in row[1:]) for row in (columns, *rows)
    )


def _name_width(tasks: Sequence[Mapping[str, Any]]) -> int:
    """Of the column that tasks are named in."""
    return max([14, *(len(task["name"]) + 1 for task in tasks)])


def _groups_of_tasks(
    title: str, tasks: Sequence[Mapping[str, Any]], text: Callable[[Mapping[str, Any]], str]
) -> list[str]:
    """A line for all tasks of which `text` says the same."""
    groups: dict[str, list[str]] = {}
    for task in tasks:
        groups.setdefault(text(task), []).append(task["name"])
    return [
        f"  {title:<8} {said}" + (f"   ({', '.join(names)})" if len(groups) > 1 else "")
        for said, names in groups.items()
    ]


def _cameras_text(task: Mapping[str, Any]) -> str:
    texts = []
    for camera, about in task["cameras"].items():
        name = camera.rsplit(".", 1)[-1]
        renamed = "" if about["in_dataset"] == camera else f" (there {about['in_dataset']})"
        size = "size unknown" if about["size"] is None else "{}×{}".format(*about["size"])
        texts.append(f"{name}{renamed} {size}")
    return ", ".join(texts)


def _groups_text(groups: Mapping[str, int]) -> str:
    return f"{sum(groups.values())} = " + " + ".join(f"{count} {group}" for group, count in groups.items())


def _instruction_text(task: Mapping[str, Any], width: int) -> str:
    first, others = f"  {task['name']:<{width}} ", " " * (width + 3)
    more = len(task["instructions"]) - 1
    text = task["instruction"] + (f" (and {more} more)" if more else "")
    return textwrap.fill(text, 118, initial_indent=first, subsequent_indent=others)


def _parameter_table(groups: Sequence[Mapping[str, Any]]) -> str:
    total = sum(group["parameters"] for group in groups)
    trained = sum(group["parameters"] for group in groups if group["trainable"])
    width = max(12, *(len(group["group"]) for group in groups))
    lines = [
        f"  {group['group']:<{width}} {group['parameters']:>13,}  {'trained' if group['trainable'] else 'frozen':<8}"
        f"{group['dtype']}".rstrip()
        for group in groups
    ]
    return "\n".join([*lines, f"  {'total':<{width}} {total:>13,}  {trained:,} in trained groups"])


def _widened_text(widened: Mapping[str, tuple[int, int]]) -> list[str]:
    """A line about projections that are wider than the weights they were given."""
    if not widened:
        return []
    each = ", ".join(f"{name} {before} → {now}" for name, (before, now) in sorted(widened.items()))
    return [f"  widened: {each} dimensions; the old ones as they were stored, the new ones begin at 0"]


def _room_text(memory: Mapping[str, int], disk: Mapping[str, int]) -> str:
    needed, free = size_text(disk["checkpoints"]), size_text(disk["free"])
    parts = ", ".join(f"{name} {size_text(memory[name])}" for name in memory if name != "there")
    return (
        f"  memory: {parts}, and activations, of {size_text(memory['there'])}\n"
        f"  disk: {needed} for {CHECKPOINTS_AT_ONCE} checkpoints, {free} free"
    )


def listed(problems: Sequence[str]) -> str:
    """One below the other, each with a dash."""
    return "\n".join("  - " + problem.replace("\n", "\n    ") for problem in problems)
