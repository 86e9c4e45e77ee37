"""What a stage measures of its policy: held-out losses of every task, and success in closed loop."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from accelerate.utils import gather_object
from lerobot.policies.pretrained import PreTrainedPolicy
from tqdm import tqdm

from kuavo_train.data.task import Task
from kuavo_train.evaluation.environment import evaluation_seeds
from kuavo_train.evaluation.episodes import Rollouts
from kuavo_train.evaluation.replays import keep
from kuavo_train.evaluation.rollout import roll_out
from kuavo_train.evaluation.validation import Validator
from kuavo_train.runs.records import ClosedLoop, HeldOutScores, Kind, Moment, ValidationRecord
from kuavo_train.stage.agreement import Agreement
from kuavo_train.stage.setup import OpenedStage
from kuavo_train.training.tracking import Tracker
from kuavo_train.wrapper.policy.smolvla import SmolVLAPolicyWrapper


@dataclass
class StageValidation:
    """Of a policy as it stands; every record also goes to validation.jsonl, every episode to rollouts.jsonl."""

    opened: OpenedStage
    policy: PreTrainedPolicy
    agreement: Agreement
    tracker: Tracker

    def __post_init__(self) -> None:
        opened, config = self.opened, self.opened.config
        self.validator = Validator(
            opened.dataset(opened.tasks),
            opened.normalization,
            opened.built.preprocessor,
            draws=config.validation.draws,
            batch_size=config.validation.batch_size,
            autocast=opened.accelerator.autocast,
            progress=opened.accelerator.is_main_process,
        )

    def losses(self) -> dict[str, float]:
        """Task → held-out loss, over all tasks seen; written nowhere."""
        return {scores.task: scores.loss for scores in self._measure(self.opened.seen)}

    def choosing_losses(self) -> dict[str, float]:
        """As `losses`, on the episodes that are set apart to choose by."""
        learnt = [task.judged_on(task.choosing_episodes) for task in self.opened.learnt]
        validator = replace(self.validator, dataset=self.opened.dataset(learnt))
        return {scores.task: scores.loss for scores in self._measure(self.opened.seen, validator)}

    def losses_of_training(self, task: Task) -> dict[int, float]:
        """Training episode of a task → its loss, measured as that of held-out episodes is; written nowhere."""
        dataset = self.opened.dataset([task.judged_on(task.train_episodes)])
        validator = replace(self.validator, dataset=dataset)
        (scores,) = self.agreement.repeatable(lambda: validator.validate_all_tasks(self.policy, [task.name]))
        return scores.scores("loss")

    def validate(self, kind: Kind, *, step: int, epoch: int, names: Sequence[str]) -> list[ValidationRecord]:
        """A record per task."""
        opened, stage = self.opened, self.opened.config.stage
        found = self._measure(names)
        seen = [] if kind == "start" else opened.seen
        moment = Moment(kind, step, stage.index, stage.name, epoch)
        every = opened.config.rollout.every_epochs
        closed_loops: dict[str, ClosedLoop | None] = {}
        if kind == "end" or (kind == "epoch" and every is not None and epoch % every == 0):
            closed_loops = self.roll_out([scores.task for scores in found], moment)
        records = [
            ValidationRecord(moment, scores.task in seen, scores, closed_loops.get(scores.task)) for scores in found
        ]
        if opened.accelerator.is_main_process:
            for record in records:
                opened.folder.validations.append(record.to_json())
                self.tracker.log(record.curves(), step)
        return records

    def _measure(self, names: Sequence[str], validator: Validator | None = None) -> list[HeldOutScores]:
        """Each process makes a share of the queries."""
        accelerator, validator = self.opened.accelerator, validator or self.validator
        share = {"process": accelerator.process_index, "processes": accelerator.num_processes}
        mine = self.agreement.repeatable(lambda: validator.measure(self.policy, names, **share))
        return validator.scores(gather_object([mine]), names)

    def roll_out(self, names: Sequence[str], moment: Moment) -> dict[str, ClosedLoop | None]:
        """How the tasks of `names` that were seen go in closed loop. Each process plays a share of the episodes."""
        opened, config = self.opened, self.opened.config.rollout
        if config.episodes == 0:
            return {}
        was_training, is_main = self.policy.training, opened.accelerator.is_main_process
        robot = SmolVLAPolicyWrapper(self.policy, opened.processors, opened.known_tasks, seed=opened.config.seed)
        seeds = evaluation_seeds(config.episodes, seed=opened.config.seed)
        share = seeds[opened.accelerator.process_index :: opened.accelerator.num_processes]
        kept = moment.kind == "end"
        how = {"parallel": config.parallel, "workers": config.workers, "replayable": kept, "progress": is_main}
        play = partial(roll_out, robot, **how)
        closed_loops = {}
        for name in names:
            environment = opened.environments.get(name)
            if environment is None:  # not seen yet
                continue
            mine = self.agreement.repeatable(partial(play, environment, share))
            rollouts = Rollouts.joined(gather_object([mine]))
            if is_main:
                opened.folder.rollouts.append({**moment.to_json(), "task": name, **rollouts.to_json()})
                if kept:
                    keep(opened.folder.recordings(name), rollouts, fps=opened.known_tasks.fps)
                tqdm.write(f"{name}: {rollouts.summary}")
            closed_loops[name] = rollouts.closed_loop()
        self.policy.reset()
        self.policy.train(was_training)
        return closed_loops
