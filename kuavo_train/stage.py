"""One stage, told as a story: open data → build policy → train → validate → checkpoint.

outputs/<run>/run.json, normalization.json
outputs/<run>/stage2_weighing/stage.json, config.yaml, metrics.jsonl, validation.jsonl, replay_audit.json,
                              parameters.json, checkpoints/
"""

import contextlib
import hashlib
import json
import math
import os
import platform
import signal
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from accelerate import Accelerator
from accelerate.utils import gather_object
try:
    from kuavo_sim.record import RecordSettings, ensure_recorded
except ImportError:
    pass
from safetensors.torch import load_model

from kuavo_train.config import ConfigError, RunConfig, StageConfig
from kuavo_train.data.cache import DecodedFrames, FrameSource, cached_frames
from kuavo_train.data.mixture import MixedDataset, SampleOrder
from kuavo_train.data.normalization import Normalization, fit_normalization, normalization_from_checkpoint
from kuavo_train.data.tasks import FeatureSpace, Task, open_task
from kuavo_train.evaluation.validation import Validator
from kuavo_train.learning.checkpoint import Checkpoint, CheckpointFolder
from kuavo_train.learning.freezing import compare_fingerprints, freeze, parameter_table, take_fingerprints
from kuavo_train.learning.policy_factory import BuiltPolicy, build_optimizer, build_policy, choose_device
from kuavo_train.learning.tracking import JsonLines, make_tracker
from kuavo_train.learning.trainer import Interrupted, Progress, Trainer, TrainingDiverged
from kuavo_train.preflight import check_stage
from kuavo_train.evaluation.matrix import write_matrix

VERSIONS_OF = ("lerobot", "torch", "transformers", "accelerate", "mujoco", "numpy")


@dataclass(frozen=True)
class StageFolder:
    """Files of one stage, and whether it may be entered."""

    path: Path

    @property
    def status(self) -> str:
        """absent, running, interrupted, failed or finished."""
        return self.about["status"] if (self.path / "stage.json").is_file() else "absent"

    @property
    def about(self) -> dict[str, Any]:
        return json.loads((self.path / "stage.json").read_text())

    def tell(self, **values: Any) -> None:
        """Update stage.json in one move."""
        about = {**(self.about if self.status != "absent" else {}), **values}
        write_json(self.path / "stage.json", about)

    @property
    def checkpoints(self) -> CheckpointFolder:
        return CheckpointFolder(self.path / "checkpoints")

    @property
    def metrics(self) -> JsonLines:
        return JsonLines(self.path / "metrics.jsonl")

    @property
    def validations(self) -> JsonLines:
        return JsonLines(self.path / "validation.jsonl")


def stage_folder(config: RunConfig, stage: StageConfig | None = None) -> StageFolder:
    return StageFolder(config.run_folder / (stage or config.stage).folder_name)


def run_stage(config: RunConfig, curriculum: Sequence[StageConfig]) -> int:
    """Run the stage of `config` within its curriculum; returns the exit status (130 or 143 when interrupted).

    Raises:
        ConfigError: before anything is written that a later run would stumble over.
        TrainingDiverged: the last good checkpoint is kept.
    """
    folder = stage_folder(config)
    start = _starting_point(config, curriculum, folder)
    record_missing_data(config, curriculum)
    tasks = _open_tasks(config, curriculum)
    normalization = _shared_normalization(config, tasks)
    for task in tasks:
        normalization.check_covers(task)
    frames = _frame_sources(config, tasks)
    image_shapes = {
        task.name: {camera: tuple(source(camera, np.array([0])).shape[1:]) for camera in task.cameras}
        for task, source in zip(tasks, frames, strict=True)
    }
    is_first = curriculum[0].name == config.stage.name
    frozen = config.training.freeze_first_stage if is_first else config.training.freeze
    device = choose_device(config.training.device)
    accelerator = Accelerator(mixed_precision=config.training.mixed_precision, cpu=device.type == "cpu")
    built = build_policy(
        config,
        normalization=normalization,
        image_shapes=image_shapes[config.stage.name],  # type: ignore[arg-type]
        instructions=[task.instruction for task in tasks],
        freeze=frozen,
        checkpoint=start.pretrained_model if start else None,
        device=device,
    )
    freeze(built.policy, frozen)
    learnt = [task for task in tasks if task.name in config.replay]
    order = SampleOrder(seed=config.seed, stage=config.stage.index, tasks=learnt, shares=config.replay)
    steps_per_epoch = order.steps_per_epoch(config.stage.name, _samples_per_step(config, accelerator))
    steps = min(config.training.epochs * steps_per_epoch, config.training.max_steps or math.inf)
    table = check_stage(
        config,
        tasks=tasks,
        normalization=normalization,
        image_shapes=image_shapes,  # type: ignore[arg-type]
        policy=built.policy,
        steps=int(steps),
    )
    story = _Story(
        config=config,
        curriculum=curriculum,
        folder=folder,
        accelerator=accelerator,
        tasks=tasks,
        normalization=normalization,
        frames=frames,
        built=built,
        order=order,
        steps=int(steps),
        steps_per_epoch=steps_per_epoch,
    )
    print(
        f"\nstage {config.stage.index} ({config.stage.name}) of run {config.run}, in {folder.path}\n{table}", flush=True
    )
    return story.tell(resumed=start if start and start.folder.is_relative_to(folder.path.resolve()) else None)


@dataclass
class _Story:
    """The second half of a stage, when everything is open: train, validate, checkpoint, conclude."""

    config: RunConfig
    curriculum: Sequence[StageConfig]
    folder: StageFolder
    accelerator: Accelerator
    tasks: list[Task]
    normalization: Normalization
    frames: list[FrameSource]
    built: BuiltPolicy
    order: SampleOrder
    steps: int
    steps_per_epoch: int

    def tell(self, resumed: Checkpoint | None) -> int:
        config, folder = self.config, self.folder
        self._open_folder(resumed)
        before = self._fingerprints_before(resumed)
        print(parameter_table(before), flush=True)
        chunk = self.built.policy.config.chunk_size
        self.validator = Validator(
            MixedDataset(self.tasks, self.frames, self.normalization, chunk_size=chunk),
            self.normalization,
            self.built.preprocessor,
            draws=config.validation.draws,
            batch_size=config.validation.batch_size,
            autocast=self.accelerator.autocast,
            progress=self.accelerator.is_main_process,
        )
        optimizer, scheduler = build_optimizer(self.built.policy.parameters(), config.training, steps=self.steps)
        self.policy, self.optimizer = self.accelerator.prepare(self.built.policy, optimizer)
        self.scheduler = scheduler
        progress = self._restore(resumed)
        if resumed is None and self.config.stage.name == self.curriculum[0].name:
            self._validate("start", step=0, epoch=0, names=[task.name for task in self.tasks])
        tracker = make_tracker(
            config.tracking,
            run=config.run,
            stage=config.stage.folder_name,
            folder=folder.path,
            config=asdict(config),
        )

        def log(values: dict[str, Any], step: int) -> None:
            if self.accelerator.is_main_process:
                folder.metrics.append({"step": step, **values})
                tracker.log({key: value for key, value in values.items() if isinstance(value, int | float)}, step)

        learnt = [task for task in self.tasks if task.name in config.replay]
        with listening_for_signals() as received:
            trainer = Trainer(
                accelerator=self.accelerator,
                policy=self.policy,
                preprocessor=self.built.preprocessor,
                optimizer=self.optimizer,
                scheduler=scheduler,
                dataset=MixedDataset(
                    learnt,
                    [source for task, source in zip(self.tasks, self.frames, strict=True) if task in learnt],
                    self.normalization,
                    chunk_size=chunk,
                ),
                order=self.order,
                config=config.training,
                steps=self.steps,
                steps_per_epoch=self.steps_per_epoch,
                validate_every=config.validation.every_epochs,
                num_workers=config.data.num_workers,
                log=log,
                validate=lambda step, epoch: self._validate("epoch", step=step, epoch=epoch, names=self._seen),
                save=self._save,
                stop_signal=lambda: received[0] if received else None,
                description=config.stage.folder_name,
            )
            try:
                progress = trainer.run(progress)
            except Interrupted as interrupted:
                folder.tell(status="interrupted", steps=interrupted.step)
                print(
                    f"interrupted: checkpoint of step {interrupted.step} is in {folder.path / 'checkpoints'}; "
                    "continue with resume=true",
                    flush=True,
                )
                return 128 + interrupted.signal_number
            except TrainingDiverged:
                folder.tell(status="failed")
                raise
            finally:
                tracker.finish()
        self._conclude(progress, before)
        return 0

    @property
    def _seen(self) -> list[str]:
        """Tasks learnt up to and including this stage."""
        names = [stage.name for stage in self.curriculum]
        return names[: names.index(self.config.stage.name) + 1]

    def _open_folder(self, resumed: Checkpoint | None) -> None:
        """Create the stage's files; forget what lies beyond the checkpoint the stage resumes from."""
        config, folder = self.config, self.folder
        (folder.path / "checkpoints").mkdir(parents=True, exist_ok=True)
        _write_run_facts(config, self.tasks, self.normalization)
        for lines in (folder.metrics, folder.validations):
            lines.forget_after(resumed.step if resumed else -1)
        folder.tell(
            name=config.stage.name,
            index=config.stage.index,
            status="running",
            epochs=config.training.epochs,
            total_steps=self.steps,
            **({} if resumed else {"started": _now()}),
        )
        (folder.path / "config.yaml").write_text(yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True))

    def _fingerprints_before(self, resumed: Checkpoint | None) -> list[Any]:
        """Fingerprints when the stage began; a resumed stage compares with its own beginning, not its middle."""
        path = self.folder.path / "parameters.json"
        groups = take_fingerprints(self.built.policy)
        if resumed is None:
            write_json(path, {"groups": [asdict(group) for group in groups]})
            return groups
        began = {row["group"]: row["fingerprint"] for row in json.loads(path.read_text())["groups"]}
        return [type(group)(**{**asdict(group), "fingerprint": began[group.group]}) for group in groups]

    def _restore(self, resumed: Checkpoint | None) -> Progress:
        if resumed is None:
            return Progress()
        state = resumed.training_state()
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        print(f"  resumed at step {resumed.step} of {self.steps}", flush=True)
        return Progress(**state["progress"][self.accelerator.process_index])

    def _validate(self, kind: str, *, step: int, epoch: int, names: Sequence[str]) -> float:
        """Append a record per task to validation.jsonl; returns the mean loss over the tasks seen."""
        policy = self.accelerator.unwrap_model(self.policy)
        records = self.validator.validate_all_tasks(policy, names)
        stage = self.config.stage
        seen = [] if kind == "start" else self._seen
        if self.accelerator.is_main_process:
            for record in records:
                about = {"stage": stage.index, "stage_name": stage.name, "kind": kind, "epoch": epoch, "step": step}
                self.folder.validations.append({**about, "seen": record["task"] in seen, **record})
        return float(np.mean([record["loss"] for record in records if record["task"] in (seen or names)]))

    def _save(self, progress: Progress) -> None:
        per_process = gather_object([asdict(progress)])
        if not self.accelerator.is_main_process:
            return
        self.folder.checkpoints.save(
            progress.step,
            policy=self.accelerator.unwrap_model(self.policy),
            processors=(self.built.preprocessor, self.built.postprocessor),
            training_state={
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
                "progress": per_process,
                "seed": self.config.seed,
            },
            about={
                "run": self.config.run,
                "stage": self.config.stage.folder_name,
                "normalization": self.normalization.hash,
            },
        )
        if progress.best_step is not None:
            self.folder.checkpoints.point("best", progress.best_step)
        self.folder.checkpoints.prune(keep={progress.step, progress.best_step or progress.step})

    def _conclude(self, progress: Progress, before: list[Any]) -> None:
        """The stage's result is its best checkpoint: validate it on all tasks, audit, record."""
        config, folder = self.config, self.folder
        best = folder.checkpoints.at("best")
        policy = self.accelerator.unwrap_model(self.policy)
        if best.step != progress.step:
            load_model(policy, str(best.pretrained_model / "model.safetensors"))
        names = [task.name for task in self.tasks] if config.validation.unseen_tasks else self._seen
        epoch = math.ceil(best.step / self.steps_per_epoch)
        self._validate("end", step=best.step, epoch=epoch, names=names)
        audits = gather_object([asdict(progress)])
        if not self.accelerator.is_main_process:
            return
        write_json(folder.path / "parameters.json", compare_fingerprints(before, take_fingerprints(policy)))
        write_json(folder.path / "replay_audit.json", audit_replay(self.order, config, audits))
        folder.tell(
            status="finished",
            steps=progress.step,
            seconds=round(progress.seconds, 1),
            best={"step": best.step, "loss": progress.best_loss},
            checkpoint=f"checkpoints/{best.folder.name}",
            checkpoint_hash=best.hash,
            finished=_now(),
        )
        write_matrix(config.run_folder)
        print(
            f"finished stage {config.stage.index} ({config.stage.name}): {folder.path / 'checkpoints' / 'best'}",
            flush=True,
        )


def record_missing_data(config: RunConfig, curriculum: Sequence[StageConfig]) -> None:
    """Record the demonstrations of simulated tasks that are not there yet, saying so."""
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
            latest.verify()
            _check_normalization(config, latest)
            return latest
    elif folder.path.exists() and any(folder.path.iterdir()):
        raise ConfigError(f"{folder.path} must be empty to start into; continue with resume=true, or delete it")
    place = [other.name for other in curriculum].index(stage.name)
    if place == 0:
        return None
    previous = curriculum[place - 1]
    before = stage_folder(config, previous)
    if before.status != "finished":
        raise ConfigError(
            f"stage {stage.index} ({stage.name}) must follow a finished stage {previous.index} ({previous.name}), got "
            f"{before.status} in {before.path}; run: python -m kuavo_train task=tasks/task{previous.index}_{previous.name} "
            f"run={config.run}{' resume=true' if before.status != 'absent' else ''}"
        )
    checkpoint = before.checkpoints.at("best")
    checkpoint.verify()
    _check_normalization(config, checkpoint)
    return checkpoint


def _check_normalization(config: RunConfig, checkpoint: Checkpoint) -> None:
    path = config.run_folder / "normalization.json"
    expected = Normalization.load(path).hash if path.is_file() else "none"
    if checkpoint.manifest["normalization"] != expected:
        raise ConfigError(
            f"checkpoint {checkpoint.folder} must have the run's normalization {expected[:12]}… of {path}, got "
            f"{checkpoint.manifest['normalization'][:12]}…; it belongs to another run"
        )


def _open_tasks(config: RunConfig, curriculum: Sequence[StageConfig]) -> list[Task]:
    """All tasks of the curriculum; every problem with any of them is told at once."""
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
    path = config.run_folder / "normalization.json"
    if path.is_file():
        return Normalization.load(path)
    source = config.data.normalization
    if source == "pretrained":
        return _saved(
            normalization_from_checkpoint(Path(str(config.policy["pretrained_path"])), FeatureSpace.of(tasks)), path
        )
    return _saved(fit_normalization(tasks if source == "joint" else tasks[:1], source), path)


def _saved(normalization: Normalization, path: Path) -> Normalization:
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


def _samples_per_step(config: RunConfig, accelerator: Accelerator) -> int:
    return config.training.batch_size * config.training.gradient_accumulation_steps * accelerator.num_processes


def audit_replay(order: SampleOrder, config: RunConfig, progress: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What replay_audit.json holds, counted from the indices really drawn.

    Raises:
        RuntimeError: a task's count is a whole sample or more off its share, or a held-out episode was drawn.
    """
    frames = {
        task.name: sum(part["drawn"].get(place, 0) for part in progress) for place, task in enumerate(order.tasks)
    }
    total = sum(frames.values())
    held_out = {
        task.name: sorted(
            {episode for part in progress for episode in part["drawn_episodes"].get(place, [])}
            & set(task.held_out_episodes)
        )
        for place, task in enumerate(order.tasks)
    }
    for share, (name, count) in zip(order.quota.shares, frames.items(), strict=True):
        if abs(count - share * total) >= 1:
            raise RuntimeError(f"replay share of {name} must be {float(share)}, drawn {count} of {total} samples")
    if any(held_out.values()):
        raise RuntimeError(f"held-out episodes must never be drawn, got {held_out}")
    return {
        "stage": config.stage.index,
        "declared": dict(config.replay),
        "drawn": {name: {"frames": count, "share": count / total} for name, count in frames.items()},
        "total_frames": total,
        "held_out_frames_drawn": 0,
    }


def _write_run_facts(config: RunConfig, tasks: Sequence[Task], normalization: Normalization) -> None:
    """run.json, once; a later stage with other data or another seed belongs to another run."""
    path = config.run_folder / "run.json"
    facts = {
        "run": config.run,
        "seed": config.seed,
        "profile": config.profile,
        "strategy": config.strategy,
        "config_hash": _hash({"policy": config.policy, "tiny_vlm": config.tiny_vlm and asdict(config.tiny_vlm)}),
        "tasks": [
            {
                "name": task.name,
                "index": task.index,
                "instruction": task.instruction,
                "dataset": {
                    "root": str(task.root),
                    "hash": task.content_hash,
                    "episodes": len(task.bounds),
                    "frames": len(task.state),
                    "train_episodes": list(task.train_episodes),
                    "held_out_episodes": list(task.held_out_episodes),
                },
            }
            for task in tasks
        ],
        "normalization": {"source": normalization.source, "hash": normalization.hash},
    }
    if path.is_file():
        stored = json.loads(path.read_text())
        for key in ("seed", "strategy", "config_hash", "normalization"):
            if stored[key] != facts[key]:
                raise ConfigError(
                    f"{key} must stay what run {config.run} began with ({stored[key]}), got {facts[key]}; "
                    "choose another run=NAME"
                )
        known = {task["name"]: task for task in stored["tasks"]}
        for task in facts["tasks"]:
            if task["name"] in known and known[task["name"]]["dataset"]["hash"] != task["dataset"]["hash"]:
                raise ConfigError(
                    f"the dataset of {task['name']} must stay what run {config.run} began with "
                    f"({known[task['name']]['dataset']['hash'][:12]}…), got {task['dataset']['hash'][:12]}… in "
                    f"{task['dataset']['root']}; choose another run=NAME"
                )
        facts = {**stored, "tasks": facts["tasks"]}
    else:
        facts |= {
            "created": _now(),
            "git_commit": _git_commit(),
            "versions": {"python": platform.python_version(), **{name: version(name) for name in VERSIONS_OF}},
        }
    write_json(path, facts)


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


def write_json(path: Path, content: Any) -> None:
    """Write in one move, so that a kill leaves the old file or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=1))
    os.replace(partial, path)


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _git_commit() -> str | None:
    root = Path(__file__).resolve().parents[1]
    found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
    return found.stdout.strip() or None
