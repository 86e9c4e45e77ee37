"""Lost or only suppressed? How fast an old task's loss comes back, beside how fast it is learnt for the first time.

Two policies go through the old task's own stage once more, alone and in a few steps, the schedule shortened to them,
with the same samples and the same noise: the final one, and the one from before the task was learnt. What was only
suppressed comes back long before it could have been learnt anew (Ebbinghaus 1885 called the difference savings).
Held-out losses, as at every validation; intervals over episodes.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace

from accelerate import Accelerator

from kuavo_train.config import RunConfig
from kuavo_train.data.task import Task
from kuavo_train.errors import require
from kuavo_train.metrics.intervals import Interval, Scores, paired_bootstrap
from kuavo_train.metrics.number_format import number, whole_percent
from kuavo_train.metrics.verdict import RetentionLimits
from kuavo_train.probing.validated_run import NothingToProbe, validator_of
from kuavo_train.reading import Json
from kuavo_train.reporting.run_analysis import stored_limits
from kuavo_train.runs.stored_run import StoredStage
from kuavo_train.runs.trained_run import TrainedRun
from kuavo_train.stage.findings import Findings
from kuavo_train.stage.lineage import Start
from kuavo_train.stage.setup import fresh_memory, open_stage
from kuavo_train.training.checkpoint import Checkpoint
from kuavo_train.training.epochs import Timetable
from kuavo_train.training.learner import Learner
from kuavo_train.training.trainer import Batches, Decision, Limits, Progress, Trainer, TrainerHooks

KEPT, SUPPRESSED, PARTLY_KEPT, LOST, UNDECIDED = "not forgotten", "only suppressed", "partly kept", "lost", "undecided"
Curve = Sequence[tuple[int, Scores]]
"""(steps of fine-tuning, held-out episode → loss), from step 0 on."""


def recovery_record(
    task: str, *, learnt: Scores, final: Curve, before: Curve, before_is: str, limits: RetentionLimits
) -> Json:
    """One task's section of recovery.json.

    Args:
        learnt: held-out losses at the end of the stage that learnt the task.
        final, before: what the same steps do to the final policy, and to the one before the task was learnt.
        before_is: what that one is, in words.
    """

    def change(scores: Scores) -> Interval:
        """Relative change since the task was learnt."""
        return paired_bootstrap(learnt, scores, relative=True, level=limits.confidence, resamples=limits.resamples)

    head_start = paired_bootstrap(
        final[-1][1], before[-1][1], level=limits.confidence, resamples=limits.resamples
    )  # what the final policy is ahead by, after the last step
    goal = _mean(learnt) * (1 + limits.well_retained_change)
    record: Json = {
        "task": task,
        "loss_when_learnt": _mean(learnt),
        "goal": goal,
        "before_is": before_is,
        "steps": [step for step, _ in final],
        "final": [_mean(scores) for _, scores in final],
        "before": [_mean(scores) for _, scores in before],
        "change_at_first": asdict(change(final[0][1])),
        "change_at_last": asdict(change(final[-1][1])),
        "before_change_at_last": asdict(change(before[-1][1])),
        "head_start": asdict(head_start),
        "steps_back": _first_below(final, goal),
        "steps_anew": _first_below(before, goal),
    }
    record["word"] = _word(record, limits)
    return record | {"evidence": _evidence(record, limits)}


def _mean(scores: Scores) -> float:
    return sum(scores.values()) / len(scores)


def _first_below(curve: Curve, goal: float) -> int | None:
    """The first step at which the loss is back at the goal; None where it never is."""
    return next((step for step, scores in curve if _mean(scores) <= goal), None)


def _word(record: Json, limits: RetentionLimits) -> str:
    def above(change: Json) -> bool:
        """Whether the data show more than the change that counts as kept."""
        worst = change["estimate"] if change["low"] is None else change["low"]
        return worst > limits.well_retained_change

    if not above(record["change_at_first"]):
        return KEPT
    back, anew = record["steps_back"], record["steps_anew"]
    if back is not None:
        sooner = anew is None or back < anew
        return SUPPRESSED if sooner else UNDECIDED
    low = record["head_start"]["low"]
    return PARTLY_KEPT if low is not None and low > 0 else LOST


def _evidence(record: Json, limits: RetentionLimits) -> str:
    """The sentence beside the word."""
    first, last = record["final"][0], record["final"][-1]
    steps, margin = record["steps"][-1], whole_percent(limits.well_retained_change)
    text = f"Held-out loss {number(record['loss_when_learnt'])} when learnt, {number(first)} in the end"

    def when(found: int | None, loss: float) -> str:
        if found is None:
            return f"not within {steps} steps ({number(loss)})"
        return "from the start" if found == 0 else f"after {found} step{'s' if found > 1 else ''}"

    back = when(record["steps_back"], last)
    anew = when(record["steps_anew"], record["before"][-1])
    return f"{text}. Within {margin} of the former {back}; from {record['before_is']} {anew}."


CURVE_POINTS = 10  # validations while an old task is learnt again, beside the one before


def recovery(run: TrainedRun, *, steps: int = 100) -> Json:
    """Each earlier task's stage in a few steps, alone: from the final policy, and from before the task was learnt.

    Raises:
        NothingToProbe: no task was learnt before the last stage, or none could be lost (adapters).
    """
    if run.settings.adapters is not None:
        raise NothingToProbe(f"recovery needs weights that later stages change, got strategy=adapters in {run.folder}")
    last, learnt_in = run.stored.finished[-1], run.stored.learnt_in
    earlier = [task for task in run.learnt if learnt_in[task.name] < last.index]
    if not earlier:
        raise NothingToProbe(f"recovery needs a task learnt before the last stage, got none in {run.folder}")
    require(steps >= 1, "steps", "be at least 1", steps)
    limits = stored_limits(run.folder) or RetentionLimits()
    found = []
    for task in earlier:
        own = next(stage for stage in run.stages if stage.index == learnt_in[task.name])
        place = run.stages.index(own)
        previous = run.stages[place - 1] if place else None
        line = run.stored.end_of(own.index, task.name)
        assert line is not None  # StoredRun.open has seen to it
        found.append(
            recovery_record(
                task.name,
                learnt=line.scores("loss"),
                final=_relearn(run, own, task, run.checkpoint(last), steps),
                before=_relearn(run, own, task, run.checkpoint(previous) if previous else None, steps),
                before_is=f"the weights after stage {previous.index}" if previous else "the weights before training",
                limits=limits,
            )
        )
    return {"steps": steps, "tasks": found}


def alone(recipe: RunConfig) -> RunConfig:
    """The stage's recipe for its own task, without what a strategy, a gate, a tracker or processes do beside."""
    return replace(
        recipe,
        processes=1,
        strategy="sequential",
        mixture="own_task",
        strategy_settings={},
        ewc=None,
        distill=None,
        merge=None,
        forgetting=replace(recipe.forgetting, budget=None),
        tracking="off",
    )


def _relearn(
    run: TrainedRun, own: StoredStage, task: Task, start: Checkpoint | None, steps: int
) -> list[tuple[int, Scores]]:
    """Held-out losses of the task while its own stage is run once more from `start`, in `steps` steps.

    The schedule of the learning rate is shortened to these steps: in the stage's own, a few steps would be its warm-up
    alone. All other tasks are left out; frozen groups and order of samples are the stage's. Nothing is written.
    """
    every = max(1, steps // CURVE_POINTS)
    recipe = alone(run.config(own))
    training = replace(recipe.training, log_every=steps, save_every=steps)
    accelerator = Accelerator(mixed_precision=training.mixed_precision, cpu=run.device.type == "cpu")
    stage = open_stage(replace(recipe, training=training), run.curriculum, Start(before=start), accelerator, Findings())
    learner = Learner.of(
        stage.built.policy,
        stage.built.preprocessor,
        training,
        accelerator=accelerator,
        steps=steps,
        recurrence=fresh_memory(stage.order, stage.built.policy),
        averaged=False,
    )
    dataset = run.dataset(stage.order.tasks, stage.built.policy.config)
    validator = validator_of(run, dataset, stage.built.preprocessor)
    curve: list[tuple[int, Scores]] = []

    class Measured(TrainerHooks):
        def epoch_done(self, step: int, epoch: int) -> Decision:
            (found,) = validator.validate_all_tasks(learner.bare_policy, [task.name])
            curve.append((step, found.scores("loss")))
            return Decision(found.loss)

    hooks = Measured()
    hooks.epoch_done(0, 0)
    timetable = Timetable(epochs=-(-steps // every), steps_per_epoch=every, max_steps=steps)
    Trainer(
        learner,
        Batches(dataset, stage.order, current=task.name, per_step=training.gradient_accumulation_steps),
        Limits(timetable, validate_every=1, log_every=steps, save_every=steps, result="last"),
        hooks,
        description=f"{task.name} from {start.folder.parent.parent.name if start else 'the beginning'}",
    ).run(Progress())
    return curve
