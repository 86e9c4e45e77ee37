"""What a stage saves: its policy, with all that a robot and a resumed training need of it."""

from dataclasses import asdict, dataclass

from accelerate.utils import gather_object

from kuavo_train.data import checkpoint_tasks
from kuavo_train.reading import Json
from kuavo_train.runs.lease import Lease, NoLease
from kuavo_train.stage.lineage import samples_of_batch
from kuavo_train.stage.setup import OpenedStage
from kuavo_train.training.checkpoint import Checkpoint, Contents
from kuavo_train.training.learner import Learner
from kuavo_train.training.trainer import Progress


@dataclass(frozen=True)
class StageCheckpoints:
    """All processes call it, the first one writes.

    Attributes:
        lease: on the stage's folder, confirmed before every checkpoint.
    """

    opened: OpenedStage
    learner: Learner
    lease: Lease | NoLease

    def save(self, progress: Progress) -> None:
        """A checkpoint that training resumes from. No process ends before it is written."""
        of_all = progress.joined(gather_object([progress])[1:])
        if self.opened.accelerator.is_main_process:
            self._save(progress, of_all)
        self.opened.accelerator.wait_for_everyone()

    def _save(self, progress: Progress, of_all: Progress) -> None:
        opened = self.opened
        self.lease.confirm()
        checkpoints = opened.folder.checkpoints
        training_state = {**self.learner.state_dict(), "progress": asdict(of_all)}
        with self.learner.average.applied():
            checkpoints.save(progress.step, self._contents({}), training_state)
        if progress.best_step is not None:
            checkpoints.point("best", progress.best_step)
        checkpoints.prune(keep={progress.step, progress.best_step or progress.step})
        opened.folder.write(total_steps=opened.timetable.steps)

    def save_result(self, name: str, about: Json, step: int) -> Checkpoint:
        """The policy as it stands, under a name, and as `best` from here on; nothing resumes from it."""
        checkpoints = self.opened.folder.checkpoints
        if self.opened.accelerator.is_main_process:
            checkpoints.save_weights(name, step, self._contents(about))
            checkpoints.point("best", name)
        self.opened.accelerator.wait_for_everyone()
        return checkpoints.at(name)

    def _contents(self, about: Json) -> Contents:
        """Policy, processors, what a robot must know, and where it comes from."""
        opened, config = self.opened, self.opened.config
        return Contents(
            policy=self.learner.bare_policy,
            processors=opened.processors,
            documents={checkpoint_tasks.FILE_NAME: opened.known_tasks.to_json()},
            about={
                "run": config.run,
                "stage": config.stage.folder_name,
                "seed": config.seed,
                "normalization": opened.normalization.hash,
                "samples": samples_of_batch(config),
                **about,
            },
        )
