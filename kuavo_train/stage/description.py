"""The facts and notes of preflight as a person reads them: the table that a stage begins with."""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from kuavo_train.data.images.plan import size_text
from kuavo_train.stage.facts import ClipFacts, StepFacts, TaskFacts, ValidationFacts
from kuavo_train.stage.findings import CHECKPOINTS_AT_ONCE, Findings
from kuavo_train.training.parameter_groups import GroupCounts


def describe(findings: Findings) -> str:
    """Lines of text, indented by two."""
    facts = findings.facts
    parts = [
        _task_table(facts.get("tasks", []), facts.get("token_limit")),
        *_groups_of_tasks("cameras", facts.get("tasks", []), _cameras_text),
        *_groups_of_tasks("state", facts.get("tasks", []), lambda task: _groups_text(task["state"])),
        *_groups_of_tasks("action", facts.get("tasks", []), lambda task: _groups_text(task["action"])),
        *(_instruction_text(task, _name_width(facts["tasks"])) for task in facts.get("tasks", [])),
    ]
    if "parameters" in facts:
        parts += [_parameter_table(facts["parameters"]), *_widened_text(facts["widened"])]
        parts.append(_memory_text(facts["memory_bytes"], facts.get("step")))
        parts.append(_disk_text(facts["disk_bytes"]))
    if "images" in facts:
        parts.append(facts["images"])
    if any(task["validated_episodes"] < task["held_out_episodes"] for task in facts.get("tasks", [])):
        parts += _groups_of_tasks("validate", facts["tasks"], _validated_text)
    if any(task["choosing_episodes"] for task in facts.get("tasks", [])):
        parts += _groups_of_tasks("merge", facts["tasks"], _choosing_text)
    if any(task["kept"] for task in facts.get("tasks", [])):
        parts += _groups_of_tasks("replay", facts["tasks"], _kept_text)
    if "clip" in facts:
        parts += _groups_of_tasks("clip", facts["tasks"], partial(_clip_text, facts["clip"]))
    if "training" in facts:
        parts.append(
            "  {steps:,} steps of {samples_per_step} samples, {epochs} epochs of {of}, learning rate {lr:g}".format(
                **facts["training"]
            )
        )
    if "validation" in facts:
        parts.append(_validation_text(facts["validation"]))
    return "\n".join([*(part for part in parts if part), *(f"  note: {note}" for note in findings.notes)])


def _task_table(tasks: Sequence[TaskFacts], token_limit: int | None) -> str:
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


def _name_width(tasks: Sequence[TaskFacts]) -> int:
    """Of the column that tasks are named in."""
    return max([14, *(len(task["name"]) + 1 for task in tasks)])


def _groups_of_tasks(title: str, tasks: Sequence[TaskFacts], text: Callable[[TaskFacts], str]) -> list[str]:
    """A line for all tasks of which `text` says the same."""
    groups: dict[str, list[str]] = {}
    for task in tasks:
        groups.setdefault(text(task), []).append(task["name"])
    return [
        f"  {title:<8} {said}" + (f"   ({', '.join(names)})" if len(groups) > 1 else "")
        for said, names in groups.items()
    ]


def _cameras_text(task: TaskFacts) -> str:
    texts = []
    for camera, about in task["cameras"].items():
        name = camera.rsplit(".", 1)[-1]
        renamed = "" if about["in_dataset"] == camera else f" (there {about['in_dataset']})"
        size = "size unknown" if about["size"] is None else "{}×{}".format(*about["size"])
        texts.append(f"{name}{renamed} {size}")
    return ", ".join(texts)


def _groups_text(groups: Mapping[str, int]) -> str:
    return f"{sum(groups.values())} = " + " + ".join(f"{count} {group}" for group, count in groups.items())


def _instruction_text(task: TaskFacts, width: int) -> str:
    first, others = f"  {task['name']:<{width}} ", " " * (width + 3)
    more = len(task["instructions"]) - 1
    text = task["instruction"] + (f" (and {more} more)" if more else "")
    return textwrap.fill(text, 118, initial_indent=first, subsequent_indent=others)


def _parameter_table(groups: Sequence[GroupCounts]) -> str:
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


def _validated_text(task: TaskFacts) -> str:
    """Which part of the held-out episodes the losses are of."""
    if task["validated_episodes"] == task["held_out_episodes"]:
        return "all held-out episodes"
    part, all_of_them = task["validated_episodes"], task["held_out_episodes"]
    return f"{part:,} of {all_of_them:,} held-out episodes, the same ones throughout the run (validation.share)"


def _validation_text(validation: ValidationFacts) -> str:
    """What the stage's validations cost, in numbers that depend on no clock."""
    share, limit = validation["queries"] / validation["samples"], validation["limit"]
    above = limit is not None and share > limit
    beyond = f", more than validation.share={limit:g}: it takes two episodes a task at least" if above else ""
    return (
        f"  {validation['times']} validations, {validation['queries']:,} queries beside {validation['samples']:,} "
        f"training samples ({share:.1%}){beyond}"
    )


def _choosing_text(task: TaskFacts) -> str:
    """What of the task is neither trained on nor reported."""
    apart = task["choosing_episodes"]
    return f"{apart:,} of {task['train_episodes'] + apart:,} training episodes are set apart to choose alphas on"


def _kept_text(task: TaskFacts) -> str:
    """What of the task later stages may replay."""
    kept = task["kept"]
    if kept is None:
        return "all is kept"
    if kept["unit"] == "frame":
        of = f"of {kept['episodes']:,} training episodes"
        return f"{kept['frames']:,} of {kept['of_frames']:,} frames are kept ({kept['chosen']}), {of}"
    episodes = f"{kept['episodes']:,} of {kept['of_episodes']:,} training episodes are kept"
    if kept["frames"] is None:
        return f"{episodes}, chosen by {kept['chosen']} when the task has been learnt"
    return f"{episodes}, {kept['frames']:,} of {kept['of_frames']:,} frames ({kept['chosen']})"


def _clip_text(clip: ClipFacts, task: TaskFacts) -> str:
    """How long a clip lasts beside the task's episodes, and what follows for cues that lie further back."""
    queries, steps, fps = clip["queries"], clip["steps"], task["fps"]
    seconds = queries * steps / fps
    shortest, median, longest = task["episode_seconds"]
    further = "; cues further back are carried without gradient" if seconds < median else ""
    return (
        f"K = {queries} queries × {steps} steps / {fps:g} Hz = {seconds:.1f} s; episodes last {shortest:.1f} – "
        f"{longest:.1f} s (median {median:.1f}){further}"
    )


def _memory_text(memory: Mapping[str, int], step: StepFacts | None) -> str:
    parts = ", ".join(f"{name} {size_text(memory[name])}" for name in memory if name != "there")
    there = size_text(memory["there"])
    if step is None:
        return f"  memory: {parts}, and activations, of {there}"
    return (
        f"  memory: {parts}, together {size_text(sum(memory.values()) - memory['there'])} of {there}\n"
        f"  activations: {step['samples']} samples × {size_text(step['per_sample'])} + {size_text(step['fixed'])}"
    )


def _disk_text(disk: Mapping[str, int]) -> str:
    needed, free = size_text(disk["checkpoints"]), size_text(disk["free"])
    return f"  disk: {needed} for {CHECKPOINTS_AT_ONCE} checkpoints, {free} free"
