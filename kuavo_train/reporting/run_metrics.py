"""From a stored run to its matrices and verdicts: which line of which log is which cell of R.

A cell of R is the mean over held-out episodes, every episode counting once, so that it is the very mean whose
interval is bootstrapped.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict

from kuavo_train.errors import RunFolderError
from kuavo_train.metrics import forgetting
from kuavo_train.metrics.forgetting import MissingCellError, PerformanceMatrix, Value
from kuavo_train.metrics.intervals import Interval, PairedOutcomes, paired_bootstrap
from kuavo_train.metrics.number_format import integer, number, percent, whole_percent
from kuavo_train.metrics.verdict import RetentionLimits, Verdict, judge, judge_absolute, judge_success
from kuavo_train.reading import Json
from kuavo_train.runs.records import MEASURES, ClosedLoop, Measure, TaskRecord, ValidationRecord
from kuavo_train.runs.stored_run import StoredRun


def performance_matrix(
    run: StoredRun, measure: Measure, value_of: Callable[[ValidationRecord, Measure], Value] = ValidationRecord.cell
) -> PerformanceMatrix | None:
    """R of a run for one measure, rows for finished stages; None if it was never measured.

    Args:
        value_of: (validation line, measure) → its value, or an array of them; None where there is none.

    Raises:
        RunFolderError: a learnt task was not validated after a later stage (loss only), or a value is not
            finite.
    """
    cells = {}
    for stage_index in (0, *(stage.index for stage in run.finished)):
        for task in run.tasks:
            line = run.end_of(stage_index, task.name)
            value = None if line is None else value_of(line, measure)
            if value is not None:
                cells[stage_index, task.name] = value
    if not cells and measure != "loss":
        return None
    for stage in run.finished if measure == "loss" else ():
        for name, learnt in run.learnt_in.items():
            if learnt <= stage.index and (stage.index, name) not in cells:
                raise RunFolderError(
                    f"{stage.folder}/validation.jsonl has no line of kind 'end' for task {name}, which was learnt in "
                    f"stage {learnt}: restore the line, or train stage {stage.index} again"
                )
    try:
        return PerformanceMatrix.from_cells(
            measure,
            cells,
            learnt_in=run.learnt_in,
            stages=[0, *(stage.index for stage in run.finished)],
            higher_is_better=MEASURES[measure],
        )
    except ValueError as error:
        raise RunFolderError(f"{run.folder}: {error}; train that stage again") from error


def change_since_learnt(
    run: StoredRun, measure: Measure, task: str, limits: RetentionLimits, *, relative: bool
) -> Interval | None:
    """Change of loss or action error since the task was learnt, with its paired-bootstrap interval.

    None where nothing came after the task, or where single episodes were not recorded.

    Raises:
        RunFolderError: the two validations do not score the same episodes.
    """
    learnt, last = run.learnt_in[task], run.finished[-1].index
    before, after = run.end_of(learnt, task), run.end_of(last, task)
    if learnt >= last or before is None or after is None:
        return None
    scores = before.scores(measure), after.scores(measure)
    if not all(scores):
        return None
    try:
        return paired_bootstrap(*scores, relative=relative, level=limits.confidence, resamples=limits.resamples)
    except ValueError as error:
        raise RunFolderError(
            f"{run.folder}: {measure} of task {task} after stage {learnt} and after stage {last} cannot be "
            "compared: "
            f"{error}; validate both stages on the same held-out episodes"
        ) from error


def task_verdict(
    run: StoredRun, matrices: Mapping[Measure, PerformanceMatrix], task: TaskRecord, limits: RetentionLimits
) -> Json:
    """One task's losses and errors before training, when learnt and now, its verdict, and the evidence.

    The verdict speaks of success where the task was rolled out on the same layouts when learnt and now, else of the
    held-out loss; `success_verdict` and `loss_verdict` are the two apart.
    """
    name, loss = task.name, matrices["loss"]
    learnt, last = loss.stage_of(name), loss.last_stage
    entry: Json = {"task": name, "learnt_in": learnt, **_word_record(None)}
    entry |= {"measure": None, "success_verdict": None, "loss_verdict": None}
    entry |= {f"{key}_before_training": _get(m, 0, name) for key, m in matrices.items()}
    entry |= {
        "episodes": None,
        "change": None,
        "relative_change": None,
        "action_error_relative_change": None,
        "forgetting": None,
    }
    if name not in loss.learnt_tasks:
        stage = next((stage for stage in run.stages if stage.index == learnt), None)
        state = "has not been trained" if stage is None else f"is {stage.record.status} at step {stage.steps}"
        return entry | {"state": "not learnt", "evidence": f"Not learnt yet: stage {learnt} {state}."}

    entry |= {f"{key}_when_learnt": _get(m, learnt, name) for key, m in matrices.items()}
    entry |= {f"{key}_now": _get(m, last, name) for key, m in matrices.items()}
    line = run.end_of(last, name)
    entry["constant_error"] = None if line is None else line.held_out.constant_error
    entry["absolute_verdict"] = judge_absolute(entry["loss_now"], limits)
    limit = task.final_loss_limit
    entry["final_limit"] = limit
    entry["within_final_limit"] = None if limit is None else entry["loss_now"] < limit
    then, now = entry["loss_when_learnt"], entry["loss_now"]
    if learnt == last:
        before = entry["loss_before_training"]
        start = "" if before is None else f"{number(before)} before training, "
        played = "" if line is None or line.closed_loop is None else _success_text(line.closed_loop)
        evidence = f"Nothing has come after it yet. {played}Held-out loss {start}{number(now)} now."
        return entry | {"state": "learnt last", "evidence": evidence}

    relative = change_since_learnt(run, "loss", name, limits, relative=True)
    if relative is None:  # no episodes on record: the means alone, which settle nothing
        relative = Interval((now - then) / then, None, None, limits.confidence, 0)
    else:
        entry["change"] = interval_record(change_since_learnt(run, "loss", name, limits, relative=False))
    verdict = judge(relative, limits)
    action = change_since_learnt(run, "action_error", name, limits, relative=True)
    by_loss = {**_word_record(verdict), "evidence": _evidence(verdict, relative, then, now)}
    by_success = success_verdict(run, name, limits)
    decides = by_loss if by_success is None else by_success
    return entry | {
        "state": "judged" if decides["verdict"] else "nothing to lose",
        "measure": "loss" if by_success is None else "success",
        **{key: decides[key] for key in ("verdict", "worst", "settled", "evidence")},
        "loss_verdict": by_loss,
        "success_verdict": by_success,
        "episodes": relative.n,
        "relative_change": interval_record(relative),
        "action_error_relative_change": interval_record(action),
        "forgetting": forgetting.forgetting(loss)[name],
    }


def success_verdict(run: StoredRun, task: str, limits: RetentionLimits) -> Json | None:
    """The verdict on a task's success since it was learnt, and what it is from.

    None where nothing came after the task, or where no layout was played, and recorded, both then and now.
    """
    learnt, last = run.learnt_in[task], run.finished[-1].index
    before, after = run.end_of(learnt, task), run.end_of(last, task)
    if learnt >= last or before is None or after is None:
        return None
    then, now = ({seed: bool(value) for seed, value in line.scores("success").items()} for line in (before, after))
    if not then.keys() & now.keys():
        return None
    outcomes = PairedOutcomes.of(then, now)
    verdict = judge_success(outcomes, limits)
    return {
        **_word_record(verdict),
        "evidence": _success_evidence(verdict, outcomes, limits),
        "layouts": outcomes.n,
        "when_learnt": outcomes.both + outcomes.only_first,
        "now": outcomes.both + outcomes.only_second,
        "won": outcomes.only_second,
        "lost": outcomes.only_first,
        "p_value": outcomes.p_value,
        "difference": interval_record(outcomes.difference(level=limits.confidence)),
    }


def _word_record(verdict: Verdict | None) -> Json:
    if verdict is None:
        return {"verdict": None, "worst": None, "settled": None}
    return {"verdict": verdict.word, "worst": verdict.worst, "settled": verdict.settled}


def _success_text(closed_loop: ClosedLoop) -> str:
    return f"Success {integer(closed_loop.successes)} of {integer(closed_loop.trials)}. "


def _success_evidence(verdict: Verdict | None, outcomes: PairedOutcomes, limits: RetentionLimits) -> str:
    """The sentences under a verdict on success."""
    then, now = outcomes.both + outcomes.only_first, outcomes.both + outcomes.only_second
    counts = f"Success {then} of {outcomes.n} layouts when learnt, {now} of the same now"
    if verdict is None:
        return f"{counts}. It never succeeded when it was learnt, so nothing could be lost."
    change = outcomes.difference(level=limits.confidence)
    assert change.low is not None
    assert change.high is not None
    text = (
        f"{counts}: {percent(change.estimate)} ({whole_percent(change.level)} interval {percent(change.low)} to "
        f"{percent(change.high)}). Lost {outcomes.only_first}, won {outcomes.only_second}: exact McNemar "
        f"p = {number(outcomes.p_value)}"
    )
    if outcomes.p_value >= 1 - limits.confidence:
        text += ", which shows no change"
    elif change.estimate > 0:
        text += ", better than when learnt"
    if verdict.settled:
        return f"{text}."
    return f"{text}. The interval reaches into “{verdict.worst}”: more layouts would settle it."


def _evidence(verdict: Verdict, change: Interval, then: float, now: float) -> str:
    """The sentence under a verdict."""
    if change.low is None or change.high is None:
        interval, doubt = "no interval from so few episodes", "More held-out episodes are needed to settle it."
    else:
        level, span = whole_percent(change.level), f"{percent(change.low)} to {percent(change.high)}"
        interval = f"{level} interval {span}, {change.n} episodes"
        doubt = f"The interval reaches into “{verdict.worst}”: more held-out episodes would settle it."
    better = ", better than when learnt" if change.high is not None and change.high < 0 else ""
    text = (
        f"Held-out loss {number(then)} when learnt, {number(now)} now: {percent(change.estimate)} ({interval}){better}."
    )
    return text if verdict.settled else f"{text} {doubt}"


def _get(matrix: PerformanceMatrix, stage: int, task: str) -> float | None:
    try:
        return matrix.value(stage, task)
    except MissingCellError:
        return None


def interval_record(interval: Interval | None) -> Json | None:
    """An interval as it stands in matrix.json."""
    return None if interval is None else asdict(interval)
