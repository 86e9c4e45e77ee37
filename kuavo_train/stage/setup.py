"""What a stage needs, opened: data, policy, order of samples, where images come from, simulators."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.processor import PolicyProcessorPipeline

from kuavo_sim.record import RecordSettings, ensure_all_recorded
from kuavo_train.config import RunConfig, StageConfig
from kuavo_train.data.checkpoint_tasks import KnownTasks
from kuavo_train.data.clip_sampler import ClipOrder
from kuavo_train.data.dataset import MixedDataset, frames_of_sample
from kuavo_train.data.images.augmentation import Augmentation, ClipAugmentation, no_augmentation
from kuavo_train.data.images.contexts import with_contexts
from kuavo_train.data.images.part import WHOLE, Shard
from kuavo_train.data.images.plan import Images, plan_images
from kuavo_train.data.mixture import mixture_of
from kuavo_train.data.normalization import Normalization
from kuavo_train.data.policy_traits import PolicyTraits
from kuavo_train.data.replay.buffer import Kept
from kuavo_train.data.replay.exported_file import exported_names
from kuavo_train.data.sampler import Order, SampleOrder
from kuavo_train.data.task import Task
from kuavo_train.data.workers import room_problems
from kuavo_train.errors import ConfigError, require
from kuavo_train.evaluation.environment import Environment, environment_of
from kuavo_train.evaluation.environment_check import check_environment
from kuavo_train.runs.run_folder import StageFolder, stage_folder
from kuavo_train.stage.findings import Findings
from kuavo_train.stage.kept_data import kept_of_all, kept_of_earlier
from kuavo_train.stage.lineage import Start, processes_of, seen_tasks, stages_before
from kuavo_train.stage.opened_data import OpenedData, open_data
from kuavo_train.stage.samples import dataset_of, episodes_read, episodes_trained
from kuavo_train.stage.validated_tasks import validated_tasks
from kuavo_train.strategies.chosen import chosen_strategy
from kuavo_train.strategies.strategy import Strategy
from kuavo_train.training.carried_memory import CarriedMemory, Exchange, NoRecurrence, Recurrence
from kuavo_train.training.epochs import Timetable
from kuavo_train.training.frozen_encoder import frozen_context, frozen_encoder
from kuavo_train.training.optimizer import choose_device
from kuavo_train.training.policy_factory import BuiltPolicy, build_policy, configure_policy, policy_config_class
from kuavo_train.training.tracking import check_tracking
from kuavo_train.training.trainer import step_seed


@dataclass(frozen=True)
class OpenedStage:
    """All that a stage needs, open and looked at; nothing is written or trained yet.

    Attributes:
        start: what its weights, and where it goes on its state, are from.
        tasks: of the whole curriculum, in the order of learning.
        environments: task seen → where it is rolled out.
        findings: what preflight has to say.
    """

    config: RunConfig
    curriculum: Sequence[StageConfig]
    start: Start
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
    findings: Findings

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
    def processors(self) -> tuple[PolicyProcessorPipeline, PolicyProcessorPipeline]:
        return self.built.preprocessor, self.built.postprocessor

    def dataset(self, tasks: Sequence[Task]) -> MixedDataset:
        return dataset_of(self.images, self.normalization, self.built, tasks)


def record_missing_data(config: RunConfig, curriculum: Sequence[StageConfig]) -> None:
    """Record the demonstrations of simulated tasks that are not there yet, nor in an exported file, saying so.

    Raises:
        ConfigError: the dataset there was recorded under other settings, or is not a recording.
    """
    if config.simulation is None:
        return
    exported = exported_names(config.data)
    wanted = {
        Path(stage.root): RecordSettings(task=stage.simulation_task, **asdict(config.simulation))
        for stage in curriculum
        if stage.simulation_task is not None and stage.name not in exported
    }
    for root, settings in wanted.items():
        if not root.exists():
            print(f"recording {settings.episodes} demonstrations of {settings.task} into {root}", flush=True)
    try:
        ensure_all_recorded(wanted, workers=config.data.record_workers)
    except FileExistsError as error:
        raise ConfigError(
            f"{error}; to train on a dataset of your own there, set simulation=null rollout.episodes=0"
        ) from error
    except ValueError as error:
        raise ConfigError(str(error)) from error


LONGEST_WAIT = timedelta(days=1)
"""Of processes for each other, in any exchange between them.

While the first one records demonstrations, or fetches them, the others wait in a single exchange, and so they do for
the slowest when image caches are filled: hours for large data. torch gives up after 10 to 30 minutes. A death need not
be found out by waiting: connections break, and the launcher ends who is left.
"""


def accelerator_for(config: RunConfig) -> Accelerator:
    """Raises `ConfigError` when the device is not there, or fewer of them than processes."""
    device = choose_device(config.training.device).type
    if device == "cuda":
        gpus = torch.cuda.device_count()
        require(config.processes <= gpus, "processes", f"not exceed the {gpus} GPUs that are there", config.processes)
    return Accelerator(
        mixed_precision=config.training.mixed_precision,
        cpu=device == "cpu",
        kwargs_handlers=[
            # Parameters that one batch does not reach (the write path at depth 1) must not stall several processes.
            DistributedDataParallelKwargs(find_unused_parameters=True),
            InitProcessGroupKwargs(timeout=LONGEST_WAIT),
        ],
    )


def open_stage(
    config: RunConfig, curriculum: Sequence[StageConfig], start: Start, accelerator: Accelerator, findings: Findings
) -> OpenedStage:
    """Open the data, build the policy, plan the samples; preflight looks at each.

    What cannot be opened is a problem in `findings`, and what does not need it is looked at all the same.

    Raises:
        NotReady: with all problems.
    """
    opening = Opening(config, curriculum, start, accelerator, findings)
    findings.attempt(check_tracking, config)
    strategy = opening.strategy()
    policy_class = findings.attempt(policy_config_class, config.policy)
    data = open_data(config, curriculum, findings)
    kept = opening.kept(data)
    findings.need(policy_class)
    built = opening.policy(data)
    findings.need(data.tasks if len(data.tasks) == len(curriculum) else None)
    return opening.plan(data, built, findings.need(strategy), findings.need(kept))


@dataclass(frozen=True)
class Opening:
    """The steps of `open_stage`; each leaves its problems in `findings`, and raises where no other step can follow."""

    config: RunConfig
    curriculum: Sequence[StageConfig]
    start: Start
    accelerator: Accelerator
    findings: Findings

    def strategy(self) -> Strategy | None:
        strategy = self.findings.attempt(chosen_strategy, self.config)
        if strategy is not None:
            earlier = [stage_folder(self.config, stage) for stage in stages_before(self.config, self.curriculum)]
            self.findings.attempt(strategy.check, earlier)
        return strategy

    def policy(self, data: OpenedData) -> BuiltPolicy:
        """With the weights it starts from, frozen as the stage wants it."""
        config, findings, weights = self.config, self.findings, self.start.weights
        is_first, seen = not stages_before(config, self.curriculum), seen_tasks(config, self.curriculum)
        frozen = config.training.freeze_first_stage if is_first else config.training.freeze
        checkpoint, device = weights.pretrained_model if weights else None, self.accelerator.device
        policy_config = findings.need(
            findings.attempt(
                configure_policy,
                config,
                normalization=data.normalization,
                image_shapes=data.image_shapes,
                instructions=[text for task in data.tasks for text in task.instructions.texts],
                learnt=[task.instructions.texts for task in data.tasks if task.name in seen],
                frozen=frozen,
                checkpoint=checkpoint,
                device=device,
            )
        )
        findings.look_at_policy_config(policy_config, data.tasks, data.normalization)
        torch.manual_seed(step_seed(config.seed, config.stage.index))  # new weights are a function of the seed
        built = findings.need(
            findings.attempt(
                build_policy,
                config,
                policy_config,
                normalization=data.normalization,
                frozen=frozen,
                checkpoint=checkpoint,
                device=device,
            )
        )
        findings.look_at_policy(config, built.policy, built.stored)
        return built

    def kept(self, data: OpenedData) -> dict[str, Kept] | None:
        """Task learnt before → what of it may be replayed; nothing where all is."""
        kept = self.findings.attempt(kept_of_earlier, self.config, self.curriculum, data.tasks, self.start)
        shown = self.findings.attempt(kept_of_all, self.config, data.tasks, kept or {})
        self.findings.look_at_kept(shown or {})
        return kept

    def with_validated(self, data: OpenedData, built: BuiltPolicy) -> OpenedData:
        """Of the held-out episodes, those that the run validates."""
        return replace(data, tasks=validated_tasks(self.config, data.tasks, built.policy.config.n_action_steps))

    def order(self, data: OpenedData, built: BuiltPolicy, strategy: Strategy, kept: Mapping[str, Kept]) -> Order:
        attempted = self.findings.attempt(_order, self.config, data.tasks, built.policy, strategy, kept)
        return self.findings.need(attempted)

    def images(self, data: OpenedData, built: BuiltPolicy, order: Order, shard: Shard = WHOLE) -> Images:
        """Where the pictures of the episodes that the stage reads come from; `shard` as `plan_images` takes it."""
        config, findings = self.config, self.findings
        how = {"precision": config.training.mixed_precision, "autocast": self.accelerator.autocast}
        read, encoder = episodes_read(config, self.curriculum, data.tasks, order), frozen_encoder(built.policy, **how)
        of_training = episodes_trained(order)
        about = (config.data, data.frames, read, encoder, data.exported, shard, of_training)
        planned = findings.attempt(plan_images, *about)
        images = findings.need(planned)
        return with_contexts(
            images,
            config.data,
            data.tasks,
            read,
            frozen_context(built.policy, built.preprocessor, **how),
            partial(dataset_of, images, data.normalization, built),
            shard,
        )

    def plan(self, data: OpenedData, built: BuiltPolicy, strategy: Strategy, kept: Mapping[str, Kept]) -> OpenedStage:
        """Which samples in how many steps, where their pictures come from, and where the policy is rolled out."""
        config, findings, accelerator = self.config, self.findings, self.accelerator
        training, stride = config.training, built.policy.config.n_action_steps
        data = self.with_validated(data, built)
        order = self.order(data, built, strategy, kept)
        timetable = Timetable(
            epochs=training.epochs,
            steps_per_epoch=order.steps_per_epoch(mixture_of(config).leading, training.gradient_accumulation_steps),
            max_steps=training.max_steps,
        )
        images = self.images(data, built, order)
        findings.look_at_plan(config, order.shares, timetable.steps, images)
        findings.look_at_clips(order)
        seen, first = seen_tasks(config, self.curriculum), not stages_before(config, self.curriculum)
        findings.look_at_validation(config, data.tasks, seen, timetable, stride=stride, first=first)
        findings.problems += _room_problems(config, data, built, images)
        environments = findings.attempt(_environments, config, self.curriculum, data, findings)
        augment = findings.attempt(_augmentation, config, accelerator.process_index)
        findings.raise_problems()
        return OpenedStage(
            config=config,
            curriculum=self.curriculum,
            start=self.start,
            folder=stage_folder(config),
            accelerator=accelerator,
            tasks=data.tasks,
            images=images,
            normalization=data.normalization,
            built=built,
            order=order,
            timetable=timetable,
            environments=findings.need(environments),
            augment=findings.need(augment),
            strategy=strategy,
            findings=findings,
        )


def _room_problems(config: RunConfig, data: OpenedData, built: BuiltPolicy, images: Images) -> list[str]:
    """What batches on their way from loaders lack of shared memory."""
    frames = list(data.frames.values())
    sample = MixedDataset(data.tasks, frames, data.normalization, **frames_of_sample(built.policy.config))
    return room_problems(
        config.data.num_workers,
        sample.bytes_of_batch(config.batch_of_process, look=images.look),
        batches_per_step=config.training.gradient_accumulation_steps,
        processes=int(os.environ.get("LOCAL_WORLD_SIZE", config.processes)),  # as torchrun says
    )


def _environments(
    config: RunConfig, curriculum: Sequence[StageConfig], data: OpenedData, findings: Findings
) -> dict[str, Environment]:
    """Task seen → where it is rolled out; nothing when nothing is. Raises `ConfigError` where it cannot be."""
    if config.rollout.episodes == 0:
        return {}
    tasks = {task.name: task for task in data.tasks}
    seen = [stage for stage in curriculum if stage.name in seen_tasks(config, curriculum)]
    environments = {
        stage.name: environment_of(stage, tasks[stage.name].instruction, config.simulation, config.rollout)
        for stage in seen
    }
    trained_sizes = {camera: (shape[1], shape[2]) for camera, shape in data.image_shapes.items()}
    for stage in seen:
        if stage.environment is not None:  # of the user's own
            check = (environments[stage.name], tasks[stage.name], trained_sizes)
            findings.notes += filter(None, [findings.attempt(check_environment, *check)])
    return environments


def _order(
    config: RunConfig,
    tasks: Sequence[Task],
    policy: PreTrainedPolicy,
    strategy: Strategy,
    kept: Mapping[str, Kept],
) -> Order:
    """Samples one by one, or clips of consecutive queries where the policy's memory is trained through time."""
    _check_feature_stride(config, policy)
    shares = strategy.shares(config, {task.name: task.train_queries for task in tasks})
    kind: Callable[..., Order] = SampleOrder
    if depth := PolicyTraits.of(policy.config).memory_depth:
        require(
            config.replay.unit == "episode" or not config.replay.keeps_part,
            "replay.unit",
            f"be episode where a memory is trained through time (policy.mem_backprop_depth={depth}): in single frames "
            "there are no queries before, which the memory is from",
            config.replay.unit,
        )
        stride, jitter = policy.config.n_action_steps, config.training.query_jitter
        kind = partial(ClipOrder, depth=depth, stride=stride, jitter=jitter)
    try:
        return kind(
            seed=config.seed,
            stage=config.stage.index,
            tasks=[task for task in tasks if task.name in shares],
            shares=shares,
            batch_size=config.batch_of_process,
            processes=processes_of(config),
            kept=kept,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _check_feature_stride(config: RunConfig, policy: PreTrainedPolicy) -> None:
    """Raises `ConfigError` where a query would see frames that are not kept."""
    stride, jitter, apart = config.data.feature_stride, config.training.query_jitter, policy.config.n_action_steps
    rule = f"divide policy.n_action_steps={apart}: clips and validation go on by so many frames from query to query"
    require(apart % stride == 0, "data.feature_stride", rule, stride)
    looks = frames_of_sample(policy.config)["observations"]
    rule = f"divide the offsets of the frames that a sample of policy.type={policy.config.type} sees, {list(looks)}"
    require(all(look % stride == 0 for look in looks), "data.feature_stride", rule, stride)
    rule = f"be a multiple of data.feature_stride={stride}, the frames from one that is kept to the next"
    require(jitter % stride == 0, "training.query_jitter", rule, jitter)


def fresh_memory(order: Order, policy: PreTrainedPolicy, exchange: Exchange = dict) -> Recurrence:
    """Nothing remembered yet in any stream; `exchange` as `CarriedMemory` takes it."""
    if not isinstance(order, ClipOrder):
        return NoRecurrence()
    return CarriedMemory(policy.model.memory.initial(order.stream_count), exchange=exchange)


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
