"""One stage, told as a story: open data → build policy → train → validate → checkpoint → conclude.

The first two are setup.py's, the loop is the trainer's, the end is conclusion.py's; only this module knows the whole.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import batched
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, gather_object
from torch import Tensor
from tqdm import tqdm

from kuavo_train.config import RunConfig, StageConfig
from kuavo_train.data.batch import Batch, preprocess
from kuavo_train.data.mixture import mixture_of
from kuavo_train.errors import Interrupted, RunError
from kuavo_train.evaluation.validation import mean_loss
from kuavo_train.interruption import Listening, listening
from kuavo_train.reading import read_json
from kuavo_train.runs.files import now, write_json
from kuavo_train.runs.lease import Lease, NoLease, held
from kuavo_train.runs.run_facts import write_run_facts
from kuavo_train.runs.run_folder import StageFolder, stage_folder
from kuavo_train.stage.agreement import Agreement
from kuavo_train.stage.conclusion import conclude
from kuavo_train.stage.lineage import checkpoint_to_resume, result_before
from kuavo_train.stage.preflight import Findings
from kuavo_train.stage.remedies import told_in_one_line
from kuavo_train.stage.setup import OpenedStage, fresh_memory, open_stage, record_missing_data
from kuavo_train.stage.stage_checkpoints import StageCheckpoints
from kuavo_train.stage.stage_validation import StageValidation
from kuavo_train.strategies.chosen import chosen_strategy
from kuavo_train.strategies.strategy import StageView
from kuavo_train.training.checkpoint import Checkpoint
from kuavo_train.training.learner import Learner
from kuavo_train.training.optimizer import choose_device
from kuavo_train.training.parameter_groups import ParameterGroup, take_fingerprints
from kuavo_train.training.policy_factory import policy_config_class
from kuavo_train.training.tracking import NoTracker, Tracker, make_tracker
from kuavo_train.training.trainer import Batches, Decision, Limits, Progress, Trainer, TrainerHooks


def run_stage(config: RunConfig, curriculum: Sequence[StageConfig]) -> int:
    """Run the stage of `config` within its curriculum; returns the exit status (130, 143 or 138 when interrupted).

    Raises:
        ConfigError: before training; nothing is written that a later run would stumble over.
        RunError: something the user can mend, or TrainingDiverged: loss or gradient not finite. The last good
            checkpoint is kept.
    """
    accelerator = _accelerator(config)
    with listening() as listener:
        try:
            _run_stage(config, curriculum, accelerator, listener)
        except Interrupted as interrupted:
            accelerator.print(f"interrupted: {_kept(stage_folder(config))}", flush=True)
            return interrupted.exit_status
    return 0


def _run_stage(
    config: RunConfig, curriculum: Sequence[StageConfig], accelerator: Accelerator, listener: Listening
) -> None:
    findings = Findings()
    with contextlib.ExitStack() as owned:
        with told_in_one_line(config), listener.giving_up(), accelerator.main_process_first():
            # What the first process records and caches, the others find.
            lease = owned.enter_context(_owning(config, accelerator))
            resumed = checkpoint_to_resume(config, curriculum)
            before = result_before(config, curriculum)
            policy_config_class(config.policy)  # or its mistake would wait for the recording, as the next one's
            chosen_strategy(config)
            record_missing_data(config, curriculum)
            opened = open_stage(config, curriculum, resumed or before, accelerator, findings)
            findings.raise_problems()
        assert opened is not None, "what cannot be opened is a problem"
        _carry_out(opened, before, resumed, Agreement(listener, accelerator), lease)
    if listener.number is not None:  # in the midst of the last files: the stage is whole, but no other begins
        raise Interrupted(listener.number)


def _owning(config: RunConfig, accelerator: Accelerator) -> contextlib.AbstractContextManager[Lease | NoLease]:
    """The stage's folder is held by the first of this run's processes. Raises `ConfigError` where another has it."""
    if not accelerator.is_main_process:
        return contextlib.nullcontext(NoLease())
    stage = config.stage
    return held(stage_folder(config).path, f"stage {stage.index} ({stage.name}) of run {config.run}")


def _kept(folder: StageFolder) -> str:
    if folder.status == "absent":
        return "nothing was trained yet; the same command begins again"
    last = folder.checkpoints.latest()
    kept = f"the checkpoint of step {last.step} is in {last.folder}" if last else "nothing was trained yet"
    return f"{kept}; continue with resume=true"


def examine_stage(config: RunConfig, curriculum: Sequence[StageConfig]) -> Findings:
    """What `run_stage` would begin with, without recording, training or writing into the run's folder."""
    findings = Findings()
    attempt = findings.problems.attempt
    accelerator = attempt(_accelerator, config) or Accelerator(cpu=True)
    resumed = attempt(checkpoint_to_resume, config, curriculum)
    before = attempt(result_before, config, curriculum)
    open_stage(config, curriculum, resumed or before, accelerator, findings)
    return findings


def _accelerator(config: RunConfig) -> Accelerator:
    """Raises `ConfigError` when the device is not there."""
    return Accelerator(
        mixed_precision=config.training.mixed_precision,
        cpu=choose_device(config.training.device).type == "cpu",
        # Parameters that one batch does not reach (the write path at depth 1) must not stall several processes.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )


def _carry_out(
    opened: OpenedStage,
    before: Checkpoint | None,
    resumed: Checkpoint | None,
    agreement: Agreement,
    lease: Lease | NoLease,
) -> None:
    """The opened stage, from `resumed` or from its beginning, to its end.

    Args:
        before: what the stage before ended in; None for the first stage.
    """
    config, accelerator = opened.config, opened.accelerator
    where = f"stage {config.stage.index} ({config.stage.name}) of run {config.run}, in {opened.folder.path}"
    accelerator.print(f"\n{where}\n{opened.table}", flush=True)
    with told_in_one_line(config):
        agreement.repeatable(lambda: _fill_images(opened))
    state = {} if resumed is None else resumed.training_state()
    batches, progress = _batches(opened), Progress(**state.get("progress", {}))
    progress = _deal_as_before(opened, batches, progress)
    _open_folder(opened, resumed)
    with _true_end(opened, progress):
        groups = _fingerprints_before(opened, resumed)
        learner = _learner(opened, state)
        with _tracker(opened) as tracker:
            validation = StageValidation(opened, learner.bare_policy, agreement, tracker)
            checkpoints = StageCheckpoints(opened, learner, lease)
            view = _view(opened, before, learner, validation, checkpoints)
            learner.extra_loss = opened.strategy.extra_loss(view)
            if resumed is None and before is None:
                validation.validate("start", step=0, epoch=0, names=[task.name for task in opened.tasks])
            _forget_unfinished_validation(opened, progress)
            hooks = StageHooks(opened, learner, validation, checkpoints, view)
            Trainer(learner, batches, _limits(opened), hooks, description=config.stage.folder_name).run(progress)
            conclude(opened, learner, progress, validation=validation, view=view, groups_before=groups)


@dataclass
class StageHooks(TrainerHooks):
    """What a stage does between the steps: report, validate and decide, save, heed signals."""

    opened: OpenedStage
    learner: Learner
    validation: StageValidation
    checkpoints: StageCheckpoints
    view: StageView

    def report(self, values: dict[str, Any], step: int) -> None:
        if self.view.is_main:
            self.opened.folder.metrics.append({"step": step, **values})
            self.view.report({key: value for key, value in values.items() if isinstance(value, int | float)}, step)

    def epoch_done(self, step: int, epoch: int) -> Decision:
        """All tasks seen are validated; the strategy decides what follows."""
        with self.learner.average.applied():
            records = self.validation.validate("epoch", step=step, epoch=epoch, names=self.opened.seen)
        action = self.opened.strategy.decide(
            self.view,
            {record.task: record.scores("loss") for record in records},
            step=step,
            epoch=epoch,
            over=step == self.opened.timetable.steps,
        )
        action = gather_object([action])[0]  # every process does what the first one decides
        if self.view.is_main and action.name is not None:
            tqdm.write(f"forgetting at step {step}: {action.reason} → {action.name}")
        return Decision(mean_loss(record.held_out for record in records), stop=action.stop, shares=action.shares)

    def save(self, progress: Progress) -> None:
        self.checkpoints.save(progress)

    def stop_signal(self) -> int | None:
        return self.validation.agreement.signal()


def _fill_images(opened: OpenedStage) -> None:
    """Each process computes a share of what is missing."""
    accelerator = opened.accelerator
    process, processes = accelerator.process_index, accelerator.num_processes
    opened.images.fill(process=process, processes=processes, progress=accelerator.is_main_process)


def _batches(opened: OpenedStage) -> Batches:
    config = opened.config
    return Batches(
        opened.dataset(opened.order.tasks),
        opened.order,
        current=mixture_of(config).leading,
        per_step=config.training.gradient_accumulation_steps,
        num_workers=config.data.num_workers,
    )


def _limits(opened: OpenedStage) -> Limits:
    config = opened.config
    return Limits(
        opened.timetable,
        validate_every=config.validation.every_epochs,
        log_every=config.training.log_every,
        save_every=config.training.save_every,
        result=config.validation.result,
    )


def _deal_as_before(opened: OpenedStage, batches: Batches, progress: Progress) -> Progress:
    """Order and timetable as the changes on record, and the processes of now, make them; what this process counts."""
    samples = opened.config.training.batch_size * opened.accelerator.num_processes
    before = progress.sizes[-1]["samples"] if progress.sizes else samples
    for change in progress.changes(samples):
        batches.change(change, opened.timetable)
    if progress.step:
        other = "" if samples == before else f", with batches of {samples} samples from here on, {before} before"
        opened.accelerator.print(f"  resumed at step {progress.step}{other}", flush=True)
    if opened.accelerator.is_main_process:  # what all have drawn is counted there
        return progress
    return replace(progress, drawn=[{} for _ in progress.drawn], drawn_episodes={})


def _open_folder(opened: OpenedStage, resumed: Checkpoint | None) -> None:
    """Create the stage's files; forget what lies beyond the checkpoint the stage resumes from."""
    config, folder = opened.config, opened.folder
    if not opened.accelerator.is_main_process:
        return
    config.run_folder.mkdir(parents=True, exist_ok=True)
    write_json(config.run_folder / "normalization.json", opened.normalization.to_json())
    write_run_facts(config, opened.curriculum, opened.tasks, opened.normalization)
    folder.path.mkdir(parents=True, exist_ok=True)
    step = resumed.step if resumed else -1
    for lines in (folder.metrics, folder.validations, folder.rollouts, folder.gate):
        lines.forget(lambda line: line["step"] > step or line.get("kind") == "end")
    began = {} if resumed else {"started": now()}
    stage = {
        "name": config.stage.name,
        "index": config.stage.index,
        "epochs": config.training.epochs,
        "result": config.validation.result,
    }
    folder.tell(**stage, total_steps=opened.timetable.steps, status="running", reason=None, **began)
    folder.answer_for(config)
    (folder.path / "checkpoints").mkdir(exist_ok=True)


@contextlib.contextmanager
def _true_end(opened: OpenedStage, progress: Progress) -> Iterator[None]:
    """However the stage ends, stage.json says how, and what the user can mend is told in a line."""
    folder = opened.folder

    def tell(**values: Any) -> None:
        if opened.accelerator.is_main_process:
            folder.tell_end(steps=progress.step, **values)

    try:
        with told_in_one_line(opened.config):
            yield
    except (Interrupted, KeyboardInterrupt):
        tell(status="interrupted")
        raise
    except RunError as error:
        tell(status="failed", reason=str(error))
        last = folder.checkpoints.latest()
        kept = f"the last good checkpoint is {last.folder}" if last else "no checkpoint was written yet"
        raise type(error)(f"{error}; {kept}") from error
    except BaseException as error:
        tell(status="failed", reason=f"{type(error).__name__}: {error}")
        raise


def _fingerprints_before(opened: OpenedStage, resumed: Checkpoint | None) -> list[ParameterGroup]:
    """Fingerprints when the stage began; a resumed stage compares with its own beginning, not its middle."""
    path = opened.folder.path / "parameters.json"
    groups = take_fingerprints(opened.built.policy)
    if resumed is not None:
        return [ParameterGroup.when_begun(record) for record in read_json(path, keys=("groups",))["groups"]]
    if opened.accelerator.is_main_process:
        write_json(path, {"groups": [group.as_begun() for group in groups]})
    return groups


def _learner(opened: OpenedStage, state: Mapping[str, Any]) -> Learner:
    """With the state of the checkpoint that the stage resumes from, where it does."""
    learner = Learner.of(
        opened.built.policy,
        opened.built.preprocessor,
        opened.config.training,
        accelerator=opened.accelerator,
        steps=opened.timetable.planned_steps,
        planned=opened.timetable.planned,
        recurrence=fresh_memory(opened.order, opened.built.policy, opened.accelerator.gather),
        augment=opened.augment,
    )
    if state:
        learner.load_state_dict(state)
    return learner


def _forget_unfinished_validation(opened: OpenedStage, progress: Progress) -> None:
    """What of it was written is measured again."""
    if progress.validation_due and opened.accelerator.is_main_process:
        for lines in (opened.folder.validations, opened.folder.rollouts, opened.folder.gate):
            lines.forget(lambda line: line["step"] >= progress.step)


@contextlib.contextmanager
def _tracker(opened: OpenedStage) -> Iterator[Tracker]:
    """One run per stage, named by when the run was created: a resumed stage goes on with it."""
    config = opened.config
    tracker: Tracker = NoTracker()
    if opened.accelerator.is_main_process:
        created = read_json(config.run_folder / "run.json", keys=("created",))["created"]
        about = f"{created}/{config.run}/{config.stage.folder_name}"
        tracker = make_tracker(config, run_id=sha256(about.encode()).hexdigest()[:16], folder=opened.folder.path)
    try:
        yield tracker
    finally:
        tracker.finish()


def _view(
    opened: OpenedStage,
    before: Checkpoint | None,
    learner: Learner,
    validation: StageValidation,
    checkpoints: StageCheckpoints,
) -> StageView:
    """The stage as its strategy sees it."""
    order, dataset = opened.order, opened.dataset(opened.order.tasks)

    def first_clips(batches: int) -> Iterator[Batch]:
        for number in range(batches):
            for process in range(order.processes):
                for draws in batched(order.batch(number, process=process), order.clip):
                    yield dataset.fetch(draws, clip=order.clip)

    def new_forward() -> Callable[[Batch], Tensor]:
        policy, recurrence = learner.bare_policy, fresh_memory(order, learner.bare_policy)

        def forward(clip: Batch) -> Tensor:
            prepared = preprocess(clip, learner.preprocessor, opened.accelerator.device)
            with opened.accelerator.autocast():
                loss, outputs = policy(prepared, **recurrence.before(clip))
            recurrence.after(clip, outputs)
            return loss

        return forward

    return StageView(
        config=opened.config,
        policy=learner.bare_policy,
        folder=opened.folder,
        earlier=opened.earlier,
        before=before,
        is_main=opened.accelerator.is_main_process,
        shares=lambda: order.shares,
        first_clips=first_clips,
        new_forward=new_forward,
        losses=validation.losses,
        save_result=checkpoints.save_result,
        repeatable=validation.agreement.repeatable,
        report=validation.tracker.log,
    )
