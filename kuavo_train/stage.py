"""One stage, told as a story: open data → build policy → train → validate → checkpoint.

Files and folders are run_folder.py's, the loop is the trainer's; only this module knows the whole.
"""

import contextlib
import json
import math
import signal
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, gather_object
from safetensors.torch import load_model

from kuavo_sim.record import RecordSettings, ensure_recorded
from kuavo_train.config import ConfigError, RunConfig, StageConfig
from kuavo_train.data.cache import DecodedFrames, FrameSource, cached_frames
from kuavo_train.data.lanes import LaneOrder
from kuavo_train.data.mixture import MixedDataset
from kuavo_train.data.normalization import Normalization, fit_normalization, normalization_from_checkpoint
from kuavo_train.data.order import Order, SampleOrder
from kuavo_train.data.tasks import FeatureSpace, Task, open_task
from kuavo_train.evaluation.forgetting import RetentionLimits
from kuavo_train.evaluation.matrix import write_matrix
from kuavo_train.evaluation.validation import Validator
from kuavo_train.learning.checkpoint import Checkpoint
from kuavo_train.learning.freezing import (
    ParameterGroup,
    compare_fingerprints,
    freeze,
    parameter_table,
    take_fingerprints,
)
from kuavo_train.learning.policy_factory import BuiltPolicy, build_optimizer, build_policy, choose_device
from kuavo_train.learning.recurrence import CarriedMemory, NoRecurrence, Recurrence
from kuavo_train.learning.tracking import make_tracker
from kuavo_train.learning.trainer import Interrupted, Progress, Trainer, TrainingDiverged, step_seed
from kuavo_train.preflight import check_stage
from kuavo_train.run_folder import StageFolder, now, stage_folder, write_json, write_run_facts


def run_stage(config: RunConfig, curriculum: Sequence[StageConfig]) -> int:
    """Run the stage of `config` within its curriculum; returns the exit status (130 or 143 when interrupted).

    Raises:
        ConfigError: before training; nothing is written that a later run would stumble over.
        TrainingDiverged: loss or gradient not finite; the last good checkpoint is kept.
    """
    accelerator = Accelerator(
        mixed_precision=config.training.mixed_precision,
        cpu=choose_device(config.training.device).type == "cpu",
        # Parameters that one batch does not reach (the write path at depth 1) must not stall several processes.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    folder = stage_folder(config)
    with accelerator.main_process_first():  # what the first process records and caches, the others find
        start = _starting_point(config, curriculum, folder)
        record_missing_data(config, curriculum)
        stage = open_stage(config, curriculum, start, accelerator)
    resumed = start if start is not None and start.folder.is_relative_to(folder.path.resolve()) else None
    return stage.run(resumed)


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
            raise ConfigError(f"{error}; to train on a dataset of your own there, set simulation=null") from error
        except ValueError as error:
            raise ConfigError(str(error)) from error


def _starting_point(config: RunConfig, curriculum: Sequence[StageConfig], folder: StageFolder) -> Checkpoint | None:
    """The checkpoint to begin from: this stage's last when resuming, else the stage before's best."""
    stage = config.stage
    if folder.status == "finished":
        raise ConfigError(
            f"stage {stage.index} ({stage.name}) is finished in {folder.path}; delete the folder to run it again"
        )
    if config.resume and folder.status != "absent":
        latest = folder.checkpoints.latest()
        if latest is not None:
            return _checked(latest, config)
    elif folder.path.exists() and any(folder.path.iterdir()):
        raise ConfigError(f"{folder.path} must be empty to start into; continue with resume=true, or delete it")
    place = [other.name for other in curriculum].index(stage.name)
    if place == 0:
        return None
    previous = curriculum[place - 1]
    before = stage_folder(config, previous)
    if before.status != "finished":
        resume = " resume=true" if before.status != "absent" else ""
        raise ConfigError(
            f"stage {stage.index} ({stage.name}) must follow a finished stage {previous.index} ({previous.name}), got "
            f"{before.status} in {before.path}; run: python -m kuavo_train "
            f"task=tasks/task{previous.index}_{previous.name} run={config.run}{resume}"
        )
    return _checked(before.checkpoints.at("best"), config)


def _checked(checkpoint: Checkpoint, config: RunConfig) -> Checkpoint:
    """The checkpoint, complete and of this run's normalization. Raises `ConfigError` otherwise."""
    checkpoint.verify()
    path = config.run_folder / "normalization.json"
    expected = Normalization.load(path).hash if path.is_file() else "none"
    if checkpoint.manifest["normalization"] != expected:
        raise ConfigError(
            f"checkpoint {checkpoint.folder} must have the run's normalization {expected[:12]} of {path}, got "
            f"{checkpoint.manifest['normalization'][:12]}; it belongs to another run"
        )
    return checkpoint


def open_stage(
    config: RunConfig, curriculum: Sequence[StageConfig], start: Checkpoint | None, accelerator: Accelerator
) -> "Stage":
    """Open data, build the policy from `start`, freeze, and let preflight look at all of it.

    Raises:
        ConfigError: everything preflight and the datasets find wrong.
    """
    tasks = _open_tasks(config, curriculum)
    normalization = _shared_normalization(config, tasks)
    for task in tasks:
        normalization.check_covers(task)
    frames = _frame_sources(config, tasks)
    image_shapes = [
        {camera: tuple(source(camera, task.bounds[0, :1]).shape[1:]) for camera in task.cameras}
        for task, source in zip(tasks, frames, strict=True)
    ]
    is_first = curriculum[0].name == config.stage.name
    frozen = config.training.freeze_first_stage if is_first else config.training.freeze
    torch.manual_seed(step_seed(config.seed, config.stage.index))  # new weights are a function of the seed
    built = build_policy(
        config,
        normalization=normalization,
        image_shapes=image_shapes[0],
        instructions=[task.instruction for task in tasks],
        freeze=frozen,
        checkpoint=start.pretrained_model if start else None,
        device=accelerator.device,
    )
    freeze(built.policy, frozen)
    order, recurrence = _order(config, [task for task in tasks if task.name in config.replay], built.policy)
    batches_per_step = config.training.gradient_accumulation_steps * accelerator.num_processes
    steps_per_epoch = order.steps_per_epoch(config.stage.name, batches_per_step)
    steps = config.training.epochs * steps_per_epoch
    if config.training.max_steps is not None:
        steps = min(steps, config.training.max_steps)
    table = check_stage(
        config, tasks=tasks, normalization=normalization, image_shapes=image_shapes, policy=built.policy, steps=steps
    )
    return Stage(
        config=config,
        curriculum=curriculum,
        folder=stage_folder(config),
        accelerator=accelerator,
        tasks=tasks,
        frames=frames,
        normalization=normalization,
        built=built,
        order=order,
        recurrence=recurrence,
        steps=steps,
        steps_per_epoch=steps_per_epoch,
        table=table,
    )


def _order(config: RunConfig, tasks: Sequence[Task], policy: Any) -> tuple[Order, Recurrence]:
    """Samples one by one, or clips of consecutive queries where the policy's memory is trained through time."""
    about = {"seed": config.seed, "stage": config.stage.index, "batch_size": config.training.batch_size}
    depth = getattr(policy.config, "mem_backprop_depth", 0)
    if depth == 0 or policy.config.num_mem_tokens == 0:
        return SampleOrder(tasks=tasks, shares=config.replay, **about), NoRecurrence()
    stride, jitter = policy.config.n_action_steps, config.training.query_jitter
    try:
        order = LaneOrder(tasks=tasks, shares=config.replay, depth=depth, stride=stride, jitter=jitter, **about)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return order, CarriedMemory(policy.model.memory.initial(sum(order.streams)), depth=depth)


def _open_tasks(config: RunConfig, curriculum: Sequence[StageConfig]) -> list[Task]:
    """All tasks of the curriculum; the problems of all of them are told at once."""
    tasks, problems = [], []
    for stage in curriculum:
        try:
            tasks.append(open_task(stage, config.data))
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))
    return tasks


def _shared_normalization(config: RunConfig, tasks: list[Task]) -> Normalization:
    """The run's statistics: fixed by its first stage, only read by the later ones."""
    path, source = config.run_folder / "normalization.json", config.data.normalization
    if path.is_file():
        return Normalization.load(path)
    if source == "pretrained":
        checkpoint = Path(str(config.policy.get("pretrained_path")))
        normalization = normalization_from_checkpoint(checkpoint, FeatureSpace.of(tasks))
    else:
        normalization = fit_normalization(tasks if source == "joint" else tasks[:1], source)
    path.parent.mkdir(parents=True, exist_ok=True)
    normalization.save(path)
    return normalization


def _frame_sources(config: RunConfig, tasks: Sequence[Task]) -> list[FrameSource]:
    sources: list[FrameSource] = []
    for task in tasks:
        decoded = DecodedFrames(task, image_size=config.data.image_size, video_backend=config.data.video_backend)
        cache = Path(config.outputs) / "cache" / "frames"
        sources.append(cached_frames(decoded, cache) if config.data.frame_cache else decoded)
    return sources


@dataclass
class Stage:
    """A stage whose data and policy are open: train, validate, checkpoint, conclude."""

    config: RunConfig
    curriculum: Sequence[StageConfig]
    folder: StageFolder
    accelerator: Accelerator
    tasks: list[Task]
    frames: list[FrameSource]
    normalization: Normalization
    built: BuiltPolicy
    order: Order
    recurrence: Recurrence
    steps: int
    steps_per_epoch: int
    table: str

    def run(self, resumed: Checkpoint | None) -> int:
        """From `resumed`, or from the beginning, to the end; returns the exit status."""
        config = self.config
        self._open_folder(resumed)
        before = self._fingerprints_before(resumed)
        where = f"stage {config.stage.index} ({config.stage.name}) of run {config.run}, in {self.folder.path}"
        self.accelerator.print(f"\n{where}\n{self.table}\n{parameter_table(before)}", flush=True)
        parameters = self.built.policy.parameters()
        optimizer, self.scheduler = build_optimizer(parameters, config.training, steps=self.steps)
        self.policy, self.optimizer = self.accelerator.prepare(self.built.policy, optimizer)
        self.validator = Validator(
            self._dataset(self.tasks),
            self.normalization,
            self.built.preprocessor,
            draws=config.validation.draws,
            batch_size=config.validation.batch_size,
            autocast=self.accelerator.autocast,
            progress=self.accelerator.is_main_process,
        )
        progress = self._restore(resumed)
        if resumed is None and self._seen == [config.stage.name]:
            self._validate("start", step=0, epoch=0, names=[task.name for task in self.tasks])
        try:
            self._train(progress)
        except Interrupted as interrupted:
            self._tell(status="interrupted", steps=interrupted.step)
            self.accelerator.print(
                f"interrupted: the checkpoint of step {interrupted.step} is in {self.folder.path / 'checkpoints'}; "
                "continue with resume=true",
                flush=True,
            )
            return 128 + interrupted.signal_number
        except TrainingDiverged as error:
            self._tell(status="failed")
            last = self.folder.checkpoints.latest()
            kept = f"the last good checkpoint is {last.folder}" if last else "no checkpoint was written yet"
            raise TrainingDiverged(f"{error}; {kept}") from error
        self._conclude(progress, before)
        return 0

    @property
    def _seen(self) -> list[str]:
        """Tasks learnt up to and including this stage."""
        names = [stage.name for stage in self.curriculum]
        return names[: names.index(self.config.stage.name) + 1]

    def _dataset(self, tasks: Sequence[Task]) -> MixedDataset:
        frames = [self.frames[self.tasks.index(task)] for task in tasks]
        return MixedDataset(tasks, frames, self.normalization, chunk_size=self.built.policy.config.chunk_size)

    def _tell(self, **values: Any) -> None:
        if self.accelerator.is_main_process:
            self.folder.tell(**values)

    def _open_folder(self, resumed: Checkpoint | None) -> None:
        """Create the stage's files; forget what lies beyond the checkpoint the stage resumes from."""
        config, folder = self.config, self.folder
        if not self.accelerator.is_main_process:
            return
        write_run_facts(config, self.curriculum, self.tasks, self.normalization)
        (folder.path / "checkpoints").mkdir(parents=True, exist_ok=True)
        for lines in (folder.metrics, folder.validations):
            lines.forget_after(resumed.step if resumed else -1)
        began = {} if resumed else {"started": now()}
        stage = {"name": config.stage.name, "index": config.stage.index, "epochs": config.training.epochs}
        folder.tell(**stage, total_steps=self.steps, status="running", **began)
        (folder.path / "config.yaml").write_text(yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True))

    def _fingerprints_before(self, resumed: Checkpoint | None) -> list[ParameterGroup]:
        """Fingerprints when the stage began; a resumed stage compares with its own beginning, not its middle."""
        path = self.folder.path / "parameters.json"
        groups = take_fingerprints(self.built.policy)
        if resumed is None:
            if self.accelerator.is_main_process:
                write_json(path, {"groups": [asdict(group) for group in groups]})
            return groups
        return [ParameterGroup(**row) for row in json.loads(path.read_text())["groups"]]

    def _restore(self, resumed: Checkpoint | None) -> Progress:
        if resumed is None:
            return Progress()
        state = resumed.training_state()
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.accelerator.print(f"  resumed at step {resumed.step} of {self.steps}", flush=True)
        mine = state["processes"][self.accelerator.process_index]
        self.recurrence.load_state_dict(mine["memory"])
        return Progress(**mine["progress"])

    def _train(self, progress: Progress) -> None:
        config = self.config
        tracker = make_tracker(
            config.tracking if self.accelerator.is_main_process else "off",
            run=config.run,
            stage=config.stage.folder_name,
            folder=self.folder.path,
            config=asdict(config),
        )

        def log(values: dict[str, Any], step: int) -> None:
            if self.accelerator.is_main_process:
                self.folder.metrics.append({"step": step, **values})
                tracker.log({key: value for key, value in values.items() if isinstance(value, int | float)}, step)

        with listening_for_signals() as received:
            trainer = Trainer(
                accelerator=self.accelerator,
                policy=self.policy,
                preprocessor=self.built.preprocessor,
                optimizer=self.optimizer,
                scheduler=self.scheduler,
                dataset=self._dataset(self.order.tasks),
                order=self.order,
                recurrence=self.recurrence,
                config=config.training,
                steps=self.steps,
                steps_per_epoch=self.steps_per_epoch,
                validate_every=config.validation.every_epochs,
                num_workers=config.data.num_workers,
                log=log,
                validate=lambda step, epoch: self._validate("epoch", step=step, epoch=epoch, names=self._seen),
                save=self._save,
                stop_signal=lambda: self._agreed(received),
                description=config.stage.folder_name,
            )
            try:
                trainer.run(progress)
            finally:
                tracker.finish()

    def _agreed(self, received: Sequence[int]) -> int | None:
        """The signal any process has received: all stop after the same step."""
        number = received[0] if received else 0
        if self.accelerator.num_processes > 1:
            number = max(gather_object([number]))
        return number or None

    def _validate(self, kind: str, *, step: int, epoch: int, names: Sequence[str]) -> float:
        """Append a record per task to validation.jsonl; returns the mean loss over the tasks seen."""
        records = self.validator.validate_all_tasks(self.accelerator.unwrap_model(self.policy), names)
        seen = [] if kind == "start" else self._seen
        stage = self.config.stage
        about = {"stage": stage.index, "stage_name": stage.name, "kind": kind, "epoch": epoch, "step": step}
        if self.accelerator.is_main_process:
            for record in records:
                self.folder.validations.append({**about, "seen": record["task"] in seen, **record})
        return float(np.mean([record["loss"] for record in records if record["task"] in (seen or names)]))

    def _save(self, progress: Progress) -> None:
        per_process = gather_object([{"progress": asdict(progress), "memory": self.recurrence.state_dict()}])
        if not self.accelerator.is_main_process:
            return
        checkpoints = self.folder.checkpoints
        checkpoints.save(
            progress.step,
            policy=self.accelerator.unwrap_model(self.policy),
            processors=(self.built.preprocessor, self.built.postprocessor),
            training_state={
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
                "processes": per_process,
            },
            about={
                "run": self.config.run,
                "stage": self.config.stage.folder_name,
                "seed": self.config.seed,
                "normalization": self.normalization.hash,
            },
        )
        if progress.best_step is not None:
            checkpoints.point("best", progress.best_step)
        checkpoints.prune(keep={progress.step, progress.best_step or progress.step})

    def _conclude(self, progress: Progress, before: Sequence[ParameterGroup]) -> None:
        """The stage's result is its best checkpoint: validate it on all tasks, audit, record."""
        config, folder = self.config, self.folder
        self.accelerator.wait_for_everyone()
        best = folder.checkpoints.at("best")
        policy = self.accelerator.unwrap_model(self.policy)
        if best.step != progress.step:
            load_model(policy, str(best.pretrained_model / "model.safetensors"))
        names = [task.name for task in self.tasks] if config.validation.unseen_tasks else self._seen
        self._validate("end", step=best.step, epoch=math.ceil(best.step / self.steps_per_epoch), names=names)
        drawn = gather_object([(progress.drawn, progress.drawn_episodes)])
        if not self.accelerator.is_main_process:
            return
        write_json(folder.path / "parameters.json", compare_fingerprints(before, take_fingerprints(policy)))
        audit = self.order.audit([frames for frames, _ in drawn], [episodes for _, episodes in drawn])
        write_json(folder.path / "replay_audit.json", {"stage": config.stage.index, **audit})
        folder.tell(
            status="finished",
            steps=progress.step,
            seconds=round(progress.seconds, 1),
            best={"step": best.step, "loss": progress.best_loss},
            checkpoint=f"checkpoints/{best.folder.name}",
            checkpoint_hash=best.hash,
            finished=now(),
        )
        write_matrix(config.run_folder, limits=RetentionLimits(**asdict(config.forgetting)))
        print(f"finished stage {config.stage.index} ({config.stage.name}): {folder.path / 'checkpoints' / 'best'}")


@contextlib.contextmanager
def listening_for_signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM instead of dying of them; a second SIGINT interrupts at once."""
    received: list[int] = []

    def remember(number: int, _frame: Any) -> None:
        if number == signal.SIGINT and received:
            raise KeyboardInterrupt
        received.append(number)
        print("\nstopping after this step …", flush=True)

    handlers = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
