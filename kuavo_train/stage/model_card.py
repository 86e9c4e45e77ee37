"""The README.md of a stage's result, in the form the hub shows: data, instructions, metrics, licence, how to load."""

import re
from collections.abc import Mapping, Sequence

import yaml

from kuavo_train.config import RunConfig
from kuavo_train.data.mixture import learns_all_at_once
from kuavo_train.data.task import Task
from kuavo_train.runs.records import ValidationRecord

FILE_NAME = "README.md"
LISTED = 20
"""Instructions of a task that are listed one by one."""


def model_card(
    config: RunConfig,
    learnt: Sequence[Task],
    shares: Mapping[str, float],
    records: Sequence[ValidationRecord],
    *,
    steps: int,
) -> str:
    """
    Args:
        learnt: tasks up to and including the stage's.
        shares: task → its part of the stage's samples.
        records: validation at the stage's end; those of other tasks are left out.
        steps: that the stage took.
    """
    policy, training = config.policy, config.training
    by_task = {record.task: record for record in records}
    base = [
        name
        for name in (policy.get("pretrained_path"), policy.get("vlm_model_name"))
        if config.tiny_vlm is None and name and re.fullmatch(r"[\w-]+/[\w.-]+", str(name))
    ]
    on_the_hub = [task.origin.repo_id for task in learnt if task.origin is not None]
    header = {
        "license": config.licence,
        "library_name": "lerobot",
        "pipeline_tag": "robotics",
        "tags": ["lerobot", "robotics", policy["type"], "continual-learning"],
        **({"base_model": base[0]} if base else {}),
        **({"datasets": on_the_hub} if on_the_hub else {}),
    }
    data = [
        f"| {task.name} | {len(task.train_episodes)} | {len(task.held_out_episodes)} | {task.train_frames:,} "
        f"| {task.recording.fps} | {len(task.state_names)} / {len(task.action_names)} |"
        for task in learnt
    ]
    metrics = [_metrics(by_task[task.name]) for task in learnt]
    claws = "as recorded" if config.data.claw_limits is None else "in [{:g}, {:g}]".format(*config.data.claw_limits)
    how = "at once" if learns_all_at_once(config) else "one after another"
    origin = " The demonstrations are a script's, in simulation (kuavo_sim)." if config.simulation else ""
    lora = training.lora
    adapters = f", adapters of rank {lora.rank} on the action expert, merged into its weights" if lora else ""
    average = "" if training.ema is None else f", their moving average of decay {training.ema:g}"
    memory = f", {policy['num_mem_tokens']} memory tokens" if "num_mem_tokens" in policy else ""
    memory += f", {policy['mem_frames']} past frames" if policy.get("mem_frames") else ""
    language = "language-conditioned " if "tokenizer_max_length" in policy else ""
    return "\n".join(
        [
            f"---\n{yaml.safe_dump(header, sort_keys=False).strip()}\n---\n",
            f"# {config.run}, stage {config.stage.index}: {config.stage.name}\n",
            f"A {language}robot policy ({policy['type']}{memory}) that has learnt "
            f"{len(learnt)} task{'s' * (len(learnt) != 1)} {how} with kuavo_train "
            f"(strategy {config.strategy}, seed {config.seed}).\n",
            "## Instructions\n",
            *(line for task in learnt for line in _instructions(task)),
            "\n## Data\n",
            "| task | training episodes | held-out episodes | training frames | Hz | state / action dimensions |",
            "|---|---|---|---|---|---|",
            *data,
            f"\nCameras: {', '.join(config.data.cameras)}. Joint positions in radians, claws {claws}.{origin}\n",
            f"The last stage: {steps:,} steps, batches of {training.batch_size}, learning rate "
            f"{training.lr:g}, shares {', '.join(f'{name} {share:g}' for name, share in shares.items())}"
            f"{adapters}{average}.\n",
            "## Held-out metrics\n",
            "The policy's own loss, and mean absolute error of the actions, normalised, beside that of the best "
            "constant; success in closed loop, where it was rolled out, in episodes that no demonstration shows.\n",
            "| task | loss | action error | constant | success |",
            "|---|---|---|---|---|",
            *metrics,
            "\n## Use\n",
            "```python\nfrom kuavo_train.wrapper.policy.smolvla import SmolVLAPolicyWrapper\n\n"
            'policy = SmolVLAPolicyWrapper.from_pretrained("path/to/this/folder")\n```\n',
            "or with any LeRobot command: `--policy.path=path/to/this/folder`, where kuavo_train is installed.\n",
            f"## Licence\n\n{config.licence}. Demonstrations and pretrained models may have licences of their own.\n",
        ]
    )


def _instructions(task: Task) -> list[str]:
    """One, or all below each other; some where there are many."""
    texts = task.instructions.texts
    if len(texts) == 1:
        return [f"- **{task.name}**: {texts[0]}"]
    more = [f"  - and {len(texts) - LISTED} more, in tasks.json"] if len(texts) > LISTED else []
    return [f"- **{task.name}**, one of:", *(f"  - {text}" for text in texts[:LISTED]), *more]


def _metrics(record: ValidationRecord) -> str:
    """A row of the table."""
    held_out, played = record.held_out, record.closed_loop
    numbers = (held_out.loss, held_out.action_error, held_out.constant_error)
    shown = ["–" if number is None else f"{number:.4f}" for number in numbers]
    success = "–" if played is None else f"{played.successes} of {played.trials}"
    return f"| {' | '.join([record.task, *shown, success])} |"
