"""What preflight finds, before any training time is spent: facts, problems and notes, all problems reported at once."""

import json
import os
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies.pretrained import PreTrainedPolicy
from transformers import AutoTokenizer

from kuavo_train.config import RunConfig, StageConfig
from kuavo_train.data.clip_sampler import ClipOrder
from kuavo_train.data.images.plan import Images
from kuavo_train.data.mixture import mixture_of
from kuavo_train.data.normalization import Normalization
from kuavo_train.data.policy_traits import PolicyTraits
from kuavo_train.data.recordings.joint_groups import columns_by_group
from kuavo_train.data.recordings.recording import recorded_fps
from kuavo_train.data.replay.exported_file import ExportedTask
from kuavo_train.data.sampler import Order
from kuavo_train.data.task import Task
from kuavo_train.data.validated import queries, validations
from kuavo_train.errors import ConfigError, Problems
from kuavo_train.stage.checks import (
    agreement_problems,
    instruction_problems,
    naming_notes,
    policy_notes,
    precision_notes,
    precision_problems,
    room_problems,
    step_notes,
    task_notes,
    width_problems,
)
from kuavo_train.stage.facts import Facts, KeptFacts, TaskFacts
from kuavo_train.stage.lineage import samples_of_batch
from kuavo_train.training.epochs import Timetable
from kuavo_train.training.lora import adapted_state
from kuavo_train.training.optimizer import state_bytes
from kuavo_train.training.parameter_groups import parameter_counts
from kuavo_train.training.step_memory import StepMemory

AVERAGED_AND_NOT = 2  # a checkpoint's training state holds the trained weights both ways, where they are averaged
MERGED_FROM = 2  # sets of trained weights that lie beside the policy's own while they are merged
CHECKPOINTS_AT_ONCE = 3  # last, best and the one being written


class NotReady(ConfigError):
    """A stage that must not start: its text is all the problems that were found."""


@dataclass
class Findings:
    """What is known of a stage before it starts.

    Attributes:
        facts: what the table shows, as far as it could be found out.
        problems: why the stage must not start, each with its fix.
        notes: what is worth a look but stops nothing.
    """

    facts: Facts = field(default_factory=Facts)
    problems: Problems = field(default_factory=Problems)
    notes: list[str] = field(default_factory=list)

    def attempt[**P, T](self, function: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T | None:
        """The function's result; None when it raised `ConfigError`, which then is a problem."""
        return self.problems.attempt(function, *arguments, **named)

    def raise_problems(self) -> None:
        """Raises `NotReady` with all of them."""
        if self.problems:
            raise NotReady(f"preflight found problems\n{listed(self.problems)}")

    def need[T](self, found: T | None) -> T:
        """`found`, without which nothing more can be looked at. Raises `NotReady` with all problems when it is None."""
        if found is not None:
            return found
        self.raise_problems()
        raise AssertionError("what is not there must have left a problem")

    def look_at_datasets(self, curriculum: Sequence[StageConfig], exported: Mapping[str, ExportedTask]) -> None:
        """What can be said of all of them, those too that do not open."""
        of_files = {name: task.recording.fps for name, task in exported.items()}
        found = {stage.name: of_files.get(stage.name) or recorded_fps(Path(stage.root)) for stage in curriculum}
        rates = {name: fps for name, fps in found.items() if fps is not None}
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
        self.problems += agreement_problems(tasks, image_shapes)
        for task in tasks:
            self.notes += task_notes(task, claw_limits)
            self.notes += naming_notes(tasks[0], task)

    def look_at_policy_config(
        self, policy_config: PreTrainedConfig, tasks: Sequence[Task], normalization: Normalization
    ) -> None:
        """The policy as it is configured, with or without its weights."""
        limit = PolicyTraits.of(policy_config).token_limit
        self.facts["token_limit"] = limit
        counts = iter(token_counts(policy_config, [text for task in tasks for text in task.instructions.texts]))
        for facts, task in zip(self.facts["tasks"], tasks, strict=True):
            lengths = list(islice(counts, len(task.instructions.texts)))
            facts["tokens"] = max(lengths) if lengths else None
            self.problems += instruction_problems(limit, task, lengths)
        if limit is None:
            self.notes += policy_notes(policy_config.type, tasks)
        self.problems += width_problems(policy_config, normalization)

    def look_at_policy(self, config: RunConfig, policy: PreTrainedPolicy, stored: Mapping[str, torch.dtype]) -> None:
        """Parameters per group and their types, and the memory and disk that they take.

        Args:
            stored: parameter → the type that its weights were stored in; nothing of new ones.
        """
        weights = sum(parameter.numel() * parameter.element_size() for parameter in policy.parameters())
        trained = sum(p.numel() * p.element_size() for p in policy.parameters() if p.requires_grad)
        optimizer = state_bytes(policy.parameters(), config.training)
        apart = sum(value.nbytes for layer in adapted_state(policy).values() for value in layer.values())
        outputs = Path(config.outputs).absolute()
        there = next(path for path in (outputs, *outputs.parents) if path.is_dir())
        on_gpu = config.training.device != "cpu" and torch.cuda.is_available()
        self.facts["parameters"] = parameter_counts(policy)
        self.facts["widened"] = getattr(policy, "widened", {})
        self.problems += precision_problems(policy)
        self.notes += precision_notes(policy, stored)
        self.facts["memory_bytes"] = {
            "weights": weights,
            "gradients": trained,
            "optimizer": optimizer,
            **({} if config.training.ema is None else {"average": trained}),
            **({} if config.merge is None else {"merging": MERGED_FROM * (trained + apart)}),
            "there": torch.cuda.get_device_properties(0).total_memory
            if on_gpu
            else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        }
        averaged = 0 if config.training.ema is None else AVERAGED_AND_NOT * trained
        self.facts["disk_bytes"] = {
            "checkpoints": CHECKPOINTS_AT_ONCE * (weights + optimizer + apart + averaged),
            "free": shutil.disk_usage(there).free,
        }
        self.problems += room_problems(config, self.facts["memory_bytes"], self.facts["disk_bytes"])

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
        names = [task["name"] for task in self.facts["tasks"]]
        earlier = names[: names.index(config.stage.name)] if config.stage.name in names else []
        unreplayed = [name for name in earlier if not shares.get(name)]
        if config.mixture == "replay" and unreplayed:
            self.notes.append(
                f"not replayed, since the task's file gives them no share: {', '.join(unreplayed)}; replay.share=0.4 "
                "replays all earlier tasks, in any order of them"
            )
        self.facts["images"] = images.description
        self.problems += images.problems
        self.facts["training"] = {
            "steps": steps,
            "samples_per_step": samples_of_batch(config) * training.gradient_accumulation_steps,
            "epochs": training.epochs,
            "of": mixture.leading,
            "lr": training.lr,
        }

    def look_at_step(self, config: RunConfig, step: StepMemory | None) -> None:
        """What the steps hold beside weights and optimizer; None where that is not known."""
        if step is None:
            return
        self.facts["step"] = asdict(step)  # type: ignore[typeddict-item]
        there = self.facts["memory_bytes"].pop("there")
        self.facts["memory_bytes"] |= {"activations": step.held, "there": there}
        self.notes += step_notes(config, self.facts["memory_bytes"])

    def look_at_clips(self, order: Order) -> None:
        """How far back gradients reach, where a memory is trained through time."""
        if isinstance(order, ClipOrder):
            self.facts["clip"] = {"queries": order.clip, "steps": order.stride}

    def look_at_validation(
        self,
        config: RunConfig,
        tasks: Sequence[Task],
        seen: Collection[str],
        timetable: Timetable,
        *,
        stride: int,
        first: bool,
    ) -> None:
        """Which held-out episodes are validated, and what that costs in this stage; the run's first has one more."""
        validation = config.validation
        costs = {task.name: queries(task, task.validated, stride) for task in tasks}
        of_all, of_seen = sum(costs.values()), sum(costs[name] for name in seen)
        times = validations(timetable.epoch(timetable.steps), validation.every_epochs)
        at_end = of_all if validation.unseen_tasks else of_seen
        self.facts["validation"] = {
            "times": times + first,
            "queries": first * of_all + (times - 1) * of_seen + at_end,
            "samples": timetable.steps * samples_of_batch(config) * config.training.gradient_accumulation_steps,
            "limit": validation.share,
        }
        for facts, task in zip(self.facts["tasks"], tasks, strict=True):
            facts["validated_episodes"] = len(task.validated)

    def look_at_kept(self, kept: Mapping[str, KeptFacts]) -> None:
        """What of each task is kept for replay; nothing where all is."""
        for task in self.facts["tasks"]:
            task["kept"] = kept.get(task["name"])

    def for_machines(self) -> str:
        """JSON of facts, notes and problems."""
        return json.dumps({**self.facts, "notes": self.notes, "problems": self.problems}, indent=1, ensure_ascii=False)


def token_counts(policy_config: PreTrainedConfig, instructions: Sequence[str]) -> list[int]:
    """Tokens of each instruction as the policy reads it; of a policy without language, none."""
    traits = PolicyTraits.of(policy_config)
    if traits.token_limit is None or traits.vlm_name is None:  # π0 brings its tokenizer along, under no name
        return []
    tokenizer = AutoTokenizer.from_pretrained(traits.vlm_name)
    return [len(tokenizer(instruction + "\n").input_ids) for instruction in instructions]


def _task_facts(task: Task, image_shapes: Mapping[str, tuple[int, ...]]) -> TaskFacts:
    frames, fps = task.train_frames, task.recording.fps
    seconds = task.recording.lengths[list(task.train_episodes)] / fps
    return {
        "name": task.name,
        "instruction": task.instruction,
        "instructions": list(task.instructions.texts),
        "train_episodes": len(task.train_episodes),
        "held_out_episodes": len(task.held_out_episodes),
        "validated_episodes": len(task.validated),
        "choosing_episodes": len(task.choosing_episodes),
        "frames": frames,
        "hours": frames / fps / 3600,
        "episode_seconds": (float(seconds.min()), float(np.median(seconds)), float(seconds.max())),
        "fps": fps,
        "share": None,
        "cameras": {
            camera: {"in_dataset": name, "size": list(image_shapes[camera][1:]) if camera in image_shapes else None}
            for camera, name in task.cameras.items()
        },
        "state": {group: len(columns) for group, columns in columns_by_group(task.state_names).items()},
        "action": {group: len(columns) for group, columns in columns_by_group(task.action_names).items()},
        "unused": list(task.unused),
        "tokens": None,
        "kept": None,
    }


def listed(problems: Sequence[str]) -> str:
    """One below the other, each with a dash."""
    return "\n".join("  - " + problem.replace("\n", "\n    ") for problem in problems)
