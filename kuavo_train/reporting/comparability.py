"""Whether runs were validated on the same questions: only then do their losses compare."""

from collections.abc import Collection, Mapping, Sequence
from functools import partial

from kuavo_train.errors import RunFolderError
from kuavo_train.reading import read_yaml
from kuavo_train.runs.stored_run import StoredRun

SAME_DATA = "train both on the same data with the same split and normalization (data.*, policy.*, validation.draws)"


def check_comparable(runs: Sequence[StoredRun]) -> None:
    """Raises `RunFolderError`, naming both folders and the fix, unless losses of all runs mean the same."""
    first, *others = runs
    for other in others:
        shared = {task.name: _validated_by(task.name, (first, other)) for task in first.tasks}
        policy = _policy if first.record.axes == other.record.axes else partial(_predictions, shared=shared)
        ours, theirs = ({**_questions(run), **policy(run)} for run in (first, other))
        for what, answer in ours.items():
            if answer != theirs[what]:
                raise RunFolderError(
                    f"{first.folder} and {other.folder} have different {what} ({_short(answer)} and "
                    f"{_short(theirs[what])}): their losses do not compare; {SAME_DATA}, or leave one of them out"
                )


def _questions(run: StoredRun) -> dict[str, object]:
    """What decides the meaning of a held-out loss, by name."""
    draws = {line.held_out.draws for stage in run.stages for line in stage.validations}
    return {
        "tasks": {task.name: task.index for task in run.tasks},
        "normalization hashes": run.record.normalization.hash,
        "data hashes": {task.name: task.dataset.hash for task in run.tasks},
        "held-out episodes": {task.name: sorted(task.dataset.held_out_episodes) for task in run.tasks},
        "numbers of draws in validation": sorted(number for number in draws if number is not None),
    }


def _policy(run: StoredRun) -> dict[str, object]:
    return {"hashes of the policy's configuration": run.record.config_hash}


def _validated_by(task: str, runs: Sequence[StoredRun]) -> set[int]:
    """The held-out episodes of a task that all runs validate."""
    return set.intersection(*({*entry.dataset.validated} for run in runs for entry in run.tasks if entry.name == task))


def _predictions(run: StoredRun, *, shared: Mapping[str, Collection[int]]) -> dict[str, object]:
    """Of a study that varied the policy too: what is predicted, from which frames, whatever predicts it.

    Args:
        shared: task → the episodes that the runs which are compared have in common.
    """
    path = run.stages[0].folder / "config.yaml"
    policy = read_yaml(path).get("policy", {}) if path.is_file() else {}
    lines = {task.name: run.stages[0].validation("start", task.name) for task in run.tasks}
    return {
        "kinds of policy": policy.get("type"),
        "lengths of chunks": policy.get("chunk_size"),
        "numbers of queries in validation": {
            task: sum(each.frames or 0 for each in line.held_out.episodes if each.episode in shared.get(task, ()))
            for task, line in lines.items()
            if line
        },
    }


def _short(answer: object) -> str:
    """Hashes by their beginning, so that an error stays a line."""
    if isinstance(answer, dict):
        return ", ".join(f"{key} {_short(value)}" for key, value in answer.items())
    return f"{answer[:12]}…" if isinstance(answer, str) and len(answer) > 16 else str(answer)
