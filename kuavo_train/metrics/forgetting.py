"""The performance matrix of a run, the metrics read from it, and the verdict on each task. Pure functions.

`R[i][j]` is the score on task j after stage i; row 0 is the policy before any training. Higher is better for
every score: a loss or an error is negated first, so a *negative* backward transfer and a *positive*
forgetting mean that something was lost, whatever was measured. l(j) is the stage that learnt task j (its own
stage; the only one under joint training), T the last stage.

    average             mean_j R[T][j]
    plasticity          mean_j R[l(j)][j]
    backward transfer   mean_{l(j)<T} (R[T][j] − R[l(j)][j])          Lopez-Paz & Ranzato, arXiv 1706.08840
    forgetting F_j      max_{l(j)≤i<T} R[i][j] − R[T][j]              Chaudhry et al., arXiv 1801.10112
    forward transfer    mean_{j>1} (R[l(j)−1][j] − R[0][j])           1706.08840
    intransigence I_j   R*[j] − R[l(j)][j], R* trained jointly        1801.10112
    LIBERO's FWT, NBT, AUC on success rates                           Liu et al., arXiv 2306.03310

A cell that a metric needs and nobody measured is a `MissingCellError` that names stage and task, never a
zero. A metric that is not defined for the run (backward transfer of a single task) is None.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Value = Any
"""A number, or an array of one for each resample: numpy computes with both alike, and metrics are of the same kind.
`Any`: who lays numbers out gets numbers, who lays arrays out gets arrays, and a union would say neither."""


class MissingCellError(ValueError):
    """A metric needs a cell of the matrix that was never measured."""


@dataclass(frozen=True)
class PerformanceMatrix:
    """R: what was measured on each task (columns) after each stage (rows).

    Attributes:
        measure: what the values are, e.g. "loss".
        higher_is_better: False for losses and errors; `score` negates them.
        tasks: column names, in the order of learning.
        learnt_in: for each task the index of the stage that learns it; may lie beyond the last row (not
            learnt yet).
        stages: row labels, 0 first (before training), then the finished stages' indices; need not be
            consecutive.
        values: one row for each stage, one value for each task as measured (not negated); None where not
            measured. Values may be arrays of one shape, resamples say: metrics are then taken of each entry.

    Raises:
        ValueError: shapes, orders or names do not fit, or a value is not finite.
    """

    measure: str
    higher_is_better: bool
    tasks: tuple[str, ...]
    learnt_in: tuple[int, ...]
    stages: tuple[int, ...]
    values: tuple[tuple[Value | None, ...], ...]

    def __post_init__(self) -> None:
        if not self.tasks or len(set(self.tasks)) != len(self.tasks):
            raise ValueError(f"{self.measure} matrix: tasks must be distinct and at least one, got {self.tasks}")
        if len(self.learnt_in) != len(self.tasks) or any(stage < 1 for stage in self.learnt_in):
            raise ValueError(
                f"{self.measure} matrix: learnt_in must give a stage from 1 on for each of {len(self.tasks)} "
                "tasks, "
                f"got {self.learnt_in}"
            )
        if not self.stages or self.stages[0] != 0 or list(self.stages) != sorted(set(self.stages)):
            raise ValueError(f"{self.measure} matrix: stages must start with 0 and increase, got {self.stages}")
        if len(self.values) != len(self.stages) or any(len(row) != len(self.tasks) for row in self.values):
            raise ValueError(
                f"{self.measure} matrix: values must be {len(self.stages)} stages × {len(self.tasks)} tasks, "
                f"got rows of {[len(row) for row in self.values]}"
            )
        for stage, row in zip(self.stages, self.values, strict=True):
            for task, value in zip(self.tasks, row, strict=True):
                if value is not None and not np.all(np.isfinite(value)):
                    raise ValueError(f"{self.measure} of task {task} after stage {stage} is {value}, not a number")

    @classmethod
    def from_cells(
        cls,
        measure: str,
        cells: Mapping[tuple[int, str], Value],
        *,
        learnt_in: Mapping[str, int],
        stages: Sequence[int],
        higher_is_better: bool,
    ) -> "PerformanceMatrix":
        """Lay (stage, task) → value out as a matrix; tasks in the order of `learnt_in`, absent cells None."""
        rows = tuple(tuple(cells.get((stage, task)) for task in learnt_in) for stage in stages)
        return cls(measure, higher_is_better, tuple(learnt_in), tuple(learnt_in.values()), tuple(stages), rows)

    @property
    def last_stage(self) -> int:
        return self.stages[-1]

    @property
    def learnt_tasks(self) -> tuple[str, ...]:
        """Tasks learnt in one of the stages that are rows."""
        return tuple(task for task in self.tasks if self.stage_of(task) in self.stages)

    @property
    def earlier_tasks(self) -> tuple[str, ...]:
        """Tasks learnt before the last stage: those that could have been forgotten."""
        return tuple(task for task in self.learnt_tasks if self.stage_of(task) < self.last_stage)

    def stage_of(self, task: str) -> int:
        """The stage that learns `task`."""
        return self.learnt_in[self.tasks.index(task)]

    def value(self, stage: int, task: str) -> Value:
        """What was measured, with its own sign. Raises MissingCellError where nothing was."""
        value = self.values[self.stages.index(stage)][self.tasks.index(task)]
        if value is None:
            when = "before training (row 0)" if stage == 0 else f"after stage {stage}"
            raise MissingCellError(f"{self.measure} of task {task} {when} is needed but was not measured")
        return value

    def score(self, stage: int, task: str) -> Value:
        """`R[stage][task]`, higher is better."""
        value = self.value(stage, task)
        return value if self.higher_is_better else -value


def average_score(matrix: PerformanceMatrix) -> Value | None:
    """Mean score over the learnt tasks after the last stage."""
    return _mean([matrix.score(matrix.last_stage, task) for task in matrix.learnt_tasks])


def plasticity(matrix: PerformanceMatrix) -> Value | None:
    """Mean score of the learnt tasks right after the stage that learnt each; the counterpart of backward transfer."""
    return _mean([matrix.score(matrix.stage_of(task), task) for task in matrix.learnt_tasks])


def backward_transfer(matrix: PerformanceMatrix) -> Value | None:
    """Mean change of the earlier tasks since they were learnt; negative when they got worse."""
    last = matrix.last_stage
    return _mean([matrix.score(last, t) - matrix.score(matrix.stage_of(t), t) for t in matrix.earlier_tasks])


def forgetting(matrix: PerformanceMatrix) -> dict[str, Value]:
    """F_j of each earlier task: its best score since it was learnt, less its score now; positive = worse."""
    return {
        task: _best(matrix.score(stage, task) for stage in matrix.stages[:-1] if stage >= matrix.stage_of(task))
        - matrix.score(matrix.last_stage, task)
        for task in matrix.earlier_tasks
    }


def mean_forgetting(matrix: PerformanceMatrix) -> Value | None:
    """Mean of F_j over the earlier tasks."""
    return _mean(list(forgetting(matrix).values()))


def forward_transfer(matrix: PerformanceMatrix) -> Value | None:
    """Mean gain on tasks *before* they are learnt, over the policy before training; needs row 0."""
    gains = []
    for task in matrix.learnt_tasks:
        before = matrix.stages[matrix.stages.index(matrix.stage_of(task)) - 1]
        if before != 0:
            gains.append(matrix.score(before, task) - matrix.score(0, task))
    return _mean(gains)


def intransigence(matrix: PerformanceMatrix, joint: Mapping[str, Value]) -> dict[str, Value]:
    """I_j: what joint training reaches on a task, less what learning it in turn reached; positive = worse.

    Args:
        joint: task → value of a jointly trained policy, in the matrix's measure and with its sign (losses as
            losses).

    Raises:
        MissingCellError: the joint run lacks a task.
    """
    sign = 1 if matrix.higher_is_better else -1
    missing = [task for task in matrix.learnt_tasks if task not in joint]
    if missing:
        raise MissingCellError(f"{matrix.measure} of task {missing[0]} is missing from the joint run")
    return {t: sign * joint[t] - matrix.score(matrix.stage_of(t), t) for t in matrix.learnt_tasks}


def mean_intransigence(matrix: PerformanceMatrix, joint: Mapping[str, Value]) -> Value | None:
    """Mean of I_j over the learnt tasks."""
    return _mean(list(intransigence(matrix, joint).values()))


def libero_nbt(matrix: PerformanceMatrix, *, relative: bool = False) -> dict[str, float]:
    """LIBERO's negative backward transfer NBT_k = mean_{τ>k} (c_{k,k} − c_{τ,k}); positive = lost.

    LIBERO also counts the last task, with 0; here it is left out, since nothing could have been forgotten of
    it.

    Args:
        relative: divide by the initial success c_{k,k}, so that tasks of unequal difficulty compare (arXiv
            2603.03818).

    Raises:
        ValueError: `relative` and a task that never succeeded after its own stage.
    """
    _require_success(matrix)
    result = {}
    for task in matrix.earlier_tasks:
        initial = matrix.score(matrix.stage_of(task), task)
        drops = [initial - matrix.score(stage, task) for stage in _stages_after(matrix, task)]
        if relative and initial <= 0:
            raise ValueError(f"task {task} had no success after its stage: its NBT cannot be normalised by it")
        result[task] = sum(drops) / len(drops) / (initial if relative else 1.0)
    return result


def libero_fwt(curves: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """LIBERO's forward transfer FWT_k: mean over evaluation epochs of c_{k,k,e}, how fast a task was learnt.

    Args:
        curves: task → its success rate at each evaluation during its own stage.

    Raises:
        MissingCellError: a task without any evaluation.
    """
    for task, curve in curves.items():
        if not curve:
            raise MissingCellError(f"success of task {task} was never measured during its stage")
    return {task: sum(curve) / len(curve) for task, curve in curves.items()}


def libero_auc(matrix: PerformanceMatrix, fwt: Mapping[str, float]) -> dict[str, float]:
    """LIBERO's AUC_k = (FWT_k + Σ_{τ>k} c_{τ,k}) / (K − k + 1): speed of learning and retention in one."""
    _require_success(matrix)
    result = {}
    for task in matrix.learnt_tasks:
        if task not in fwt:
            raise MissingCellError(f"LIBERO's FWT of task {task} is needed but was not measured")
        later = [matrix.score(stage, task) for stage in _stages_after(matrix, task)]
        result[task] = (fwt[task] + sum(later)) / (len(later) + 1)
    return result


METRICS: dict[str, tuple[str, Callable[[PerformanceMatrix], Value | None]]] = {
    "average": ("mean over tasks of R[T][j]", average_score),
    "backward transfer": (
        "mean over earlier tasks of R[T][j] − R[when learnt][j]; negative = lost",
        backward_transfer,
    ),
    "forgetting": (
        "mean over earlier tasks of best R since learnt − R[T][j]; positive = lost",
        mean_forgetting,
    ),
    "forward transfer": ("mean over later tasks of R[stage before its own][j] − R[0][j]", forward_transfer),
    "plasticity": ("mean over tasks of R[when learnt][j]: how well a task is learnt in its turn", plasticity),
}
"""Name → (definition in words, function) of the metrics that need nothing but the matrix."""


def _stages_after(matrix: PerformanceMatrix, task: str) -> list[int]:
    return [stage for stage in matrix.stages if stage > matrix.stage_of(task)]


def _require_success(matrix: PerformanceMatrix) -> None:
    if not matrix.higher_is_better:
        raise ValueError(f"LIBERO's metrics are defined on success rates, not on {matrix.measure}")


def _best(scores: Iterable[Value]) -> Value:
    return functools.reduce(np.maximum, scores)


def _mean(values: list[Value]) -> Value | None:
    return sum(values) / len(values) if values else None
