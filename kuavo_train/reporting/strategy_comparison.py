"""Several runs side by side, strategies × training seeds: run folders → the content of comparison.json.

A number of a strategy is the mean over its seeds, every seed counting once, with the interval that other seeds and
other episodes would have given: held-out demonstrations, and in closed loop the layouts that all runs played. Episodes
are resampled alike for all runs, and runs are paired by seed, so that a difference between two strategies is not
blurred by what both have in common.
"""

import contextlib
import dataclasses
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kuavo_train.errors import RunFolderError
from kuavo_train.metrics import forgetting
from kuavo_train.metrics.forgetting import PerformanceMatrix
from kuavo_train.metrics.intervals import Interval, hierarchical_bootstrap
from kuavo_train.metrics.number_format import integer, number, signed, whole_percent
from kuavo_train.metrics.verdict import VERDICTS, RetentionLimits, judge
from kuavo_train.reporting.comparability import check_comparable
from kuavo_train.reporting.run_analysis import SIGN_CONVENTION, analyse
from kuavo_train.reporting.run_metrics import (
    CLOSED_LOOP,
    MEASURES,
    change_since_learnt,
    end_line,
    episode_scores,
    interval_record,
    performance_matrix,
)
from kuavo_train.runs.stored_run import Record, StoredRun, read_run

JOINT, REFERENCE = "joint", "replay"
NOT_SETTLED = "not settled"

PerSeed = Mapping[int, np.ndarray]
"""Seed → a statistic of its run, [1 + N]: on all held-out episodes, then on N resamples of them."""


@dataclass(frozen=True)
class Asked:
    """Episodes of a task that all runs are scored on, and [1 + N, E] places in them: all once, then N resamples."""

    episodes: Sequence[int]
    rows: np.ndarray


@dataclass(frozen=True)
class Arm:
    """One strategy: seed → its run, those that got as far as the furthest of them; the others are left out."""

    strategy: str
    runs: Mapping[int, StoredRun]
    left_out: Sequence[StoredRun]
    matrices: Mapping[str, Mapping[int, PerformanceMatrix]]  # measure → seed → R, each cell [1 + N]

    @property
    def partial(self) -> bool:
        return any(
            run.learnt_in()[task["name"]] not in _stages(run) for run in self.runs.values() for task in run.tasks
        )

    def per_seed(self, measure: str, statistic: Callable[[PerformanceMatrix], Any]) -> PerSeed:
        """The statistic of every seed's R. Raises ValueError where a cell is missing or nothing is defined."""
        values = {seed: statistic(matrix) for seed, matrix in self.matrices[measure].items()}
        if not values:
            raise ValueError("it was not measured")
        if any(value is None for value in values.values()):
            raise ValueError("too few tasks have been learnt for it")
        return values


def compare(folders: Sequence[Path], limits: RetentionLimits | None = None) -> Record:
    """The content of comparison.json.

    Raises:
        RunFolderError: fewer than two runs, a folder that cannot be read, two runs that were not asked the same
            questions, or two of one strategy and seed.
    """
    limits = limits or RetentionLimits()
    runs = [read_run(folder) for folder in folders]
    if len(runs) < 2:
        raise RunFolderError(f"a comparison needs at least two runs, got {', '.join(str(run.folder) for run in runs)}")
    check_comparable(runs)
    _check_seeds(runs)
    asked = {measure: _asked(runs, measure, limits.resamples) for measure in MEASURES}
    arms = _arms(runs, asked)
    reference = arms[0]
    joint = next((arm for arm in arms if arm.strategy == JOINT and not arm.partial), None)
    records = [_run(run, limits, joint) for arm in arms for run in (*arm.runs.values(), *arm.left_out)]
    combine = _Combined({m: min((len(a.episodes) for a in of.values()), default=0) for m, of in asked.items()}, limits)
    return {
        "reference": reference.strategy,
        "seeds": sorted({int(run.record["seed"]) for run in runs}),
        "held_out_episodes": {task: len(of.episodes) for task, of in asked["loss"].items()},
        "layouts": {task: len(of.episodes) for task, of in asked["success"].items()},
        "tasks": [{"name": task["name"], "index": task["index"]} for task in runs[0].tasks],
        "partial": any(record["partial"] for record in records),
        "missing": [f"{record['run']}: {text}" for record in records for text in record["missing"]],
        "sign_convention": SIGN_CONVENTION,
        "limits": dataclasses.asdict(limits),
        "rule": limits.rule,
        "intervals": _about_intervals(arms, limits),
        "strategies": [_strategy(arm, reference, joint, combine, limits) for arm in arms],
        "runs": records,
    }


def _check_seeds(runs: Sequence[StoredRun]) -> None:
    known: dict[tuple[str, int], StoredRun] = {}
    for run in runs:
        for key in ("strategy", "seed"):
            if run.record.get(key) is None:
                raise RunFolderError(f"{run.folder}/run.json has no {key!r}: train it again with this version")
        cell = (run.record["strategy"], int(run.record["seed"]))
        if cell in known:
            raise RunFolderError(
                f"{known[cell].folder} and {run.folder} are both {cell[0]} with seed {cell[1]}: a seed counts once; "
                "leave one of them out"
            )
        known[cell] = run


def _stages(run: StoredRun) -> tuple[int, ...]:
    return tuple(stage.index for stage in run.finished)


def _asked(runs: Sequence[StoredRun], measure: str, resamples: int) -> dict[str, Asked]:
    """Task → what all runs were asked about it; a task that they did not all play in closed loop is not in it."""
    asked = {}
    for task in runs[0].tasks:
        if measure in CLOSED_LOOP:
            episodes = _layouts(runs, task["name"])
        else:
            episodes = sorted((task.get("dataset") or {}).get("held_out_episodes") or ())
            if not episodes:
                where = f"{runs[0].folder}/run.json"
                raise RunFolderError(f"{where} names no held-out episodes of {task['name']}: train it again")
        if episodes:
            size, drawing = len(episodes), np.random.default_rng([0, zlib.crc32(task["name"].encode())])
            drawn = drawing.integers(0, size, size=(resamples, size))
            asked[task["name"]] = Asked(episodes, np.concatenate([np.arange(size)[None], drawn]))
    return asked


def _layouts(runs: Sequence[StoredRun], task: str) -> list[int]:
    """Seeds of the layouts of a task that were played whenever it was rolled out, in all runs."""
    lines = (end_line(run, stage.index, task) for run in runs for stage in run.finished)
    played = [set(found) for line in lines if line and (found := episode_scores(line, "success"))]
    return sorted(set.intersection(*played)) if played else []


def _arms(runs: Sequence[StoredRun], asked: Mapping[str, Mapping[str, Asked]]) -> list[Arm]:
    """The strategies: the one that others are compared with first, joint training last."""
    names = list(dict.fromkeys(run.record["strategy"] for run in runs))
    names.sort(key=lambda name: (name == JOINT, name != REFERENCE))
    arms = []
    for name in names:
        mine = sorted((run for run in runs if run.record["strategy"] == name), key=lambda run: run.record["seed"])
        furthest = max((_stages(run) for run in mine), key=len)
        kept = {int(run.record["seed"]): run for run in mine if _stages(run) == furthest}
        matrices: dict[str, dict[int, PerformanceMatrix]] = {measure: {} for measure in MEASURES}
        for measure in MEASURES:
            for seed, run in kept.items():
                matrix = performance_matrix(run, measure, _resampled_by(run, asked))
                if matrix is not None:
                    matrices[measure][seed] = matrix
        arms.append(Arm(name, kept, [run for run in mine if run not in kept.values()], matrices))
    return arms


def _resampled_by(
    run: StoredRun, asked: Mapping[str, Mapping[str, Asked]]
) -> Callable[[Record, str], np.ndarray | None]:
    def value_of(line: Record, measure: str) -> np.ndarray | None:
        """[1 + N] the mean of a validation line over each resample of its episodes."""
        scores, of_task = episode_scores(line, measure), asked[measure].get(line["task"])
        if of_task is None or not (scores or measure == "loss"):
            return None
        if measure not in CLOSED_LOOP and sorted(scores) != of_task.episodes:
            raise RunFolderError(
                f"{run.folder}: the validation of {line['task']} in stage {line.get('stage')} must score its held-out "
                f"episodes {of_task.episodes}, got {sorted(scores)}; validate that stage again on them"
            )
        return np.array([scores[episode] for episode in of_task.episodes])[of_task.rows].mean(axis=1)

    return value_of


@dataclass(frozen=True)
class _Combined:
    """Seeds → one number with its interval; `episodes` of a task are at least so many, by measure."""

    episodes: Mapping[str, int]
    limits: RetentionLimits

    def __call__(self, values: PerSeed, measure: str = "loss") -> Record:
        stacked = np.stack([values[seed] for seed in sorted(values)], axis=1)  # [1 + N, S]
        interval = hierarchical_bootstrap(
            stacked[0], stacked[1:], episodes=self.episodes[measure], level=self.limits.confidence
        )
        by_seed = {str(seed): float(values[seed][0]) for seed in sorted(values)}
        return {**dataclasses.asdict(interval), "by_seed": by_seed}


def _strategy(arm: Arm, reference: Arm, joint: Arm | None, combine: _Combined, limits: RetentionLimits) -> Record:
    named = {measure: _metrics(arm, reference, joint, measure, combine) for measure in MEASURES}
    entry = {
        "strategy": arm.strategy,
        "seeds": sorted(arm.runs),
        "left_out": [f"{run.folder} (seed {run.record['seed']})" for run in arm.left_out],
        "partial": arm.partial,
        "stages": list(_stages(next(iter(arm.runs.values())))),
        "metrics": named,
        "tasks": [_task(arm, task["name"], combine, limits) for task in next(iter(arm.runs.values())).tasks],
        "closed_loop": [_success(arm, task["name"], combine) for task in next(iter(arm.runs.values())).tasks],
        "exposure": _exposure(arm),
    }
    return {**entry, "outcome": _outcome(entry), "evidence": _evidence(entry, reference, combine)}


def _metrics(arm: Arm, reference: Arm, joint: Arm | None, measure: str, combine: _Combined) -> Record:
    """Metric → its value over seeds, its difference from the reference's, or the reason why there is none."""

    def intransigence(of: Arm) -> PerSeed:
        if joint is None:
            raise ValueError("no finished joint run was given")
        goals = {seed: _final_values(matrix) for seed, matrix in joint.matrices[measure].items()}
        both = {seed: matrix for seed, matrix in of.matrices[measure].items() if seed in goals}
        if not both:
            raise ValueError("no joint run has the seed of one of these runs")
        return {s: np.asarray(forgetting.mean_intransigence(matrix, goals[s])) for s, matrix in both.items()}

    statistics: dict[str, tuple[str, Callable[[Arm], PerSeed]]] = {
        name: (definition, lambda of, function=function: of.per_seed(measure, function))  # type: ignore[misc]
        for name, (definition, function) in forgetting.METRICS.items()
    }
    if arm.strategy != JOINT:
        statistics["intransigence"] = (
            "mean over tasks of joint R − R[when learnt][j]; positive = learnt less than jointly",
            intransigence,
        )
    found: Record = {}
    for name, (definition, statistic) in statistics.items():
        entry: Record = {"definition": definition, "value": None, "reason": None, "difference": None}
        try:
            values = statistic(arm)
            entry["value"] = combine(values, measure)
            if arm is not reference and not (arm.partial or reference.partial):
                others = statistic(reference)
                common = {seed: values[seed] - others[seed] for seed in values if seed in others}
                entry["difference"] = combine(common, measure) if common else None
        except ValueError as error:  # a missing cell, or a metric that is not defined for so few tasks
            entry["reason"] = None if entry["value"] else str(error)
        found[name] = entry
    return found


def _final_values(matrix: PerformanceMatrix) -> dict[str, Any]:
    return {task: matrix.value(matrix.last_stage, task) for task in matrix.learnt_tasks}


def _task(arm: Arm, task: str, combine: _Combined, limits: RetentionLimits) -> Record:
    """A task's loss when learnt and now, and the verdict on its change, over the seeds of a strategy."""
    entry: Record = {"task": task, "verdict": None, "worst": None, "settled": None, "relative_change": None}
    entry["state"] = "not learnt"
    matrix = next(iter(arm.matrices["loss"].values()))
    if task not in matrix.learnt_tasks:
        return entry | {"when_learnt": None, "now": None}

    def over_seeds(statistic: Callable[[PerformanceMatrix], Any]) -> Record:
        return combine(arm.per_seed("loss", statistic))

    entry["when_learnt"] = over_seeds(lambda m: m.value(m.stage_of(task), task))
    entry["now"] = over_seeds(lambda m: m.value(m.last_stage, task))
    if task not in matrix.earlier_tasks:
        return entry | {"state": "learnt with all others" if arm.strategy == JOINT else "learnt last"}
    change = over_seeds(lambda m: m.value(m.last_stage, task) / m.value(m.stage_of(task), task) - 1)
    if len(arm.runs) == 1:  # the very interval, and so the verdict, of the run's own report
        (run,) = arm.runs.values()
        change |= interval_record(change_since_learnt(run, "loss", task, limits, relative=True)) or {}
    interval = Interval(**{key: value for key, value in change.items() if key != "by_seed"})
    verdict = judge(interval, limits)
    return entry | {
        "state": "judged",
        "verdict": verdict.word,
        "worst": verdict.worst,
        "settled": verdict.settled,
        "relative_change": change,
    }


def _success(arm: Arm, task: str, combine: _Combined) -> Record:
    """A task's success in closed loop when learnt and now, over the seeds of a strategy; None where not played."""
    entry: Record = {"task": task, "when_learnt": None, "now": None}
    moments = {
        "when_learnt": lambda m: m.value(m.stage_of(task), task),
        "now": lambda m: m.value(m.last_stage, task),
    }
    for moment, statistic in moments.items():
        with contextlib.suppress(ValueError):  # not learnt yet, or not rolled out then
            found = combine(arm.per_seed("success", statistic), "success")
            ends = {end: None if found[end] is None else min(max(found[end], 0.0), 1.0) for end in ("low", "high")}
            entry[moment] = found | ends  # widened for few seeds, an interval may reach beyond what a share can be
    return entry


def _exposure(arm: Arm) -> Record:
    """What was trained on, mean over seeds: each task's frames and passes in the stage that learns it; all, steps."""
    own: dict[str, list[int]] = {}
    passes: dict[str, list[float]] = {}
    frames, steps = [], []
    for run in arm.runs.values():
        audits = {stage.index: stage.replay for stage in run.finished if stage.replay}
        for task, stage in run.learnt_in().items():
            audit = audits.get(stage) or {}
            if task in audit.get("drawn", {}):
                own.setdefault(task, []).append(audit["drawn"][task]["frames"])
            if task in audit.get("passes", {}):
                passes.setdefault(task, []).append(audit["passes"][task])
        frames.append(sum(audit.get("total_frames") or 0 for audit in audits.values()))
        steps.append(sum(stage.steps for stage in run.finished))
    return {
        "own_frames": {task: float(np.mean(counts)) for task, counts in own.items()},
        "own_passes": {task: float(np.mean(counts)) for task, counts in passes.items()},
        "frames": float(np.mean(frames)),
        "steps": float(np.mean(steps)),
    }


def _run(run: StoredRun, limits: RetentionLimits, joint: Arm | None) -> Record:
    """What of a run's own matrix.json belongs into the comparison."""
    same_seed = None if joint is None else joint.runs.get(int(run.record["seed"]))
    analysed = analyse(run, limits, None if same_seed is run else same_seed)
    keys = ("run", "seed", "strategy", "git_commit", "partial", "missing", "tasks", "stages", "verdicts", "matrices")
    failed = [check["name"] for check in analysed["checks"] if check["passed"] is False]
    return {"folder": str(run.folder), **{key: analysed[key] for key in (*keys, "hashes")}, "failed_checks": failed}


def _about_intervals(arms: Sequence[Arm], limits: RetentionLimits) -> str:
    fewest = min(len(arm.runs) for arm in arms)
    level = whole_percent(limits.confidence)
    text = (
        f"Intervals ({level}) come from a bootstrap over training seeds and held-out episodes "
        f"({integer(limits.resamples)} resamples). The same episodes are drawn for every run, and differences are "
        "paired by seed and episode."
    )
    if fewest == 1:
        text += " A strategy with a single seed has an interval over episodes alone: other seeds may well fall outside."
    elif fewest < 5:
        text += (
            f" It is widened for the few there are, as Student's interval is: where {fewest} seeds differ it is wide, "
            "and further seeds narrow it most."
        )
    return text


def _outcome(entry: Record) -> str:
    """How many of the earlier tasks got which verdict."""
    words = [task["verdict"] if task["settled"] else NOT_SETTLED for task in entry["tasks"] if task["verdict"]]
    if not words:
        return "all tasks at once" if entry["strategy"] == JOINT else "nothing to forget yet"
    return ", ".join(f"{words.count(word)} {word}" for word in (*VERDICTS, NOT_SETTLED) if word in words)


def _evidence(entry: Record, reference: Arm, combine: _Combined) -> str:
    """The sentence at the top of the page."""
    count = len(entry["seeds"])
    seeds = f"{count} seed{'s' if count > 1 else ''}, {combine.episodes['loss']} held-out episodes a task"
    start = f"Partial: {len(entry['stages'])} stages finished. " if entry["partial"] else ""
    average = entry["metrics"]["loss"]["average"]["value"]
    if average is None:
        return f"{start}Nothing was learnt to the end ({seeds})."
    text = f"{start}Held-out loss {number(-average['estimate'])} in the end, mean over tasks"
    transfer = entry["metrics"]["loss"]["backward transfer"]
    if transfer["value"] is None:
        return f"{text} ({seeds})."
    text += f"; on the earlier tasks it changed by {_change(transfer['value'])} since they were learnt ({seeds})."
    difference = transfer["difference"]
    if difference is not None:
        text += f" Against {reference.strategy}: {_change(difference)}"
        shown = difference["low"] is not None and not difference["low"] <= 0 <= difference["high"]
        text += "." if shown else ", so that these runs do not show which of the two forgets more."
    return text


def _change(interval: Record) -> str:
    """A backward transfer, which is negated, as a change of the loss: +0.182 [+0.165, +0.200]."""
    text = signed(-interval["estimate"])
    return text if interval["low"] is None else f"{text} [{signed(-interval['high'])}, {signed(-interval['low'])}]"


def comparison_rows(comparison: Record) -> list[Record]:
    """comparison.csv: one line for each number, of strategies over their seeds and of single runs."""
    rows: list[Record] = []

    def add(kind: str, interval: Record | None, **of: Any) -> None:
        if interval is not None:
            about = {key: interval[key] for key in ("estimate", "low", "high", "level")}
            rows.append({"what": kind, **of, **about, "seeds": len(interval["by_seed"])})
            rows.extend(
                {"what": kind, **of, "seed": int(seed), "estimate": value, "seeds": 1}
                for seed, value in interval["by_seed"].items()
            )

    for entry in comparison["strategies"]:
        strategy = entry["strategy"]
        for measure, named in entry["metrics"].items():
            for metric, found in named.items():
                add(metric, found["value"], strategy=strategy, measure=measure)
                add(f"{metric}: difference from {comparison['reference']}", found["difference"],
                    strategy=strategy, measure=measure)  # fmt: skip
        for task in entry["tasks"]:
            for key in ("when_learnt", "now", "relative_change"):
                add(key, task[key], strategy=strategy, measure="loss", task=task["task"])
        for task in entry["closed_loop"]:
            for key in ("when_learnt", "now"):
                add(key, task[key], strategy=strategy, measure="success", task=task["task"])
        for what in ("own_frames", "own_passes"):
            rows.extend(
                {"what": what, "strategy": strategy, "task": task, "estimate": value}
                for task, value in entry["exposure"][what].items()
            )
    for run in comparison["runs"]:
        about = {"strategy": run["strategy"], "seed": run["seed"]}
        for measure, matrix in run["matrices"].items():
            for row in matrix["rows"]:
                rows.extend(
                    {
                        "what": f"R after stage {row['stage']}",
                        **about,
                        "measure": measure,
                        "task": task,
                        "estimate": value,
                    }
                    for task, value in row["values"].items()
                    if value is not None
                )
    return rows


CSV_COLUMNS = ("what", "strategy", "seed", "measure", "task", "estimate", "low", "high", "level", "seeds")
