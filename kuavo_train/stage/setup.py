"""What a stage needs, opened: data, policy, order of samples, where images come from, simulators."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from kuavo_sim.record import RecordSettings, ensure_recorded
from kuavo_train.config import RunConfig, StageConfig
from kuavo_train.data.checkpoint_tasks import KnownTasks
from kuavo_train.data.clip_sampler import ClipOrder
from kuavo_train.data.dataset import MixedDataset, frames_of_sample
from kuavo_train.data.feature_space import FeatureSpace
from kuavo_train.data.images.augmentation import Augmentation, ClipAugmentation, no_augmentation
from kuavo_train.data.images.frames import DecodedFrames
from kuavo_train.data.images.plan import Images, plan_images
from kuavo_train.data.mixture import mixture_of
from kuavo_train.data.normalization import Normalization, fit_normalization, normalization_from_checkpoint
from kuavo_train.data.policy_traits import PolicyTraits
from kuavo_train.data.sampler import Order, SampleOrder
from kuavo_train.data.task import Task, examine_task
from kuavo_train.data.workers import room_problems
from kuavo_train.errors import ConfigError
from kuavo_train.evaluation.environment import Environment, environment_of
from kuavo_train.evaluation.environment_check import check_environment
from kuavo_train.runs.run_folder import StageFolder, stage_folder
from kuavo_train.stage.lineage import seen_tasks, stages_before
from kuavo_train.stage.preflight import Findings
from kuavo_train.strategies.chosen import chosen_strategy
from kuavo_train.strategies.strategy import Strategy
from kuavo_train.training.carried_memory import CarriedMemory, Exchange, NoRecurrence, Recurrence
from kuavo_train.training.checkpoint import Checkpoint
from kuavo_train.training.epochs import Timetable
from kuavo_train.training.frozen_encoder import frozen_encoder
from kuavo_train.training.policy_factory import BuiltPolicy, build_policy, configure_policy, policy_config_class
from kuavo_train.training.tracking import check_tracking
from kuavo_train.training.trainer import step_seed


@dataclass(frozen=True)
class OpenedStage:
    """All that a stage needs, open and looked at; nothing is written or trained yet.

    Attributes:
        tasks: of the whole curriculum, in the order of learning.
        environments: task seen → where it is rolled out.
        table: what preflight has to say.
    """

    config: RunConfig
    curriculum: Sequence[StageConfig]
    folder: StageFolder
    accelerator: Accelerator
    tasks: list[Task]
    images: Images
    normalization: Normalization
    built: BuiltPolicy
    order: Order
    timetable: Timetable
    environments: dict[str, Environment]
    augment: Augmentation
    strategy: Strategy
    table: str

    @property
    def seen(self) -> list[str]:
        return seen_tasks(self.config, self.curriculum)

    @property
    def earlier(self) -> list[StageFolder]:
        """Folders of the stages before this one, in their order."""
        return [stage_folder(self.config, stage) for stage in stages_before(self.config, self.curriculum)]

    @property
    def learnt(self) -> list[Task]:
        """The tasks learnt by the end of this stage, `seen` by name."""
        return [task for task in self.tasks if task.name in self.seen]

    @property
    def known_tasks(self) -> KnownTasks:
        """What a robot must know of them."""
        return KnownTasks.of(self.learnt, self.normalization)

    @property
    def processors(self) -> tuple[Any, Any]:
        return self.built.preprocessor, self.built.postprocessor

    def dataset(self, tasks: Sequence[Task]) -> MixedDataset:
        return MixedDataset(
            tasks,
            [self.images.sources[task.name] for task in tasks],
            self.normalization,
            **frames_of_sample(self.built.policy.config),
            image_key=self.images.image_key,
        )


def record_missing_data(config: RunConfig, curriculum: Sequence[StageConfig]) -> None:
    """Record the demonstrations of simulated tasks that are not there yet, saying so.

    Raises:
        ConfigError: the dataset there was recorded under other settings, or is not a recording.
    """
    if config.simulation is None:
        return
    for stage in curriculum:
        if stage.simulation_task is None:
            continue
        settings = RecordSettings(task=stage.simulation_task, **asdict(config.simulation))
        root = Path(stage.root)
        if not root.exists():
            print(f"recording {settings.episodes} demonstrations of {stage.name} into {root}", flush=True)
        try:
            ensure_recorded(settings, root, workers=config.data.record_workers)
        except FileExistsError as error:
            raise ConfigError(
                f"{error}; to train on a dataset of your own there, set simulation=null rollout.episodes=0"
            ) from error
        except ValueError as error:
            raise ConfigError(str(error)) from error


def open_stage(
    config: RunConfig,
    curriculum: Sequence[StageConfig],
    start: Checkpoint | None,
    accelerator: Accelerator,
    findings: Findings,
) -> OpenedStage | None:
    """Open data, build the policy from `start`, freeze, and let preflight look at all of it.

    What cannot be opened is a problem in `findings`, and what does not need it is looked at all the same. None when
    there are problems.
    """
    attempt = findings.problems.attempt
    attempt(check_tracking, config)
    strategy = attempt(chosen_strategy, config)
    if strategy is not None:
        attempt(strategy.check, [stage_folder(config, stage) for stage in stages_before(config, curriculum)])
    policy_is_known = attempt(policy_config_class, config.policy) is not None
    findings.look_at_datasets(curriculum)
    tasks = [task for stage in curriculum if (task := examine_task(stage, config.data, findings.problems))]
    data, training = config.data, config.training
    decoded = {
        task.name: DecodedFrames(task, image_size=data.image_size, video_backend=data.video_backend) for task in tasks
    }
    shapes = {name: found for name, frames in decoded.items() if (found := attempt(frames.checked_shapes))}
    findings.look_at_tasks(tasks, shapes, data.claw_limits)
    normalization = attempt(_shared_normalization, config, tasks) if tasks else None
    if normalization is None or not shapes or not policy_is_known:
        return None
    for task in tasks:
        attempt(normalization.check_covers, task)
    is_first = not stages_before(config, curriculum)
    wanted: dict[str, Any] = {
        "normalization": normalization,
        "frozen": training.freeze_first_stage if is_first else training.freeze,
        "checkpoint": start.pretrained_model if start else None,
        "device": accelerator.device,
    }
    instructions = [text for task in tasks for text in task.instructions.texts]
    image_shapes = next(iter(shapes.values()))
    policy_config = attempt(configure_policy, config, image_shapes=image_shapes, instructions=instructions, **wanted)
    if policy_config is None:
        return None
    findings.look_at_policy_config(policy_config, tasks, normalization)
    torch.manual_seed(step_seed(config.seed, config.stage.index))  # new weights are a function of the seed
    built = attempt(build_policy, config, policy_config, **wanted)
    if built is None:
        return None
    findings.look_at_policy(config, built.policy, built.stored)
    processes = accelerator.num_processes
    complete = len(tasks) == len(curriculum) and strategy is not None
    order = attempt(_order, config, tasks, built.policy, strategy, processes) if complete else None
    if order is None or strategy is None:
        return None
    timetable = Timetable(
        epochs=training.epochs,
        steps_per_epoch=order.steps_per_epoch(mixture_of(config).leading, training.gradient_accumulation_steps),
        max_steps=training.max_steps,
    )
    encoder = frozen_encoder(built.policy, precision=training.mixed_precision, autocast=accelerator.autocast)
    images = plan_images(data, decoded, _episodes_read(config, curriculum, tasks, order), encoder)
    findings.look_at_plan(config, order.shares, timetable.steps, images)
    sample = MixedDataset(tasks, list(decoded.values()), normalization, **frames_of_sample(built.policy.config))
    findings.problems += room_problems(
        data.num_workers,
        sample.bytes_of_batch(training.batch_size, look=images.look),
        batches_per_step=training.gradient_accumulation_steps,
        processes=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),  # as torchrun says
    )
    environments = attempt(_environments, config, curriculum, tasks)
    own = {stage.name for stage in curriculum if stage.environment is not None}
    trained_sizes = {camera: (shape[1], shape[2]) for camera, shape in image_shapes.items()}
    for task in tasks:
        environment = (environments or {}).get(task.name)
        if environment is not None and task.name in own:
            findings.notes += filter(None, [attempt(check_environment, environment, task, trained_sizes)])
    augment = attempt(_augmentation, config, accelerator.process_index)
    if findings.problems or environments is None or augment is None:
        return None
    return OpenedStage(
        config=config,
        curriculum=curriculum,
        folder=stage_folder(config),
        accelerator=accelerator,
        tasks=tasks,
        images=images,
        normalization=normalization,
        built=built,
        order=order,
        timetable=timetable,
        environments=environments,
        augment=augment,
        strategy=strategy,
        table=findings.table,
    )


def _environments(
    config: RunConfig, curriculum: Sequence[StageConfig], tasks: Sequence[Task]
) -> dict[str, Environment]:
    """Task seen → where it is rolled out; nothing when nothing is. Raises `ConfigError` where it cannot be."""
    if config.rollout.episodes == 0:
        return {}
    seen, told = seen_tasks(config, curriculum), {task.name: task.instruction for task in tasks}
    return {
        s.name: environment_of(s, told[s.name], config.simulation, config.rollout) for s in curriculum if s.name in seen
    }


def _order(config: RunConfig, tasks: Sequence[Task], policy: Any, strategy: Strategy, processes: int) -> Order:
    """Samples one by one, or clips of consecutive queries where the policy's memory is trained through time."""
    shares = strategy.shares(config, {task.name: len(task.train_rows) for task in tasks})
    about: dict[str, Any] = {
        "seed": config.seed,
        "stage": config.stage.index,
        "tasks": [task for task in tasks if task.name in shares],
        "shares": shares,
        "batch_size": config.training.batch_size,
        "processes": processes,
    }
    depth = PolicyTraits.of(policy.config).memory_depth
    if depth == 0:
        return SampleOrder(**about)
    stride, jitter = policy.config.n_action_steps, config.training.query_jitter
    try:
        return ClipOrder(depth=depth, stride=stride, jitter=jitter, **about)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def fresh_memory(order: Order, policy: Any, exchange: Exchange = dict) -> Recurrence:
    """Nothing remembered yet in any stream; `exchange` as `CarriedMemory` takes it."""
    if not isinstance(order, ClipOrder):
        return NoRecurrence()
    return CarriedMemory(policy.model.memory.initial(order.stream_count), exchange=exchange)


def _shared_normalization(config: RunConfig, tasks: list[Task]) -> Normalization:
    """The run's statistics: fixed by its first stage (which writes them when it begins), only read by the others."""
    path, source = config.run_folder / "normalization.json", config.data.normalization
    if path.is_file():
        return Normalization.load(path)
    if source == "pretrained":
        checkpoint = Path(str(config.policy.get("pretrained_path")))
        return normalization_from_checkpoint(checkpoint, FeatureSpace.of(tasks))
    return fit_normalization(tasks if source == "joint" else tasks[:1], source)


def _episodes_read(
    config: RunConfig, curriculum: Sequence[StageConfig], tasks: Sequence[Task], order: Order
) -> dict[str, list[int]]:
    """Task → the episodes the stage trains on or validates."""
    trained = [task.name for task in order.tasks]
    validated = [task.name for task in tasks]
    if stages_before(config, curriculum) and not config.validation.unseen_tasks:
        validated = seen_tasks(config, curriculum)
    return {
        task.name: [
            *(task.train_episodes if task.name in trained else ()),
            *(task.held_out_episodes if task.name in validated else ()),
        ]
        for task in tasks
    }


def _augmentation(config: RunConfig, process: int) -> Augmentation:
    if config.data.augmentation is None:
        return no_augmentation
    return ClipAugmentation(
        config.data.augmentation,
        cameras=config.data.cameras,
        seed=config.seed,
        stage=config.stage.index,
        process=process,
    )
