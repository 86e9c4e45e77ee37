"""A stored run → its analysis: every number of the report, worked out once.

    analysis = analyse(StoredRun.open(folder))
    write_report(analysis)
    print(summary_table(analysis))

The report's text, tables and figures take their numbers from `Analysis.matrix`, the content of report/matrix.json, and
from nowhere else. It is written after each stage: a run cut short has the rows it got to.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from kuavo_train.errors import RunFolderError
from kuavo_train.metrics import forgetting
from kuavo_train.metrics.forgetting import PerformanceMatrix
from kuavo_train.metrics.intervals import wilson
from kuavo_train.metrics.verdict import RetentionLimits
from kuavo_train.reading import Json, JsonValue
from kuavo_train.reporting.comparability import check_comparable
from kuavo_train.reporting.films import films_of
from kuavo_train.reporting.run_checks import run_checks
from kuavo_train.reporting.run_metrics import interval_record, performance_matrix, task_verdict
from kuavo_train.reporting.strategy_section import gate_readings, probe_records, strategy_facts
from kuavo_train.runs.files import write_text
from kuavo_train.runs.records import MEASURES, ClosedLoop, Measure, TaskRecord
from kuavo_train.runs.stored_run import StoredRun, StoredStage

SIGN_CONVENTION = (
    "Tables show losses and errors as measured: lower is better. Metrics are computed on scores, higher is better: "
    "losses and errors are negated, success rates are not. So a negative backward transfer and a positive forgetting "
    "mean that something was lost."
)


@dataclass(frozen=True)
class Analysis:
    """A run and its numbers. `matrix` is the content of matrix.json."""

    run: StoredRun
    matrix: Json

    @property
    def folder(self) -> Path:
        """Where its report lies."""
        return self.run.folder / "report"


def analyse(run: StoredRun, *, limits: RetentionLimits | None = None, joint: StoredRun | None = None) -> Analysis:
    """Work the numbers out.

    Args:
        limits: when a task counts as kept; None takes those of the matrix.json already there, else the defaults.
        joint: a jointly trained run on the same data, for intransigence.

    Raises:
        RunFolderError: a cell of a learnt task is missing, or the joint run does not compare.
    """
    limits = limits or stored_limits(run.folder) or RetentionLimits()
    return Analysis(run, _without_nan(_numbers(run, limits, joint)))


def write_matrix(analysis: Analysis) -> None:
    """report/matrix.json, whole or not at all."""
    analysis.folder.mkdir(exist_ok=True)
    write_numbers(analysis.folder / "matrix.json", analysis.matrix)


def write_numbers(path: Path, content: Json) -> None:
    """The numbers of a page, in the file beside it. Raises `ValueError` for one that is not finite."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def stored_limits(run_folder: Path | str) -> RetentionLimits | None:
    """The limits the run's matrix.json was last judged by; None without one that can be read."""
    path = Path(run_folder) / "report" / "matrix.json"
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))["limits"]
        return RetentionLimits(**stored)
    except (OSError, ValueError, KeyError, TypeError):
        return None  # none written yet, or by an older version: it is about to be written anew


def _numbers(run: StoredRun, limits: RetentionLimits, joint: StoredRun | None) -> Json:
    matrices = {measure: matrix for measure in MEASURES if (matrix := performance_matrix(run, measure)) is not None}
    if joint is not None:
        _check_joint(run, joint)
    return {
        **{key: getattr(run.record, key) for key in ("run", "created", "seed", "profile", "strategy", "git_commit")},
        "versions": run.record.versions,
        "partial": any(not stage.finished for stage in run.stages) or _untrained(run) != [],
        "missing": _missing(run, matrices),
        "sign_convention": SIGN_CONVENTION,
        "limits": dataclasses.asdict(limits),
        "rule": limits.rule,
        "success_rule": limits.success_rule,
        "films": _films(run),
        "tasks": [
            {
                "name": task.name,
                "index": task.index,
                "learnt_in": run.learnt_in[task.name],
                "instruction": _instruction(task),
                **_dataset(task),
            }
            for task in run.tasks
        ],
        "stages": [_stage(run, stage) for stage in run.stages],
        "validation_cost": _validation_cost(run),
        "verdicts": [task_verdict(run, matrices, task, limits) for task in run.tasks],
        "matrices": {measure: _matrix(run, matrix, measure, joint) for measure, matrix in matrices.items()},
        "curves": _curves(run),
        "error_by_group": _error_by_group(run),
        "closed_loop": _closed_loop(run),
        "replay": _replay(run),
        "strategy_facts": strategy_facts(run),
        "gate": gate_readings(run),
        "probes": probe_records(run),
        "parameters": _parameters(run),
        "hashes": _hashes(run),
        "checks": run_checks(run),
    }


def _films(run: StoredRun) -> Json:
    """Those of the final policy, and why others are left out; empty where none were made."""
    found = films_of(run) or {"films": [], "left_out": []}
    return {"shown": found["films"], "left_out": found["left_out"]}


def _instruction(task: TaskRecord) -> str | None:
    """The task's instruction; of several, the first and how many there are beside it."""
    more = len(task.instructions) - 1
    return f"{task.instruction} (and {more} other instructions)" if more > 0 else task.instruction


def _matrix(run: StoredRun, matrix: PerformanceMatrix, measure: Measure, joint: StoredRun | None) -> Json:
    """Rows and metrics of one measure."""
    metrics = _metrics(matrix)
    if joint is not None:
        metrics |= _intransigence(matrix, joint, measure)
    rows: list[Json] = [
        {"stage": stage, "values": dict(zip(matrix.tasks, row, strict=True))}
        for stage, row in zip(matrix.stages, matrix.values, strict=True)
    ]
    if measure == "success":
        metrics |= _libero_metrics(run, matrix)
        rows = [row | {"intervals": _success_intervals(run, row["stage"])} for row in rows]
    return {"higher_is_better": matrix.higher_is_better, "rows": rows, "metrics": metrics}


def _metric(definition: str, compute: Callable[[], float | Mapping[str, float] | None]) -> Json:
    """A metric that cannot be had is null with the reason."""
    try:
        value = compute()
    except ValueError as error:  # MissingCellError and undefined ratios; the reason names stage and task
        return {"value": None, "definition": definition, "reason": str(error)}
    if value is None or value == {}:
        return {"value": None, "definition": definition, "reason": "too few tasks have been learnt for it"}
    return {"value": value, "definition": definition, "reason": None}


def _metrics(matrix: PerformanceMatrix) -> dict[str, Json]:
    """Those of every measure."""
    named = {
        name: _metric(definition, lambda function=function: function(matrix))  # type: ignore[misc]
        for name, (definition, function) in forgetting.METRICS.items()
    }
    by_task = _metric("best R since learnt − R[T][j]; positive = lost", lambda: forgetting.forgetting(matrix))
    return named | {"forgetting by task": by_task}


def _intransigence(matrix: PerformanceMatrix, joint: StoredRun, measure: Measure) -> dict[str, Json]:
    """What a jointly trained run reaches beyond what was learnt one after another."""
    lines = {task.name: joint.end_of(joint.finished[-1].index, task.name) for task in joint.tasks}
    scores = {task: value for task, line in lines.items() if line and (value := line.cell(measure)) is not None}
    return {
        "intransigence": _metric(
            "mean over tasks of joint R − R[when learnt][j]; positive = learnt less than jointly",
            lambda: forgetting.mean_intransigence(matrix, scores),
        ),
        "intransigence by task": _metric(
            "joint R − R[when learnt][j]; positive = learnt less than jointly",
            lambda: forgetting.intransigence(matrix, scores),
        ),
    }


def _libero_metrics(run: StoredRun, matrix: PerformanceMatrix) -> dict[str, Json]:
    """LIBERO's, defined on success rates."""
    curves = {
        task: [
            line.closed_loop.success
            for stage in run.finished
            if stage.index == matrix.stage_of(task)
            for line in stage.validations
            if line.task == task and line.kind != "start" and line.closed_loop is not None
        ]
        for task in matrix.learnt_tasks
    }
    return {
        "LIBERO FWT": _metric(
            "mean success over evaluations during the task's own stage", lambda: forgetting.libero_fwt(curves)
        ),
        "LIBERO NBT": _metric("mean drop of success over later stages", lambda: forgetting.libero_nbt(matrix)),
        "LIBERO NBT, normalised": _metric(
            "NBT over the success when learnt", lambda: forgetting.libero_nbt(matrix, relative=True)
        ),
        "LIBERO AUC": _metric(
            "(FWT + sum of later successes) / (1 + later stages)",
            lambda: forgetting.libero_auc(matrix, forgetting.libero_fwt(curves)),
        ),
    }


def _success_intervals(run: StoredRun, stage: int) -> dict[str, Json | None]:
    lines = {task.name: run.end_of(stage, task.name) for task in run.tasks}
    return {
        task: success_interval(line.closed_loop)
        for task, line in lines.items()
        if line is not None and line.closed_loop is not None
    }


def success_interval(closed_loop: ClosedLoop) -> Json | None:
    """Wilson's, of a success rate."""
    return interval_record(wilson(closed_loop.successes, closed_loop.trials))


def _check_joint(run: StoredRun, joint: StoredRun) -> None:
    """Raises `RunFolderError` where the two runs may not be compared."""
    if not joint.finished:
        raise RunFolderError(f"{joint.folder} has no finished stage: finish it before comparing with it")
    check_comparable([run, joint])
    for task in run.tasks:
        parts = {
            other.folder: len(entry.dataset.validated)
            for other in (run, joint)
            for entry in other.tasks
            if entry.name == task.name
        }
        if len(set(parts.values())) > 1:
            raise RunFolderError(
                f"{run.folder} and {joint.folder} validate {list(parts.values())} episodes of {task.name}: their "
                "losses do not compare; train one of them again with the other's validation.share and training.epochs"
            )


def _curves(run: StoredRun) -> list[Json]:
    """Every validation, in order, on one axis of steps over all stages."""
    points, offset = [], 0
    for stage in run.stages:
        points += [
            {
                "stage": stage.index,
                "kind": line.kind,
                "step": line.step,
                "total_step": offset + line.step,
                "epoch": line.moment.epoch,
                "task": line.task,
                "seen": line.seen,
                "loss": line.cell("loss"),
                "action_error": line.cell("action_error"),
            }
            for line in stage.validations
        ]
        offset += stage.steps
    return points


def _error_by_group(run: StoredRun) -> list[Json]:
    if not run.finished:
        return []
    last = run.finished[-1].index
    lines = [(task.name, run.end_of(last, task.name)) for task in run.tasks]
    return [
        {"task": task, "groups": line.held_out.action_error_by_group}
        for task, line in lines
        if line is not None and line.held_out.action_error_by_group
    ]


def _replay(run: StoredRun) -> list[Json]:
    return [
        {
            "stage": stage.index,
            "task": task,
            "declared": stage.replay.declared.get(task),
            "drawn": drawn.share,
            "frames": drawn.frames,
            "total_frames": stage.replay.total_frames,
        }
        for stage in run.stages
        if stage.replay is not None
        for task, drawn in stage.replay.drawn.items()
    ]


def _stage(run: StoredRun, stage: StoredStage) -> Json:
    """A stage in a few numbers; the training loss is the mean over the last tenth of the logged steps."""
    losses = [line.loss for line in stage.metrics if line.loss is not None]
    tail = losses[-max(1, len(losses) // 10) :]
    rates = sorted(line.samples_per_s for line in stage.metrics if line.samples_per_s is not None)
    return {
        "index": stage.index,
        "name": stage.name,
        "status": stage.record.status,
        "steps": stage.steps,
        "epochs": stage.record.epochs,
        "seconds": stage.record.seconds,
        "validation_seconds": _validation_seconds(stage),
        "result": stage.record.result,
        "best_step": stage.record.best.step,
        "best_loss": stage.record.best.loss,
        "training_loss": sum(tail) / len(tail) if tail else None,
        "loss_target": next((task.loss_target for task in run.tasks if task.name == stage.name), None),
        "samples_per_s": rates[len(rates) // 2] if rates else None,
    }


def _closed_loop(run: StoredRun) -> list[Json]:
    """How far the episodes of every task came after every stage that rolled it out."""
    lines = [
        (stage.index, task.name, run.end_of(stage.index, task.name)) for stage in run.finished for task in run.tasks
    ]
    return [
        {
            "stage": stage,
            "task": task,
            "successes": line.closed_loop.successes,
            "trials": line.closed_loop.trials,
            "interval": success_interval(line.closed_loop),
            "progress": line.closed_loop.progress,
            "funnel": [{"subgoal": name, "reached": n} for name, n in line.closed_loop.funnel.items()],
            "right_branch": line.closed_loop.right,
            "acted_on_cue": line.closed_loop.acted,
            "n_action_steps": line.closed_loop.n_action_steps,
        }
        for stage, task, line in lines
        if line is not None and line.closed_loop is not None
    ]


def _validation_seconds(stage: StoredStage) -> float:
    return sum(line.held_out.seconds or 0.0 for line in stage.validations)


def _validation_cost(run: StoredRun) -> Json:
    """What knowing costs: seconds of all validations of the finished stages beside those of their training."""
    validation = sum(_validation_seconds(stage) for stage in run.finished)
    training = sum(stage.record.seconds or 0.0 for stage in run.finished)
    return {"seconds": validation, "training_seconds": training, "share": validation / training if training else None}


def _dataset(task: TaskRecord) -> Json:
    return {
        "dataset_hash": task.dataset.hash,
        "episodes": task.dataset.episodes,
        "frames": task.dataset.frames,
        "train_episodes": len(task.dataset.train_episodes),
        "held_out_episodes": len(task.dataset.held_out_episodes),
        "validated_episodes": len(task.dataset.validated),
    }


def _parameters(run: StoredRun) -> list[Json]:
    """Groups of the finished stages; an unfinished one has no fingerprints after."""
    keys = ("group", "parameters", "trainable", "fingerprint_before", "fingerprint_after")
    return [
        {"stage": stage.index, **{key: getattr(group, key) for key in keys}}
        for stage in run.finished
        for group in stage.parameters or ()
    ]


def _hashes(run: StoredRun) -> list[Json]:
    entries = [
        ("config", run.record.config_hash),
        (f"normalization ({run.record.normalization.source})", run.record.normalization.hash),
        *((f"data {task.name}", task.dataset.hash) for task in run.tasks),
        *(
            (f"{stage.folder.name}/{stage.record.checkpoint or 'checkpoint'}", stage.record.checkpoint_hash)
            for stage in run.stages
        ),
    ]
    return [{"of": of, "hash": value} for of, value in entries if value]


def _untrained(run: StoredRun) -> list[TaskRecord]:
    """Tasks whose stage has not begun; a joint stage, once begun, is that of all tasks."""
    if run.record.strategy == "joint":
        return []
    indices = {stage.index for stage in run.stages}
    return [task for task in run.tasks if run.learnt_in[task.name] not in indices]


def _missing(run: StoredRun, matrices: Mapping[Measure, PerformanceMatrix]) -> list[str]:
    missing = [
        f"{stage.folder.name} is {stage.record.status} at step {stage.steps}"
        for stage in run.stages
        if not stage.finished
    ]
    missing += [f"stage {task.index} ({task.name}) has not been trained" for task in _untrained(run)]
    if all(value is None for value in matrices["loss"].values[0]):
        missing.append("no validation before training (row 0), so no forward transfer")
    if "action_error" not in matrices:
        missing.append("action errors were not measured")
    for stage in run.finished:
        absent = [
            file
            for file, content in (
                ("metrics.jsonl", stage.metrics),
                ("replay_audit.json", stage.replay),
                ("parameters.json", stage.parameters),
            )
            if not content
        ]
        missing += [f"{stage.folder.name} has no {file}" for file in absent]
    return missing


def _without_nan(value: JsonValue) -> JsonValue:
    """JSON knows no NaN: a value that is not finite (a diverged training loss) becomes null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return [_without_nan(item) for item in value] if isinstance(value, list | tuple) else value
