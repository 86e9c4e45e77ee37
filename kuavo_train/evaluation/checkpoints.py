"""The checkpoints of an evaluation, and the rows that each gives."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from lerobot.configs import PreTrainedConfig

from kuavo_sim import ENVIRONMENT_IDS
from kuavo_train.config import FROM_DATASET, DataConfig, StageConfig
from kuavo_train.data.checkpoint_tasks import KnownTask, KnownTasks
from kuavo_train.data.task import Task, open_task
from kuavo_train.errors import ConfigError, one_of, require
from kuavo_train.evaluation.ablations import ABLATIONS, Ablatable, Ablated
from kuavo_train.evaluation.delayed import Delayed
from kuavo_train.evaluation.environment import Environment
from kuavo_train.evaluation.options import Options
from kuavo_train.evaluation.robot_policy import Policy
from kuavo_train.reading import Json
from kuavo_train.runs.trained_run import TrainedRun, stage_folder_above
from kuavo_train.wrapper.policy.loading import folder_of
from kuavo_train.wrapper.policy.smolvla import SmolVLAPolicyWrapper, planned_steps


@dataclass(frozen=True)
class Contestant:
    """A checkpoint, before its weights are loaded. `run` is the one it lies in; None when it lies elsewhere."""

    name: str
    folder: Path
    planned: int  # actions from a look on
    known: KnownTasks
    run: TrainedRun | None

    @classmethod
    def open(cls, name: str, path: str) -> "Contestant":
        """Raises `ConfigError` for what is no checkpoint of this project."""
        try:
            folder = folder_of(path)
            known = KnownTasks.load(folder)
        except FileNotFoundError as error:
            raise ConfigError(f"{name}: {error}") from error
        stage = stage_folder_above(folder)
        in_run = stage is not None and (stage.parent / "run.json").is_file()
        run = TrainedRun.open(stage.parent) if stage is not None and in_run else None
        return cls(name, folder, planned_steps(PreTrainedConfig.from_pretrained(folder)), known, run)

    def task(self, name: str) -> KnownTask:
        learnt = {task.name: task for task in self.known.tasks}
        require(name in learnt, "tasks", f"be among those that {self.name} has learnt ({', '.join(learnt)})", name)
        return learnt[name]

    def environment(self, task: str, options: Options) -> Environment:
        """Where it plays a task: what the options says, or its run, or kuavo_sim's task of that name.

        Raises:
            ConfigError: there is none.
        """
        instruction, settings = self.task(task).instruction, options.environment_settings
        if options.environment is not None:
            return Environment(options.environment, instruction, settings, options.max_steps)
        simulated, known = task, {}
        if self.run is not None:
            recipe, simulation = self.run.recipe(task), self.run.settings.simulation
            if recipe.environment is not None:
                settings = {**recipe.environment_settings, **settings}
                return Environment(recipe.environment, instruction, settings, options.max_steps)
            simulated = recipe.simulation_task or task
            known = {key: getattr(simulation, key) for key in ("renderer", "phase_visible") if simulation is not None}
        one_of(f"{task}: without environment=MODULE:ID the task", simulated, ENVIRONMENT_IDS)
        settings = {**known, **settings}
        if "image_size" not in settings:
            settings["image_size"] = self._picture_size()
        return Environment(f"kuavo_sim:{ENVIRONMENT_IDS[simulated]}", instruction, settings, options.max_steps)

    def _picture_size(self) -> int | list[int]:
        """The side of square pictures, or [height, width], as kuavo_sim takes it."""
        sizes = set(self.known.camera_sizes.values())
        rule = f"be given, the size of the pictures that {self.name} was trained with"
        require(len(sizes) == 1, "environment.image_size", rule, self.known.camera_sizes)
        height, width = sizes.pop()
        return height if height == width else [height, width]

    def demonstrations(self, task: str, data: Path) -> Task:
        """The dataset `data`, or the task's own in that folder; as its run read it, where it lies in one.

        Raises:
            ConfigError: there is none, or not a usable one.
        """
        about = self.task(task)
        root = str(data if (data / "meta" / "info.json").is_file() else data / task)
        if self.run is not None:
            recipe, config = self.run.recipe(task), self.run.settings.data
        else:
            recipe = StageConfig(
                task,
                1,
                list(about.instructions),
                epochs=1,
                lr=1.0,
                warmup_steps=0,
                decay_steps=1,
                replay={task: 1.0},
                root=root,
            )
            config = DataConfig(root=str(data), cameras=list(self.known.camera_sizes))
        recipe, config = replace(recipe, root=root, episodes=None), replace(config, held_out_episodes=1)
        opened = open_task(recipe, config)
        recorded = opened.instructions.recorded
        if self.run is None and len(about.instructions) > 1 and recorded.keys() <= set(about.instructions):
            return open_task(replace(recipe, instruction=FROM_DATASET), config)  # which of them each episode is of
        return opened

    def unseen(self, task: Task) -> set[int]:
        """Episodes of a dataset that it was not trained on, as far as its run records."""
        stored = () if self.run is None else self.run.stored.tasks
        for entry in stored:
            if (entry.name, entry.dataset.hash) == (task.name, task.content_hash):
                return set(entry.dataset.held_out_episodes)
        return set(range(len(task.bounds)))

    def policy(self, options: Options) -> SmolVLAPolicyWrapper:
        """Raises `ConfigError` where it has no CUDA graphs and is to run in them."""
        try:
            return SmolVLAPolicyWrapper.from_pretrained(
                self.folder, device=options.device, cuda_graphs=options.cuda_graphs, seed=options.seed
            )
        except ValueError as error:
            raise ConfigError(f"{self.name}: {error}") from error


@dataclass(frozen=True)
class Row:
    """One variant of a checkpoint. `against` names the row that it is compared with."""

    name: str
    checkpoint: str
    against: str | None
    n_action_steps: int
    sampling_temperature: float
    ablation: str | None = None
    handover: str | None = None
    delay_ms: float = 0.0

    @property
    def whole(self) -> bool:
        return self.name == self.checkpoint

    def of(self, policy: SmolVLAPolicyWrapper) -> Ablatable:
        """The checkpoint's policy as this variant."""
        policy.n_action_steps, policy.sampling_temperature = self.n_action_steps, self.sampling_temperature
        return policy if self.ablation is None else Ablated(policy, self.ablation)

    def driving(self, policy: SmolVLAPolicyWrapper) -> Policy:
        """As `of`, in closed loop: with this row's delay."""
        evaluated = self.of(policy)
        if self.handover is None:
            return evaluated
        return Delayed(policy, self.handover, math.ceil(self.delay_ms * policy.known.fps / 1000))

    def record(self) -> Json:
        about = None if self.ablation is None else ABLATIONS[self.ablation][0]
        return {**asdict(self), "whole": self.whole, "about": about}


def rows_of(name: str, policy: SmolVLAPolicyWrapper, options: Options, first: str) -> Iterator[Row]:
    """The checkpoint as it is, at every other horizon and temperature given, and without each thing it has."""
    as_it_is = Row(name, name, None if name == first else first, policy.n_action_steps, policy.sampling_temperature)
    yield as_it_is
    changed = replace(as_it_is, against=name)
    for steps in options.n_action_steps:
        if steps != as_it_is.n_action_steps:
            yield replace(changed, name=f"{name}, {steps} step{'s' if steps > 1 else ''} a look", n_action_steps=steps)
    for temperature in options.sampling_temperature:
        if temperature != as_it_is.sampling_temperature:
            yield replace(changed, name=f"{name}, temperature {temperature:g}", sampling_temperature=temperature)
    for handover in options.handover:
        require(handover != "rtc" or policy.hands_over, "handover", f"be wait or blend for {name}", handover)
        for delay in options.delay_ms:
            row = f"{name}, {handover}, {delay:g} ms"
            yield replace(changed, name=row, handover=handover, delay_ms=delay)
    for ablation in options.ablate:
        if ablation != "memory" or policy.has_memory:
            yield replace(changed, name=f"{name} without {ablation}", ablation=ablation)
