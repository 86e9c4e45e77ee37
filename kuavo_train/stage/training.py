"""A stage's training: the trainer, and what a stage does between its steps."""

from dataclasses import dataclass

from accelerate.utils import gather_object
from tqdm import tqdm

from kuavo_train.evaluation.validation import mean_loss
from kuavo_train.reading import Json
from kuavo_train.stage.parts import Stage
from kuavo_train.stage.setup import OpenedStage
from kuavo_train.stage.stage_files import forget_unfinished_validation
from kuavo_train.training.trainer import Decision, Limits, Progress, Trainer, TrainerHooks


def train(stage: Stage) -> None:
    """To the end of the timetable, or to where a validation asks to stop; a new run is measured before its first step.

    Raises:
        Interrupted: a signal arrived; a checkpoint is written first.
        TrainingDiverged: loss or gradient not finite.
        ConfigError: the disk does not take the embeddings that are computed along.
    """
    opened = stage.opened
    if opened.start.weights is None:
        stage.validation.validate("start", step=0, epoch=0, names=[task.name for task in opened.tasks])
    forget_unfinished_validation(opened, stage.progress)
    name = opened.config.stage.folder_name
    try:
        Trainer(stage.learner, stage.batches, _limits(opened), StageHooks(stage), description=name).run(stage.progress)
    finally:
        opened.images.wait()


def _limits(opened: OpenedStage) -> Limits:
    config = opened.config
    return Limits(
        opened.timetable,
        validate_every=config.validation.every_epochs,
        log_every=config.training.log_every,
        save_every=config.training.save_every,
        result=config.validation.result,
    )


@dataclass
class StageHooks(TrainerHooks):
    """What a stage does between the steps: report, validate and decide, save, heed signals."""

    stage: Stage

    def report(self, values: Json, step: int) -> None:
        if self.stage.view.is_main:
            self.stage.opened.folder.metrics.append({"step": step, **values})
            self.stage.view.report(
                {key: value for key, value in values.items() if isinstance(value, int | float)}, step
            )

    def epoch_done(self, step: int, epoch: int) -> Decision:
        """All tasks seen are validated; the strategy decides what follows."""
        with self.stage.learner.average.applied():
            records = self.stage.validation.validate("epoch", step=step, epoch=epoch, names=self.stage.opened.seen)
        action = self.stage.opened.strategy.decide(
            self.stage.view,
            {record.task: record.scores("loss") for record in records},
            step=step,
            epoch=epoch,
            over=step == self.stage.opened.timetable.steps,
        )
        action = gather_object([action])[0]  # every process does what the first one decides
        if self.stage.view.is_main and action.name is not None:
            tqdm.write(f"forgetting at step {step}: {action.reason} → {action.name}")
        return Decision(mean_loss(record.held_out for record in records), stop=action.stop, shares=action.shares)

    def save(self, progress: Progress) -> None:
        self.stage.checkpoints.save(progress)

    def stop_signal(self) -> int | None:
        return self.stage.validation.agreement.signal()
