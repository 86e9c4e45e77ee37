"""One stage, told as a story: open data → build policy → train → validate → checkpoint.

The first two are opened_stage.py's, files and folders are run_folder.py's, the loop is the trainer's; only this module
knows the whole.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from hashlib import sha256
from itertools import batched
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, gather_object
from tqdm import tqdm

from kuavo_train.config import MergeConfig, RunConfig, StageConfig
from kuavo_train.data import checkpoint_tasks
from kuavo_train.errors import ConfigError, Interrupted, RunError
from kuavo_train.evaluation.environment import evaluation_seeds
from kuavo_train.evaluation.episodes import Rollouts
from kuavo_train.evaluation.rollout import roll_out
from kuavo_train.evaluation.validation import Validator, mean_loss
from kuavo_train.interruption import Listening, listening
from kuavo_train.reporting.run_analysis import analyse, write_matrix
from kuavo_train.runs.files import now, write_json, write_text
from kuavo_train.runs.lease import Lease, NoLease, held
from kuavo_train.runs.records import ClosedLoop, Kind, Moment, ValidationRecord
from kuavo_train.runs.run_facts import write_run_facts
from kuavo_train.runs.run_folder import StageFolder, stage_folder
from kuavo_train.runs.stored_run import StoredRun
from kuavo_train.stage import model_card
from kuavo_train.stage.lineage import checkpoint_to_resume, result_before, stages_before
from kuavo_train.stage.preflight import Findings
from kuavo_train.stage.remedies import told_in_one_line
from kuavo_train.stage.setup import OpenedStage, fresh_memory, open_stage, record_missing_data
from kuavo_train.strategies.ewc import ElasticPenalty, Importance, measure_importance
from kuavo_train.strategies.forgetting_gate import Gate
from kuavo_train.strategies.merging import copy_weights, sweep_merges
from kuavo_train.training.checkpoint import Checkpoint, load_weights
from kuavo_train.training.ema import average_of
from kuavo_train.training.extra_loss import ExtraLoss, NoExtraLoss
from kuavo_train.training.lora import adapted_state, merge_adapters, restore_adapted
from kuavo_train.training.optimizer import build_optimizer, choose_device
from kuavo_train.training.parameter_groups import (
    ParameterGroup,
    compare_fingerprints,
    take_fingerprints,
)
from kuavo_train.training.policy_factory import policy_config_class
from kuavo_train.training.tracking import NoTracker, Tracker, make_tracker
from kuavo_train.training.trainer import Progress, Trainer, Validated, deal_by, step_seed
from kuavo_train.wrapper.policy.smolvla import SmolVLAPolicyWrapper


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
            policy_config_class(config.policy)  # or its mistake would wait for the recording
            record_missing_data(config, curriculum)
            opened = open_stage(config, curriculum, resumed or before, accelerator, findings)
            findings.raise_problems()
        assert opened is not None, "what cannot be opened is a problem"
        Stage(opened, before, listener, lease).run(resumed)
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


class Stage:
    """An opened stage carried out: train, validate, checkpoint, conclude."""

    def __init__(self, opened: OpenedStage, before: Checkpoint | None, listener: Listening, lease: Lease | NoLease):
        """
        Args:
            before: what the stage before ended in; None for the first stage.
        """
        self.opened, self.before, self.listener, self.lease = opened, before, listener, lease
        self.config, self.folder, self.accelerator = opened.config, opened.folder, opened.accelerator
        self.built, self.order, self.timetable = opened.built, opened.order, opened.timetable
        self.progress = Progress()

    def run(self, resumed: Checkpoint | None) -> None:
        """From `resumed`, or from the beginning, to the end."""
        config = self.config
        self.gate, self.extra_loss = self._gate(), self._extra_loss()
        where = f"stage {config.stage.index} ({config.stage.name}) of run {config.run}, in {self.folder.path}"
        self.accelerator.print(f"\n{where}\n{self.opened.table}", flush=True)
        with told_in_one_line(config):
            self._repeatable(self._fill_images)
        state = {} if resumed is None else resumed.training_state()
        self.progress = self._progress(state)
        self._open_folder(resumed)
        with self._true_end():
            self._carry_out(resumed, state)

    def _carry_out(self, resumed: Checkpoint | None, state: dict[str, Any]) -> None:
        config = self.config
        groups = self._fingerprints_before(resumed)
        parameters = self.built.policy.parameters()
        optimizer, self.scheduler = build_optimizer(
            parameters, config.training, steps=self.timetable.planned_steps, planned=self.timetable.planned
        )
        self.policy, self.optimizer = self.accelerator.prepare(self.built.policy, optimizer)
        self.validator = Validator(
            self.opened.dataset(self.opened.tasks),
            self.opened.normalization,
            self.built.preprocessor,
            draws=config.validation.draws,
            batch_size=config.validation.batch_size,
            autocast=self.accelerator.autocast,
            progress=self.accelerator.is_main_process,
        )
        self.average = average_of(self.built.policy, config.training.ema)
        self._restore(state)
        self.tracker = self._tracker()
        try:
            if resumed is None and self.before is None:
                self._validate("start", step=0, epoch=0, names=[task.name for task in self.opened.tasks])
            self._train()
            self._conclude(groups)
        finally:
            self.tracker.finish()

    @contextlib.contextmanager
    def _true_end(self) -> Iterator[None]:
        """However the stage ends, stage.json says how, and what the user can mend is told in a line."""
        try:
            with told_in_one_line(self.config):
                yield
        except (Interrupted, KeyboardInterrupt):
            self._tell_end(status="interrupted")
            raise
        except RunError as error:
            self._tell_end(status="failed", reason=str(error))
            last = self.folder.checkpoints.latest()
            kept = f"the last good checkpoint is {last.folder}" if last else "no checkpoint was written yet"
            raise type(error)(f"{error}; {kept}") from error
        except BaseException as error:
            self._tell_end(status="failed", reason=f"{type(error).__name__}: {error}")
            raise

    def _repeatable[T](self, work: Callable[[], T]) -> T:
        """What `work` gives, which can be done again: a signal to any of the processes raises `Interrupted` in all."""
        done: list[T] = []
        with contextlib.suppress(Interrupted), self.listener.giving_up():
            done.append(work())
        number = self._agreed()
        if number is not None:
            raise Interrupted(number)
        return done[0]

    def _agreed(self) -> int | None:
        """The signal that any process has received: all stop at the same place."""
        number = self.listener.number or 0
        if self.accelerator.num_processes > 1:
            number = max(gather_object([number]))
        return number or None

    def _gate(self) -> Gate:
        learnt, gated = {}, self.config.forgetting.budget is not None
        for stage in stages_before(self.config, self.opened.curriculum) if gated else ():
            lines = map(ValidationRecord.from_json, stage_folder(self.config, stage).validations.read())
            ends = [line for line in lines if line.kind == "end" and line.task == stage.name]
            if not ends:
                raise ConfigError(
                    f"{stage_folder(self.config, stage).path}/validation.jsonl must hold the losses of {stage.name} "
                    "when it was learnt (kind 'end') for the gate; restore it, or set forgetting.budget=null"
                )
            learnt[stage.name] = ends[-1].scores("loss")
        return Gate(learnt, self.config.forgetting)

    def _importance_before(self) -> Importance | None:
        """What elastic weight consolidation kept of the stages before; None for the first stage."""
        if self.config.ewc is None or self.before is None:
            return None
        previous = stage_folder(self.config, stages_before(self.config, self.opened.curriculum)[-1])
        if not previous.importance.is_file():
            raise ConfigError(f"{previous.importance} must be there for ewc; delete {previous.path} to run it again")
        return Importance.load(previous.importance)

    def _extra_loss(self) -> ExtraLoss:
        earlier = self._importance_before()
        if earlier is None or self.config.ewc is None:
            return NoExtraLoss()
        return ElasticPenalty(self.built.policy, earlier, strength=self.config.ewc.strength)

    def _fill_images(self) -> None:
        """Each process computes a share of what is missing."""
        process, processes = self.accelerator.process_index, self.accelerator.num_processes
        self.opened.images.fill(process=process, processes=processes, progress=self.accelerator.is_main_process)

    def _tell_end(self, **values: Any) -> None:
        if self.accelerator.is_main_process:
            self.folder.tell_end(steps=self.progress.step, **values)

    def _open_folder(self, resumed: Checkpoint | None) -> None:
        """Create the stage's files; forget what lies beyond the checkpoint the stage resumes from."""
        config, folder = self.config, self.folder
        if not self.accelerator.is_main_process:
            return
        config.run_folder.mkdir(parents=True, exist_ok=True)
        write_json(config.run_folder / "normalization.json", self.opened.normalization.to_json())
        write_run_facts(config, self.opened.curriculum, self.opened.tasks, self.opened.normalization)
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
        folder.tell(**stage, total_steps=self.timetable.steps, status="running", reason=None, **began)
        folder.answer_for(config)
        (folder.path / "checkpoints").mkdir(exist_ok=True)

    def _fingerprints_before(self, resumed: Checkpoint | None) -> list[ParameterGroup]:
        """Fingerprints when the stage began; a resumed stage compares with its own beginning, not its middle."""
        path = self.folder.path / "parameters.json"
        groups = take_fingerprints(self.built.policy)
        if resumed is None:
            if self.accelerator.is_main_process:
                write_json(path, {"groups": [group.as_begun() for group in groups]})
            return groups
        return [ParameterGroup.when_begun(record) for record in json.loads(path.read_text())["groups"]]

    def _progress(self, state: dict[str, Any]) -> Progress:
        """Where the stage stands; order and timetable as the changes on record, and the processes of now, make them."""
        config = self.config.training
        progress = Progress(**state.get("progress", {}))
        samples = config.batch_size * self.accelerator.num_processes
        before = progress.sizes[-1]["samples"] if progress.sizes else samples
        for change in progress.changes(samples):
            deal_by(
                change,
                self.order,
                self.timetable,
                current=self.config.learns[0],
                batches_per_step=config.gradient_accumulation_steps,
            )
        if state:
            other = "" if samples == before else f", with batches of {samples} samples from here on, {before} before"
            self.accelerator.print(f"  resumed at step {progress.step}{other}", flush=True)
        if not self.accelerator.is_main_process:  # what all have drawn is counted there
            progress = replace(progress, drawn=[{} for _ in progress.drawn], drawn_episodes={})
        return progress

    def _restore(self, state: dict[str, Any]) -> None:
        if state:
            restore_adapted(self.built.policy, state["adapted"])
            self.average.load_state_dict(state.get("average", {}))
            self.optimizer.load_state_dict(state["optimizer"])
            self.scheduler.load_state_dict(state["scheduler"])
        self.recurrence = fresh_memory(self.order, self.built.policy, self.accelerator.gather)
        if state:
            self.recurrence.load_state_dict(state["memory"])
        if self.progress.validation_due and self.accelerator.is_main_process:
            for lines in (self.folder.validations, self.folder.rollouts, self.folder.gate):
                lines.forget(lambda line: line["step"] >= self.progress.step)

    def _tracker(self) -> Tracker:
        """One run per stage, named by when the run was created: a resumed stage goes on with it."""
        if not self.accelerator.is_main_process:
            return NoTracker()
        created = json.loads((self.config.run_folder / "run.json").read_text())["created"]
        about = f"{created}/{self.config.run}/{self.config.stage.folder_name}"
        return make_tracker(self.config, run_id=sha256(about.encode()).hexdigest()[:16], folder=self.folder.path)

    def _train(self) -> None:
        config = self.config

        def log(values: dict[str, Any], step: int) -> None:
            if self.accelerator.is_main_process:
                self.folder.metrics.append({"step": step, **values})
                self.tracker.log({key: value for key, value in values.items() if isinstance(value, int | float)}, step)

        trainer = Trainer(
            accelerator=self.accelerator,
            policy=self.policy,
            preprocessor=self.built.preprocessor,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            dataset=self.opened.dataset(self.order.tasks),
            order=self.order,
            recurrence=self.recurrence,
            extra_loss=self.extra_loss,
            average=self.average,
            augment=self.opened.augment,
            config=config.training,
            timetable=self.timetable,
            current=config.learns[0],
            validate_every=config.validation.every_epochs,
            result=config.validation.result,
            num_workers=config.data.num_workers,
            log=log,
            validate=self._validate_epoch,
            save=self._save,
            stop_signal=self._agreed,
            description=config.stage.folder_name,
        )
        trainer.run(self.progress)

    def _validate_epoch(self, step: int, epoch: int) -> Validated:
        """All tasks seen; then the gate."""
        with self.average.applied():
            records = self._validate("epoch", step=step, epoch=epoch, names=self.opened.seen)
        readings = self.gate.read({record.task: record.scores("loss") for record in records})
        over = step == self.timetable.steps
        action = self.gate.act(readings, shares=self.order.shares, new=self.config.learns[0], over=over)
        action = gather_object([action])[0]  # every process does what the first one decides
        if self.accelerator.is_main_process:
            about = {"stage": self.config.stage.index, "epoch": epoch, "step": step}
            for reading in readings:
                taken = {"action": action.name, "shares": action.shares} if reading.exceeded else {"action": None}
                self.folder.gate.append({**about, **reading.record(), **taken})
                self.tracker.log({f"gate/{reading.task}/change": reading.change.estimate}, step)
            if action.name is not None:
                tqdm.write(f"forgetting at step {step}: {action.reason} → {action.name}")
        return Validated(mean_loss(record.held_out for record in records), stop=action.stop, shares=action.shares)

    def _validate(self, kind: Kind, *, step: int, epoch: int, names: Sequence[str]) -> list[ValidationRecord]:
        """A record per task, also appended to validation.jsonl."""
        policy = self.accelerator.unwrap_model(self.policy)
        found = self._repeatable(lambda: self.validator.validate_all_tasks(policy, names))
        seen = [] if kind == "start" else self.opened.seen
        moment = Moment(kind, step, self.config.stage.index, self.config.stage.name, epoch)
        every = self.config.rollout.every_epochs
        closed_loops: dict[str, ClosedLoop | None] = {}
        if kind == "end" or (kind == "epoch" and every is not None and epoch % every == 0):
            closed_loops = self._roll_out([scores.task for scores in found], moment)
        records = [
            ValidationRecord(moment, scores.task in seen, scores, closed_loops.get(scores.task)) for scores in found
        ]
        if self.accelerator.is_main_process:
            for record in records:
                self.folder.validations.append(record.to_json())
                self.tracker.log(record.curves(), step)
        return records

    def _roll_out(self, names: Sequence[str], moment: Moment) -> dict[str, ClosedLoop | None]:
        """How the tasks of `names` that were seen go in closed loop; the episodes go to rollouts.jsonl.

        Each process plays a share of the episodes.
        """
        config = self.config.rollout
        if config.episodes == 0:
            return {}
        policy = self.accelerator.unwrap_model(self.policy)
        was_training = policy.training
        robot = SmolVLAPolicyWrapper(policy, self.opened.processors, self.opened.known_tasks, seed=self.config.seed)
        seeds = evaluation_seeds(config.episodes, seed=config.seed)
        process, processes = self.accelerator.process_index, self.accelerator.num_processes
        closed_loops = {}
        for name in names:
            environment = self.opened.environments.get(name)
            if environment is None:  # not seen yet
                continue
            share = seeds[process::processes]
            play = partial(
                roll_out,
                robot,
                environment,
                share,
                parallel=config.parallel,
                workers=config.workers,
                progress=self.accelerator.is_main_process,
            )
            mine = self._repeatable(play)
            rollouts = Rollouts.joined(gather_object([mine]))
            if self.accelerator.is_main_process:
                self.folder.rollouts.append({**moment.to_json(), "task": name, **rollouts.to_json()})
                tqdm.write(f"{name}: {rollouts.summary}")
            closed_loops[name] = rollouts.closed_loop()
        policy.reset()
        policy.train(was_training)
        return closed_loops

    def _save(self, progress: Progress) -> None:
        of_all = progress.joined(gather_object([progress])[1:])
        if not self.accelerator.is_main_process:
            return
        self.lease.confirm()
        checkpoints = self.folder.checkpoints
        training_state = {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "adapted": adapted_state(self.built.policy),
            "average": self.average.state_dict(),
            "progress": asdict(of_all),
            "memory": self.recurrence.state_dict(),
        }
        with self.average.applied():
            checkpoints.save(
                progress.step,
                policy=self.accelerator.unwrap_model(self.policy),
                processors=self.opened.processors,
                documents=self._documents,
                training_state=training_state,
                about=self._about,
            )
        if progress.best_step is not None:
            checkpoints.point("best", progress.best_step)
        checkpoints.prune(keep={progress.step, progress.best_step or progress.step})
        self.folder.tell(total_steps=self.timetable.steps)

    @property
    def _documents(self) -> dict[str, str]:
        """Files beside the weights: what a robot must know of the tasks learnt by now."""
        return {checkpoint_tasks.FILE_NAME: self.opened.known_tasks.to_json()}

    @property
    def _about(self) -> dict[str, Any]:
        """What a checkpoint's manifest says of where it comes from."""
        return {
            "run": self.config.run,
            "stage": self.config.stage.folder_name,
            "seed": self.config.seed,
            "normalization": self.opened.normalization.hash,
            "samples": self.config.training.batch_size * self.accelerator.num_processes,  # of a batch
        }

    def _conclude(self, groups_before: Sequence[ParameterGroup]) -> None:
        """The stage's result is its best checkpoint, or what merging makes of it: validate it, audit, record."""
        config, folder, progress = self.config, self.folder, self.progress
        self.accelerator.wait_for_everyone()
        policy = self.accelerator.unwrap_model(self.policy)
        self.average.keep()
        groups = compare_fingerprints(groups_before, take_fingerprints(policy))
        merge_adapters(policy)
        best = folder.checkpoints.at("best" if progress.best_step is None else progress.best_step)
        if best.step != progress.step:
            load_weights(policy, best)
        result, loss = best, progress.best_loss
        if config.merge is not None and self.before is not None:
            result, loss = self._merge(policy, self.before, best, config.merge)
        names = [task.name for task in self.opened.tasks] if config.validation.unseen_tasks else self.opened.seen
        epoch = self.timetable.number(best.step)
        records = self._validate("end", step=best.step, epoch=epoch, names=names)
        drawn = gather_object([(progress.drawn, progress.drawn_episodes)])
        measured = self._repeatable(lambda: self._importance(policy))
        if not self.accelerator.is_main_process:
            return
        if measured is not None:
            measured.after(self._importance_before()).save(folder.importance)
        write_json(folder.path / "parameters.json", groups)
        audit = self.order.audit(
            [frames for frames, _ in drawn],
            [episodes for _, episodes in drawn],
            batches_per_step=config.training.gradient_accumulation_steps,
        )
        write_json(folder.path / "replay_audit.json", {"stage": config.stage.index, **audit})
        card = model_card.model_card(config, self.opened.learnt, self.order.shares, records, steps=progress.step)
        write_text(result.pretrained_model / model_card.FILE_NAME, card)
        folder.checkpoints.point("best", result.folder.name)  # a copy of it, where there are no links, has the card too
        folder.tell(
            status="finished",
            steps=progress.step,
            seconds=round(progress.seconds, 1),
            best={"step": best.step, "loss": loss},
            checkpoint=f"checkpoints/{result.folder.name}",
            checkpoint_hash=result.hash,
            finished=now(),
            **({"stopped": progress.stopped} if progress.stopped else {}),
        )
        write_matrix(analyse(StoredRun.open(config.run_folder), limits=config.forgetting.limits))
        print(f"finished stage {config.stage.index} ({config.stage.name}): {folder.path / 'checkpoints' / 'best'}")

    def _merge(self, policy: Any, before: Checkpoint, best: Checkpoint, merge: MergeConfig) -> tuple[Checkpoint, float]:
        """Leave `policy` at the best point between its weights before the stage and after; save that as the result."""
        new = copy_weights(policy)
        load_weights(policy, before)
        old = copy_weights(policy)
        load_weights(policy, best)

        def validate() -> dict[str, float]:
            found = self._repeatable(lambda: self.validator.validate_all_tasks(policy, self.opened.seen))
            return {scores.task: scores.loss for scores in found}

        sweep = sweep_merges(policy, old, new, merge.alphas, validate)
        name = f"merged-{sweep['chosen']:g}"
        if self.accelerator.is_main_process:
            write_json(self.folder.path / "merge.json", sweep)
            self.folder.checkpoints.save_weights(
                name,
                step=best.step,
                policy=policy,
                processors=self.opened.processors,
                documents=self._documents,
                about={**self._about, "merged": {"alpha": sweep["chosen"], "old": before.hash, "new": best.hash}},
            )
            self.folder.checkpoints.point("best", name)
            tqdm.write(f"merged with alpha {sweep['chosen']:g}: mean held-out loss {sweep['loss']:.4f}")
        self.accelerator.wait_for_everyone()
        return self.folder.checkpoints.at(name), sweep["loss"]

    def _importance(self, policy: Any) -> Importance | None:
        """Measured on the first batches of the stage, clip by clip, by the first process; None without ewc."""
        ewc = self.config.ewc
        if ewc is None or not self.accelerator.is_main_process:
            return None
        order, dataset = self.order, self.opened.dataset(self.order.tasks)
        clips = (
            dataset.__getitems__(draws)
            for number in range(ewc.batches)
            for process in range(order.processes)
            for draws in batched(order.batch(number, process=process), order.clip)
        )
        return measure_importance(
            policy,
            tqdm(clips, "importance", order.turn(ewc.batches), leave=False, unit="clip"),
            preprocessor=self.built.preprocessor,
            recurrence=fresh_memory(order, policy),
            autocast=self.accelerator.autocast,
            seed=step_seed(order.seed, order.stage),
        )
