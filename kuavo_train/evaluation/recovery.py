"""Lost or only suppressed? How fast an old task's loss comes back, beside how fast it is learnt for the first time.

Two policies go through the old task's own stage once more, alone and in a few steps, the schedule shortened to them,
with the same samples and the same noise: the final one, and the one from before the task was learnt. What was only
suppressed comes back long before it could have been learnt anew (Ebbinghaus 1885 called the difference savings).
Held-out losses, as at every validation; intervals over episodes.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from kuavo_train.metrics.intervals import Interval, Scores, paired_bootstrap
from kuavo_train.metrics.number_format import number, whole_percent
from kuavo_train.metrics.verdict import RetentionLimits

KEPT, SUPPRESSED, PARTLY_KEPT, LOST, UNDECIDED = "not forgotten", "only suppressed", "partly kept", "lost", "undecided"
Curve = Sequence[tuple[int, Scores]]
"""(steps of fine-tuning, held-out episode → loss), from step 0 on."""
Record = dict[str, Any]


def recovery_record(
    task: str, *, learnt: Scores, final: Curve, before: Curve, before_is: str, limits: RetentionLimits
) -> Record:
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
    record: Record = {
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


def _word(record: Record, limits: RetentionLimits) -> str:
    def above(change: Record) -> bool:
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


def _evidence(record: Record, limits: RetentionLimits) -> str:
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
