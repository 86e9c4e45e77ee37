"""Several runs side by side, strategies × training seeds: stored runs → the numbers of a comparison.

What a study varied beside them makes strategies of their own here: `replay memory=strong` is another than
`replay memory=standard`.

A number of a strategy is the mean over its seeds, every seed counting once, with the interval that other seeds and
other episodes would have given: held-out demonstrations, and in closed loop the layouts that all runs played. Episodes
are resampled alike for all runs, and runs are paired by seed, so that a difference between two strategies is not
blurred by what both have in common.
"""

import contextlib
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from kuavo_train.errors import RunFolderError
from kuavo_train.metrics import forgetting
from kuavo_train.metrics.forgetting import PerformanceMatrix, Value
from kuavo_train.metrics.intervals import Interval, hierarchical_bootstrap
from kuavo_train.metrics.verdict import RetentionLimits, judge
from kuavo_train.reading import Json
from kuavo_train.reporting.comparability import check_comparable
from kuavo_train.reporting.run_analysis import analyse
from kuavo_train.reporting.run_metrics import change_since_learnt, performance_matrix
from kuavo_train.runs.records import CLOSED_LOOP, MEASURES, Measure, ReplayAudit, ValidationRecord
from kuavo_train.runs.stored_run import StoredRun

JOINT, REFERENCE = "joint", "replay"
WITHOUT_REPLAY = ("ewc", "merge")
"""Strategies that replay nothing by themselves."""

PerSeed = Mapping[int, np.ndarray]
"""Seed → a statistic of its run, [1 + N]: on all held-out episodes, then on N resamples of them."""


@dataclass(frozen=True)
class Estimate(Interval):
    """A mean over training seeds, each of which has its own value."""

    by_seed: dict[str, float]


@dataclass(frozen=True)
class MetricOfStrategy:
    """A metric over the seeds, and what it differs by from the reference's; or the reason why there is none."""

    definition: str
    value: Estimate | None
    reason: str | None
    difference: Estimate | None


@dataclass(frozen=True)
class TaskOfStrategy:
    """A task's held-out loss when learnt and now, and the verdict on its change (see `metrics.verdict.Verdict`)."""

    task: str
    verdict: str | None = None
    worst: str | None = None
    settled: bool | None = None
    relative_change: Estimate | None = None
    state: str = "not learnt"
    when_learnt: Estimate | None = None
    now: Estimate | None = None


@dataclass(frozen=True)
class SuccessOfStrategy:
    """A task's success in closed loop when learnt and now; None where it was not performed."""

    task: str
    when_learnt: Estimate | None
    now: Estimate | None


@dataclass(frozen=True)
class Exposure:
    """What was trained on, mean over seeds: each task's frames and passes in the stage that learns it; all, steps."""

    own_frames: dict[str, float]
    own_passes: dict[str, float]
    frames: float
    steps: float


@dataclass(frozen=True)
class StrategyNumbers:
    """One strategy. `left_out` are the runs that did not get as far as the furthest; `stages` those finished."""

    strategy: str
    seeds: list[int]
    left_out: list[str]
    partial: bool
    stages: list[int]
    metrics: dict[Measure, dict[str, MetricOfStrategy]]
    tasks: list[TaskOfStrategy]
    closed_loop: list[SuccessOfStrategy]
    exposure: Exposure


@dataclass(frozen=True)
class Comparison:
    """
    Attributes:
        reference: the strategy that the others are compared with.
        held_out_episodes, layouts: task → how many all runs were scored on; a task not performed by all has no layouts.
        tasks: task → its place in the order of learning.
        runs: what of each run's own matrix.json belongs here.
    """

    reference: str
    seeds: list[int]
    held_out_episodes: dict[str, int]
    layouts: dict[str, int]
    tasks: dict[str, int]
    limits: RetentionLimits
    strategies: list[StrategyNumbers]
    runs: list[Json]

    @property
    def partial(self) -> bool:
        return any(run["partial"] for run in self.runs)

    @property
    def missing(self) -> list[str]:
        return [f"{run['run']}: {text}" for run in self.runs for text in run["missing"]]


@dataclass(frozen=True)
class SharedEpisodes:
    """Episodes of a task that all runs are scored on, and [1 + N, E] places in them: all once, then N resamples."""

    episodes: Sequence[int]
    rows: np.ndarray


@dataclass(frozen=True)
class Arm:
    """One strategy: seed → its run, those that got as far as the furthest of them; the others are left out."""

    strategy: str
    runs: Mapping[int, StoredRun]
    left_out: Sequence[StoredRun]
    matrices: Mapping[Measure, Mapping[int, PerformanceMatrix]]  # measure → seed → R, each cell [1 + N]

    @property
    def first(self) -> StoredRun:
        return next(iter(self.runs.values()))

    @property
    def is_joint(self) -> bool:
        return self.first.record.strategy == JOINT

    @property
    def partial(self) -> bool:
        return any(stage not in _stages(run) for run in self.runs.values() for stage in run.learnt_in.values())

    def per_seed(self, measure: Measure, statistic: Callable[[PerformanceMatrix], Value]) -> PerSeed:
        """The statistic of every seed's R. Raises ValueError where a cell is missing or nothing is defined."""
        values = {seed: statistic(matrix) for seed, matrix in self.matrices[measure].items()}
        if not values:
            raise ValueError("it was not measured")
        if any(value is None for value in values.values()):
            raise ValueError("too few tasks have been learnt for it")
        return values


def compare(runs: Sequence[StoredRun], limits: RetentionLimits | None = None) -> Comparison:
    """
    Raises:
        RunFolderError: fewer than two runs, two runs that were not validated on the same questions, or two of one
            strategy and seed.
    """
    limits = limits or RetentionLimits()
    if len(runs) < 2:
        raise RunFolderError(f"a comparison needs at least two runs, got {', '.join(str(run.folder) for run in runs)}")
    check_comparable(runs)
    _check_seeds(runs)
    shared = {measure: _shared_episodes(runs, measure, limits.resamples) for measure in MEASURES}
    arms = _arms(runs, shared)
    reference = arms[0]
    combine = _Combined({m: min((len(a.episodes) for a in of.values()), default=0) for m, of in shared.items()}, limits)
    return Comparison(
        reference=reference.strategy,
        seeds=sorted({_seed(run) for run in runs}),
        held_out_episodes={task: len(of.episodes) for task, of in shared["loss"].items()},
        layouts={task: len(of.episodes) for task, of in shared["success"].items()},
        tasks={task.name: task.index for task in runs[0].tasks},
        limits=limits,
        strategies=[_strategy(arm, reference, _joint_of(arm, arms), combine) for arm in arms],
        runs=[_run(run, limits, _joint_of(arm, arms)) for arm in arms for run in (*arm.runs.values(), *arm.left_out)],
    )


def _joint_of(arm: Arm, arms: Sequence[Arm]) -> Arm | None:
    """Joint training with the same of what else was varied; replay's settings are none of its own."""
    return next(
        (joint for joint in arms if joint.is_joint and not joint.partial and _beside(joint) == _beside(arm)), None
    )


def _beside(arm: Arm) -> dict[str, str]:
    return {axis: value for axis, value in arm.first.record.axes.items() if not axis.startswith("replay.")}


def _seed(run: StoredRun) -> int:
    assert run.record.seed is not None, "checked"
    return run.record.seed


def _check_seeds(runs: Sequence[StoredRun]) -> None:
    known: dict[tuple[str, int], StoredRun] = {}
    for run in runs:
        for key in ("strategy", "seed"):
            if getattr(run.record, key) is None:
                raise RunFolderError(f"{run.folder}/run.json has no {key!r}: train it again with this version")
        cell = _strategy_of(run), _seed(run)
        if cell in known:
            raise RunFolderError(
                f"{known[cell].folder} and {run.folder} are both {cell[0]} with seed {cell[1]}: a seed counts once; "
                "leave one of them out"
            )
        known[cell] = run


def _strategy_of(run: StoredRun) -> str:
    """Its name, what it is combined with, of a replay buffer the share and what is not the default, and what else a
    study varied, where it is not that.

    Such as `merge + replay`, `replay 0.02 phase memory=strong`.
    """
    assert run.record.strategy is not None, "checked"
    settings = run.record.strategy_settings
    beside = ["+ replay"] if settings.get("mixture") == "replay" and run.record.strategy in WITHOUT_REPLAY else []
    replay = settings.get("replay") or {}
    if "share" in replay:
        beside.append(f"replay.share={replay['share']:g}")
    if buffer := {key: value for key, value in replay.items() if key != "share"}:
        others = [buffer[key] for key, default in (("unit", "episode"), ("select", "random")) if buffer[key] != default]
        beside += [f"{buffer['buffer']:g}", *others]
    varied = [f"{axis}={value}" for axis, value in run.record.axes.items() if not axis.startswith("replay.")]
    return " ".join([run.record.strategy, *beside, *varied])


def _stages(run: StoredRun) -> tuple[int, ...]:
    return tuple(stage.index for stage in run.finished)


def _shared_episodes(runs: Sequence[StoredRun], measure: Measure, resamples: int) -> dict[str, SharedEpisodes]:
    """Task → the episodes that all runs have; a task that they did not all perform in closed loop is not in it."""
    shared = {}
    for task in runs[0].tasks:
        if measure in CLOSED_LOOP:
            episodes = _layouts(runs, task.name)
        else:
            episodes = _validated(runs, task.name)
            if not episodes:
                where = f"{runs[0].folder}/run.json"
                raise RunFolderError(f"{where} names no held-out episodes of {task.name}: train it again")
        if episodes:
            size, drawing = len(episodes), np.random.default_rng([0, zlib.crc32(task.name.encode())])
            drawn = drawing.integers(0, size, size=(resamples, size))
            shared[task.name] = SharedEpisodes(episodes, np.concatenate([np.arange(size)[None], drawn]))
    return shared


def _validated(runs: Sequence[StoredRun], task: str) -> list[int]:
    """The held-out episodes of a task that all runs validate; runs of other lengths may validate more or fewer."""
    parts = [set(entry.dataset.validated) for run in runs for entry in run.tasks if entry.name == task]
    return sorted(set.intersection(*parts))


def _layouts(runs: Sequence[StoredRun], task: str) -> list[int]:
    """Seeds of the layouts of a task that were played whenever it was rolled out, in all runs."""
    lines = (run.end_of(stage.index, task) for run in runs for stage in run.finished)
    played = [set(found) for line in lines if line is not None and (found := line.scores("success"))]
    return sorted(set.intersection(*played)) if played else []


def _arms(runs: Sequence[StoredRun], shared: Mapping[Measure, Mapping[str, SharedEpisodes]]) -> list[Arm]:
    """The strategies: the one that others are compared with first, joint training last."""
    kinds = {_strategy_of(run): run.record.strategy for run in runs}
    names = sorted(kinds, key=lambda name: (kinds[name] == JOINT, kinds[name] != REFERENCE))
    arms = []
    for name in names:
        mine = sorted((run for run in runs if _strategy_of(run) == name), key=_seed)
        furthest = max((_stages(run) for run in mine), key=len)
        kept = {_seed(run): run for run in mine if _stages(run) == furthest}
        matrices: dict[Measure, dict[int, PerformanceMatrix]] = {measure: {} for measure in MEASURES}
        for measure in MEASURES:
            for seed, run in kept.items():
                matrix = performance_matrix(run, measure, _resampled_by(run, shared))
                if matrix is not None:
                    matrices[measure][seed] = matrix
        arms.append(Arm(name, kept, [run for run in mine if run not in kept.values()], matrices))
    return arms


def _resampled_by(
    run: StoredRun, shared: Mapping[Measure, Mapping[str, SharedEpisodes]]
) -> Callable[[ValidationRecord, Measure], np.ndarray | None]:
    def value_of(line: ValidationRecord, measure: Measure) -> np.ndarray | None:
        """[1 + N] the mean of a validation line over each resample of its episodes."""
        scores, of_task = line.scores(measure), shared[measure].get(line.task)
        if of_task is None or not (scores or measure == "loss"):
            return None
        if measure not in CLOSED_LOOP and sorted(scores) != of_task.episodes:
            raise RunFolderError(
                f"{run.folder}: the validation of {line.task} in stage {line.moment.stage} must score its held-out "
                f"episodes {of_task.episodes}, got {sorted(scores)}; validate that stage again on them"
            )
        return np.array([scores[episode] for episode in of_task.episodes])[of_task.rows].mean(axis=1)

    return value_of


@dataclass(frozen=True)
class _Combined:
    """Seeds → one number with its interval; `episodes` of a task are at least so many, by measure."""

    episodes: Mapping[Measure, int]
    limits: RetentionLimits

    def __call__(self, values: PerSeed, measure: Measure = "loss") -> Estimate:
        stacked = np.stack([values[seed] for seed in sorted(values)], axis=1)  # [1 + N, S]
        interval = hierarchical_bootstrap(
            stacked[0], stacked[1:], episodes=self.episodes[measure], level=self.limits.confidence
        )
        return Estimate(**asdict(interval), by_seed={str(seed): float(values[seed][0]) for seed in sorted(values)})


def _strategy(arm: Arm, reference: Arm, joint: Arm | None, combine: _Combined) -> StrategyNumbers:
    tasks = [task.name for task in arm.first.tasks]
    return StrategyNumbers(
        strategy=arm.strategy,
        seeds=sorted(arm.runs),
        left_out=[f"{run.folder} (seed {run.record.seed})" for run in arm.left_out],
        partial=arm.partial,
        stages=list(_stages(arm.first)),
        metrics={measure: _metrics(arm, reference, joint, measure, combine) for measure in MEASURES},
        tasks=[_task(arm, task, combine) for task in tasks],
        closed_loop=[_success(arm, task, combine) for task in tasks],
        exposure=_exposure(arm),
    )


def _metrics(
    arm: Arm, reference: Arm, joint: Arm | None, measure: Measure, combine: _Combined
) -> dict[str, MetricOfStrategy]:
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
    if not arm.is_joint:
        statistics["intransigence"] = (
            "mean over tasks of joint R − R[when learnt][j]; positive = learnt less than jointly",
            intransigence,
        )
    found = {}
    for name, (definition, statistic) in statistics.items():
        value, reason, difference = None, None, None
        try:
            values = statistic(arm)
            value = combine(values, measure)
            if arm is not reference and not (arm.partial or reference.partial):
                others = statistic(reference)
                common = {seed: values[seed] - others[seed] for seed in values if seed in others}
                difference = combine(common, measure) if common else None
        except ValueError as error:  # a missing cell, or a metric that is not defined for so few tasks
            reason = None if value else str(error)
        found[name] = MetricOfStrategy(definition, value, reason, difference)
    return found


def _final_values(matrix: PerformanceMatrix) -> dict[str, Value]:
    return {task: matrix.value(matrix.last_stage, task) for task in matrix.learnt_tasks}


def _task(arm: Arm, task: str, combine: _Combined) -> TaskOfStrategy:
    matrix = next(iter(arm.matrices["loss"].values()))
    if task not in matrix.learnt_tasks:
        return TaskOfStrategy(task)

    def over_seeds(statistic: Callable[[PerformanceMatrix], Value]) -> Estimate:
        return combine(arm.per_seed("loss", statistic))

    found = TaskOfStrategy(
        task,
        when_learnt=over_seeds(lambda m: m.value(m.stage_of(task), task)),
        now=over_seeds(lambda m: m.value(m.last_stage, task)),
    )
    if task not in matrix.earlier_tasks:
        return replace(found, state="learnt with all others" if arm.is_joint else "learnt last")
    change = over_seeds(lambda m: m.value(m.last_stage, task) / m.value(m.stage_of(task), task) - 1)
    if len(arm.runs) == 1:  # the very interval, and so the verdict, of the run's own report
        own = change_since_learnt(arm.first, "loss", task, combine.limits, relative=True)
        change = change if own is None else replace(change, **asdict(own))
    verdict = judge(change, combine.limits)
    return replace(
        found,
        state="judged",
        verdict=verdict.word,
        worst=verdict.worst,
        settled=verdict.settled,
        relative_change=change,
    )


def _success(arm: Arm, task: str, combine: _Combined) -> SuccessOfStrategy:
    def over_seeds(statistic: Callable[[PerformanceMatrix], Value]) -> Estimate | None:
        with contextlib.suppress(ValueError):  # not learnt yet, or not rolled out then
            found = combine(arm.per_seed("success", statistic), "success")
            # Widened for few seeds, an interval may reach beyond what a share can be.
            return replace(found, low=_as_share(found.low), high=_as_share(found.high))
        return None

    return SuccessOfStrategy(
        task,
        when_learnt=over_seeds(lambda m: m.value(m.stage_of(task), task)),
        now=over_seeds(lambda m: m.value(m.last_stage, task)),
    )


def _as_share(end: float | None) -> float | None:
    return None if end is None else min(max(end, 0.0), 1.0)


def _exposure(arm: Arm) -> Exposure:
    own: dict[str, list[int]] = {}
    passes: dict[str, list[float]] = {}
    frames, steps = [], []
    for run in arm.runs.values():
        audits: dict[int, ReplayAudit] = {s.index: s.replay for s in run.finished if s.replay is not None}
        for task, stage in run.learnt_in.items():
            if stage in audits and task in audits[stage].drawn:
                own.setdefault(task, []).append(audits[stage].drawn[task].frames)
            if stage in audits and task in audits[stage].passes:
                passes.setdefault(task, []).append(audits[stage].passes[task])
        frames.append(sum(audit.total_frames or 0 for audit in audits.values()))
        steps.append(sum(stage.steps for stage in run.finished))
    return Exposure(
        own_frames={task: float(np.mean(counts)) for task, counts in own.items()},
        own_passes={task: float(np.mean(counts)) for task, counts in passes.items()},
        frames=float(np.mean(frames)),
        steps=float(np.mean(steps)),
    )


def _run(run: StoredRun, limits: RetentionLimits, joint: Arm | None) -> Json:
    """What of a run's own matrix.json belongs into the comparison."""
    same_seed = None if joint is None else joint.runs.get(_seed(run))
    matrix = analyse(run, limits=limits, joint=None if same_seed is run else same_seed).matrix
    keys = ("run", "seed", "strategy", "git_commit", "partial", "missing", "tasks", "stages", "verdicts", "matrices")
    failed = [check["name"] for check in matrix["checks"] if check["passed"] is False]
    about = {key: matrix[key] for key in (*keys, "hashes")}
    return {"folder": str(run.folder), **about, "strategy": _strategy_of(run), "failed_checks": failed}
