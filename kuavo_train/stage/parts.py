"""A stage put together: the learner, its samples, what is measured and saved, and what a strategy sees of it."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

from kuavo_train.data.mixture import mixture_of
from kuavo_train.runs.lease import Lease, NoLease
from kuavo_train.stage.agreement import Agreement
from kuavo_train.stage.lineage import samples_of_batch
from kuavo_train.stage.setup import OpenedStage, fresh_memory
from kuavo_train.stage.stage_checkpoints import StageCheckpoints
from kuavo_train.stage.stage_files import fingerprints_before, open_folder, tracker_of, true_end
from kuavo_train.stage.stage_validation import StageValidation
from kuavo_train.stage.stage_view import view_of
from kuavo_train.strategies.strategy import StageView
from kuavo_train.training.learner import Learner
from kuavo_train.training.parameter_groups import ParameterGroup
from kuavo_train.training.state import State
from kuavo_train.training.trainer import Batches, Progress


@dataclass(frozen=True)
class Stage:
    """
    Attributes:
        progress: where the stage stands; training moves it on.
        groups_before: fingerprints of the parameters when the stage began.
    """

    opened: OpenedStage
    batches: Batches
    progress: Progress
    groups_before: list[ParameterGroup]
    learner: Learner
    validation: StageValidation
    checkpoints: StageCheckpoints
    view: StageView


@contextlib.contextmanager
def begin(opened: OpenedStage, agreement: Agreement, lease: Lease | NoLease) -> Iterator[Stage]:
    """The opened stage, at its beginning or where it was left. However it ends, its files say how."""
    resumed = opened.start.resumed
    state: State = {} if resumed is None else resumed.training_state()
    batches = _batches(opened)
    progress = _deal_as_before(opened, batches, Progress(**state.get("progress", {})))
    open_folder(opened)
    with true_end(opened, progress):
        groups_before = fingerprints_before(opened)
        learner = _learner(opened, state)
        with tracker_of(opened) as tracker:
            validation = StageValidation(opened, learner.bare_policy, agreement, tracker)
            checkpoints = StageCheckpoints(opened, learner, lease)
            view = view_of(opened, learner, validation, checkpoints)
            learner.extra_loss = opened.strategy.extra_loss(view)
            learner.extra_loss.load_state_dict(state.get("extra_loss", {}))
            yield Stage(opened, batches, progress, groups_before, learner, validation, checkpoints, view)


def _batches(opened: OpenedStage) -> Batches:
    config = opened.config
    return Batches(
        opened.dataset(opened.order.tasks),
        opened.order,
        current=mixture_of(config).leading,
        per_step=config.training.gradient_accumulation_steps,
        num_workers=config.data.num_workers,
    )


def _deal_as_before(opened: OpenedStage, batches: Batches, progress: Progress) -> Progress:
    """Order and timetable as the changes on record, and the processes of now, make them; what this process counts."""
    samples = samples_of_batch(opened.config)
    before = progress.sizes[-1]["samples"] if progress.sizes else samples
    for change in progress.changes(samples):
        batches.change(change, opened.timetable)
    if progress.step:
        other = "" if samples == before else f", with batches of {samples} samples from here on, {before} before"
        opened.accelerator.print(f"  resumed at step {progress.step}{other}", flush=True)
    if opened.accelerator.is_main_process:  # what all have drawn is counted there
        return progress
    return replace(progress, drawn=[{} for _ in progress.drawn], drawn_episodes={}, not_kept={})


def _learner(opened: OpenedStage, state: State) -> Learner:
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
