"""Run folder → report/matrix.json: every number of the report, worked out once and written down.

The report's text, tables and figures take their numbers from this dictionary and from nowhere else.
`write_matrix` is called after each stage: a run cut short has the rows it got to.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kuavo_train.errors import RunFolderError
from kuavo_train.metrics import forgetting
from kuavo_train.metrics.forgetting import PerformanceMatrix
from kuavo_train.metrics.intervals import wilson
from kuavo_train.metrics.verdict import RetentionLimits
from kuavo_train.reporting.comparability import check_comparable
from kuavo_train.reporting.run_checks import run_checks
from kuavo_train.reporting.run_metrics import (
    MEASURES,
    cell,
    end_line,
    interval_record,
    performance_matrix,
    task_verdict,
)
from kuavo_train.reporting.strategy_section import gate_readings, probe_records, strategy_facts
from kuavo_train.runs.stored_run import Record, StoredRun, StoredStage, read_run

SIGN_CONVENTION = (
    "Tables show losses and errors as measured: lower is better. Metrics are computed on scores, higher is "
    "better: "
    "losses and errors are negated, success rates are not. So a negative backward transfer and a positive "
    "forgetting mean "
    "that something was lost."
)


def write_matrix(
    run_folder: Path | str, *, limits: RetentionLimits | None = None, joint: Path | str | None = None
) -> Record:
    """Analyse the run and write report/matrix.json in it, whole or not at all. Returns what was written.

    Args:
        limits: when a task counts as kept; None takes those of the matrix.json already there, else the
            defaults.
        joint: folder of a jointly trained run on the same data, for intransigence.

    Raises:
        RunFolderError: the folder cannot be read, a cell of a learnt task is missing, or the joint run does
            not compare.
    """
    run = read_run(run_folder)
    path = run.folder / "report" / "matrix.json"
    joint_run = read_run(joint) if joint is not None else None
    result = analyse(run, limits or stored_limits(run_folder) or RetentionLimits(), joint_run)
    path.parent.mkdir(exist_ok=True)
    partial = path.with_suffix(".json.partial")
    partial.write_text(json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    partial.replace(path)
    return result


def stored_limits(run_folder: Path | str) -> RetentionLimits | None:
    """The limits the run's matrix.json was last judged by; None without one that can be read."""
    path = Path(run_folder) / "report" / "matrix.json"
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))["limits"]
        return RetentionLimits(**stored)
    except (OSError, ValueError, KeyError, TypeError):
        return None  # none written yet, or by an older version: it is about to be written anew


def analyse(run: StoredRun, limits: RetentionLimits, joint: StoredRun | None = None) -> Record:
    """The content of matrix.json. Raises RunFolderError as `write_matrix` does."""
    matrices = {measure: matrix for measure in MEASURES if (matrix := performance_matrix(run, measure)) is not None}
    missing = _missing(run, matrices)
    result = {
        **{key: run.record.get(key) for key in ("run", "created", "seed", "profile", "strategy", "git_commit")},
        "versions": run.record.get("versions") or {},
        "partial": any(not stage.finished for stage in run.stages) or _untrained(run) != [],
        "missing": missing,
        "sign_convention": SIGN_CONVENTION,
        "limits": dataclasses.asdict(limits),
        "rule": limits.rule,
        "tasks": [
            {
                "name": task["name"],
                "index": task["index"],
                "learnt_in": run.learnt_in()[task["name"]],
                "instruction": _instruction(task),
                **_dataset(task),
            }
            for task in run.tasks
        ],
        "stages": [_stage(run, stage) for stage in run.stages],
        "validation_cost": _validation_cost(run),
        "verdicts": [task_verdict(run, matrices, task, limits) for task in run.tasks],
        "matrices": {measure: _matrix(run, matrix, joint) for measure, matrix in matrices.items()},
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
    return _without_nan(result)


def _instruction(task: Record) -> str | None:
    """What the task is told; of several, the first and how many there are beside it."""
    more = len(task.get("instructions") or [None]) - 1
    return f"{task['instruction']} (and {more} other instructions)" if more else task.get("instruction")


def _matrix(run: StoredRun, matrix: PerformanceMatrix, joint: StoredRun | None) -> Record:
    """Rows and metrics of one measure; a metric that cannot be had is null with the reason."""
    named: Record = {}

    def add(name: str, definition: str, compute: Callable[[], Any]) -> None:
        reason = value = None
        try:
            value = compute()
            if value is None or value == {}:
                value, reason = None, "too few tasks have been learnt for it"
        except ValueError as error:  # MissingCellError and undefined ratios; the reason names stage and task
            reason = str(error)
        named[name] = {"value": value, "definition": definition, "reason": reason}

    for name, (definition, function) in forgetting.METRICS.items():
        add(name, definition, lambda function=function: function(matrix))  # type: ignore[misc]
    add(
        "forgetting by task",
        "best R since learnt − R[T][j]; positive = lost",
        lambda: forgetting.forgetting(matrix),
    )
    if joint is not None:
        scores = _joint_values(run, joint, matrix.measure)
        add(
            "intransigence",
            "mean over tasks of joint R − R[when learnt][j]; positive = learnt less than jointly",
            lambda: forgetting.mean_intransigence(matrix, scores),
        )
        add(
            "intransigence by task",
            "joint R − R[when learnt][j]; positive = learnt less than jointly",
            lambda: forgetting.intransigence(matrix, scores),
        )
    if matrix.measure == "success":
        curves = {
            task: [
                value
                for stage in run.finished
                if stage.index == matrix.stage_of(task)
                for line in stage.validations
                if line["task"] == task and line["kind"] != "start" and (value := cell(line, "success")) is not None
            ]
            for task in matrix.learnt_tasks
        }
        add(
            "LIBERO FWT",
            "mean success over evaluations during the task's own stage",
            lambda: forgetting.libero_fwt(curves),
        )
        add("LIBERO NBT", "mean drop of success over later stages", lambda: forgetting.libero_nbt(matrix))
        add(
            "LIBERO NBT, normalised",
            "NBT over the success when learnt",
            lambda: forgetting.libero_nbt(matrix, relative=True),
        )
        add(
            "LIBERO AUC",
            "(FWT + sum of later successes) / (1 + later stages)",
            lambda: forgetting.libero_auc(matrix, forgetting.libero_fwt(curves)),
        )
    rows: list[Record] = [
        {"stage": stage, "values": dict(zip(matrix.tasks, row, strict=True))}
        for stage, row in zip(matrix.stages, matrix.values, strict=True)
    ]
    if matrix.measure == "success":
        for row in rows:
            lines = {task: end_line(run, row["stage"], task) or {} for task in matrix.tasks}
            row["intervals"] = {
                task: interval_record(wilson(line["success"]["successes"], line["success"]["trials"]))
                for task, line in lines.items()
                if line.get("success")
            }
    return {"higher_is_better": matrix.higher_is_better, "rows": rows, "metrics": named}


def _joint_values(run: StoredRun, joint: StoredRun, measure: str) -> dict[str, float]:
    """The joint run's final values, after making sure that the two runs may be compared at all."""
    if not joint.finished:
        raise RunFolderError(f"{joint.folder} has no finished stage: finish it before comparing with it")
    check_comparable([run, joint])
    last = joint.finished[-1].index
    lines = {task["name"]: end_line(joint, last, task["name"]) for task in joint.tasks}
    return {task: value for task, line in lines.items() if line and (value := cell(line, measure)) is not None}


def _curves(run: StoredRun) -> list[Record]:
    """Every validation, in order, on one axis of steps over all stages."""
    points, offset = [], 0
    for stage in run.stages:
        points += [
            {
                "stage": stage.index,
                "kind": line["kind"],
                "step": line["step"],
                "total_step": offset + line["step"],
                "epoch": line.get("epoch"),
                "task": line["task"],
                "seen": bool(line.get("seen")),
                "loss": cell(line, "loss"),
                "action_error": cell(line, "action_error"),
            }
            for line in stage.validations
        ]
        offset += stage.steps
    return points


def _error_by_group(run: StoredRun) -> list[Record]:
    if not run.finished:
        return []
    last = run.finished[-1].index
    lines = [(task["name"], end_line(run, last, task["name"])) for task in run.tasks]
    return [
        {"task": task, "groups": line["action_error_by_group"]}
        for task, line in lines
        if line and line.get("action_error_by_group")
    ]


def _replay(run: StoredRun) -> list[Record]:
    return [
        {
            "stage": stage.index,
            "task": task,
            "declared": (stage.replay.get("declared") or {}).get(task),
            "drawn": drawn.get("share"),
            "frames": drawn.get("frames"),
            "total_frames": stage.replay.get("total_frames"),
        }
        for stage in run.stages
        if stage.replay
        for task, drawn in stage.replay["drawn"].items()
    ]


def _stage(run: StoredRun, stage: StoredStage) -> Record:
    """A stage in a few numbers; the training loss is the mean over the last tenth of the logged steps."""
    losses = [line["loss"] for line in stage.metrics if line.get("loss") is not None]
    tail = losses[-max(1, len(losses) // 10) :]
    rates = sorted(line["samples_per_s"] for line in stage.metrics if line.get("samples_per_s") is not None)
    best = stage.record.get("best") or {}
    return {
        "index": stage.index,
        "name": stage.name,
        "status": stage.record["status"],
        "steps": stage.steps,
        "epochs": stage.record.get("epochs"),
        "seconds": stage.record.get("seconds"),
        "validation_seconds": _validation_seconds(stage),
        "result": stage.record.get("result"),
        "best_step": best.get("step"),
        "best_loss": best.get("loss"),
        "training_loss": sum(tail) / len(tail) if tail else None,
        "loss_target": next((t.get("loss_target") for t in run.tasks if t["name"] == stage.name), None),
        "samples_per_s": rates[len(rates) // 2] if rates else None,
    }


def _closed_loop(run: StoredRun) -> list[Record]:
    """How far the episodes of every task came after every stage that rolled it out."""
    return [
        {
            "stage": stage.index,
            "task": task["name"],
            **line["success"],
            "interval": interval_record(wilson(line["success"]["successes"], line["success"]["trials"])),
            "progress": line.get("progress"),
            "funnel": [{"subgoal": name, "reached": n} for name, n in (line.get("funnel") or {}).items()],
            "right_branch": (line.get("branches") or {}).get("right"),
            "acted_on_cue": (line.get("branches") or {}).get("acted"),
            "n_action_steps": line.get("n_action_steps"),
        }
        for stage in run.finished
        for task in run.tasks
        if (line := end_line(run, stage.index, task["name"])) and line.get("success")
    ]


def _validation_seconds(stage: StoredStage) -> float:
    return sum(line.get("seconds") or 0.0 for line in stage.validations)


def _validation_cost(run: StoredRun) -> Record:
    """What knowing costs: seconds of all validations of the finished stages beside those of their training."""
    validation = sum(_validation_seconds(stage) for stage in run.finished)
    training = sum(stage.record.get("seconds") or 0.0 for stage in run.finished)
    return {"seconds": validation, "training_seconds": training, "share": validation / training if training else None}


def _dataset(task: Record) -> Record:
    dataset = task.get("dataset") or {}
    return {
        "dataset_hash": dataset.get("hash"),
        "episodes": dataset.get("episodes"),
        "frames": dataset.get("frames"),
        "train_episodes": len(dataset.get("train_episodes") or ()),
        "held_out_episodes": len(dataset.get("held_out_episodes") or ()),
    }


def _parameters(run: StoredRun) -> list[Record]:
    """Groups of the finished stages; an unfinished one has no fingerprints after."""
    keys = ("group", "parameters", "trainable", "fingerprint_before", "fingerprint_after")
    return [
        {"stage": stage.index, **{key: group.get(key) for key in keys}}
        for stage in run.finished
        for group in stage.parameters or ()
    ]


def _hashes(run: StoredRun) -> list[Record]:
    normalization = run.record.get("normalization") or {}
    entries = [
        ("config", run.record.get("config_hash")),
        (f"normalization ({normalization.get('source', 'unknown')})", normalization.get("hash")),
        *((f"data {task['name']}", (task.get("dataset") or {}).get("hash")) for task in run.tasks),
        *(
            (
                f"{stage.folder.name}/{stage.record.get('checkpoint', 'checkpoint')}",
                stage.record.get("checkpoint_hash"),
            )
            for stage in run.stages
        ),
    ]
    return [{"of": of, "hash": value} for of, value in entries if value]


def _untrained(run: StoredRun) -> list[Record]:
    """Tasks whose stage has not begun; a joint stage, once begun, is that of all tasks."""
    if run.record.get("strategy") == "joint":
        return []
    indices = {stage.index for stage in run.stages}
    return [task for task in run.tasks if run.learnt_in()[task["name"]] not in indices]


def _missing(run: StoredRun, matrices: Mapping[str, PerformanceMatrix]) -> list[str]:
    missing = [
        f"{stage.folder.name} is {stage.record['status']} at step {stage.steps}"
        for stage in run.stages
        if not stage.finished
    ]
    missing += [f"stage {task['index']} ({task['name']}) has not been trained" for task in _untrained(run)]
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


def _without_nan(value: Any) -> Any:
    """JSON knows no NaN: a value that is not finite (a diverged training loss) becomes null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return [_without_nan(item) for item in value] if isinstance(value, list | tuple) else value
