"""Reading a run folder: what the trainer wrote, checked, with errors that name the folder and the fix.

A run may be cut short at any instant, so the last stage may be unfinished and the last line of a log
truncated; both are read as far as they go. A hole in the middle is an error: nothing after it could be
compared with anything before. After a resume the steps since the last checkpoint are logged a second time;
the later line is the one that counts.
"""

import re
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from kuavo_train.errors import RunFolderError
from kuavo_train.reading import TRAIN_AGAIN, Json, JsonValue, read_json
from kuavo_train.runs.files import read_lines
from kuavo_train.runs.lease import living_holder
from kuavo_train.runs.records import (
    GateRecord,
    GroupRecord,
    Kind,
    ReplayAudit,
    RunRecord,
    StageRecord,
    TaskRecord,
    TrainingRecord,
    ValidationRecord,
    with_played,
)
from kuavo_train.training.manifest import MANIFEST, manifest_hash

OUTPUTS = Path("outputs")
"""Where runs are, unless `outputs` says another folder."""

STAGE_FOLDER = re.compile(r"stage(\d+)_(.+)")


@dataclass(frozen=True)
class StoredStage:
    """One `stage<index>_<name>` folder. `replay`, `parameters`, `merge`: None where not written."""

    folder: Path
    index: int
    name: str
    record: StageRecord
    metrics: tuple[TrainingRecord, ...]
    validations: tuple[ValidationRecord, ...]
    replay: ReplayAudit | None
    parameters: tuple[GroupRecord, ...] | None
    gate: tuple[GateRecord, ...]
    merge: Json | None

    @property
    def finished(self) -> bool:
        return self.record.status == "finished"

    @property
    def steps(self) -> int:
        """Optimizer steps done, from the logs where the stage did not finish."""
        logged = [*(line.step for line in self.metrics), *(line.step for line in self.validations)]
        return (self.record.steps or 0) if self.finished else max(logged, default=0)

    def validation(self, kind: Kind, task: str) -> ValidationRecord | None:
        """The last of its kind."""
        return next((line for line in reversed(self.validations) if (line.kind, line.task) == (kind, task)), None)


@dataclass(frozen=True)
class StoredRun:
    """A run folder: run.json, stages in the order of training, contents of report/probes by name."""

    folder: Path
    record: RunRecord
    stages: tuple[StoredStage, ...]
    probes: Mapping[str, Json]

    @classmethod
    def open(cls, folder: Path | str) -> "StoredRun":
        """Read everything a report needs.

        Raises:
            RunFolderError: the folder is missing, is no run, has no stage, lacks one in the middle, or holds a broken
                file.
        """
        folder = Path(folder)
        if not folder.is_dir():
            is_not = "is no folder" if folder.exists() else "does not exist"
            raise RunFolderError(f"{folder} {is_not}: give the folder of a run, e.g. run=outputs/<run>")
        if not (folder / "run.json").is_file():
            raise RunFolderError(
                f"{folder} has no run.json, so it is not a run: give run=outputs/<run>, not a stage in it"
            )
        record = read_run_record(folder / "run.json")
        names = {task.name for task in record.tasks}
        found = [(path, match) for path in sorted(folder.iterdir()) if (match := STAGE_FOLDER.fullmatch(path.name))]
        stages = sorted(
            (_read_stage(path, int(match[1]), match[2], names) for path, match in found if path.is_dir()),
            key=lambda stage: stage.index,
        )
        if not stages:
            raise RunFolderError(f"{folder} has no stage in it: train one first (`make train-all-stages`)")
        probes = {path.stem: read_json(path) for path in sorted((folder / "report" / "probes").glob("*.json"))}
        run = cls(folder, record, tuple(stages), probes)
        _check_no_hole(run)
        for stage in run.stages:
            _check_own_checkpoint(run, stage)
        return run

    @property
    def tasks(self) -> tuple[TaskRecord, ...]:
        """In the order of learning."""
        return self.record.tasks

    @property
    def finished(self) -> tuple[StoredStage, ...]:
        return tuple(stage for stage in self.stages if stage.finished)

    @cached_property
    def learnt_in(self) -> dict[str, int]:
        """Task → index of the stage that learns it: its own, or under joint training the first that ends with it seen.

        Under any other strategy a task first seen by a later stage than its own is a stage that got lost.
        """
        learnt = {task.name: task.index for task in self.tasks}
        if self.record.strategy != "joint":
            return learnt
        seen = {
            line.task: stage.index
            for stage in reversed(self.finished)
            for line in stage.validations
            if line.kind == "end" and line.seen
        }
        return learnt | seen

    def end_of(self, stage_index: int, task: str) -> ValidationRecord | None:
        """The validation behind R[stage][task]: the first stage's start for row 0, else the stage's end."""
        if stage_index == 0:
            return self.stages[0].validation("start", task)
        return next(stage for stage in self.stages if stage.index == stage_index).validation("end", task)


def newest_run(outputs: Path) -> Path:
    """The run under `outputs` whose files were modified last.

    Raises:
        RunFolderError: no folder with a run.json there.
    """
    runs = [path.parent for path in outputs.glob("*/run.json")]
    if not runs:
        raise RunFolderError(
            f"no run under {outputs}/: train one first (`make train-all-stages`), or give run=<folder>"
        )

    def touched(run: Path) -> float:
        return max(path.stat().st_mtime for path in (*run.glob("run.json"), *run.glob("stage*/*.json*")))

    return max(runs, key=touched)


def finished_cells(study: Path) -> list[Path]:
    """The run folders of a study.json's finished cells: beside the study's own, in a copy as well, or as it says."""
    cells = [cell for cell in read_json(study, keys=("cells",))["cells"] if cell["status"] == "finished"]
    pairs = [(study.absolute().parent.parent / Path(cell["folder"]).name, Path(cell["folder"])) for cell in cells]
    return [beside if beside.is_dir() else folder for beside, folder in pairs]


def read_run_record(path: Path, *, remedy: str = TRAIN_AGAIN) -> RunRecord:
    """run.json. Raises `RunFolderError`, which ends in the `remedy` where the file is damaged."""
    content = read_json(path, remedy=remedy)
    _require(content, ("run", "tasks"), path)
    for task in content["tasks"]:
        _require(task, ("name", "index"), path)
    return RunRecord.from_json(content)


def _check_no_hole(run: StoredRun) -> None:
    *earlier, last = run.stages
    for stage, following in zip(earlier, run.stages[1:], strict=True):
        if stage.index == following.index:
            raise RunFolderError(
                f"{run.folder} has two folders for stage {stage.index}: {stage.folder.name} and "
                f"{following.folder.name}; "
                "move the one that does not belong to this run away"
            )
        if not stage.finished:
            raise RunFolderError(
                f"{stage.folder} is {stage.record.status}, yet a later stage exists: finish it with "
                "resume=true and "
                f"train the later stages again, or move them out of {run.folder}"
            )
    trained = {stage.index for stage in run.stages}
    for task in run.tasks:
        stage_index = run.learnt_in[task.name]
        if stage_index < last.index and stage_index not in trained:
            name = f"stage{stage_index}_{task.name}"
            raise RunFolderError(
                f"{run.folder / name} is missing, yet {last.folder.name} exists: restore the folder, or "
                "train stage "
                f"{stage_index} and the stages after it again; a task left out on purpose must not be in "
                "run.json"
            )


def _check_own_checkpoint(run: StoredRun, stage: StoredStage) -> None:
    """The checkpoint whose numbers the stage reports, where it is still there, is the one it wrote, in this run."""
    folder = stage.folder / str(stage.record.checkpoint)
    if not (folder / MANIFEST).is_file():
        return
    manifest = read_json(folder / MANIFEST)
    ours = {"run": run.record.run, "seed": run.record.seed, "normalization": run.record.normalization.hash}
    for key, expected in ours.items():
        if manifest.get(key) != expected:
            raise RunFolderError(
                f"{folder} is a checkpoint of another run: its {key} is {manifest.get(key)}, that of {run.folder} is "
                f"{expected}; move it back there, and train stage {stage.index} of this run again"
            )
    found = manifest_hash(manifest)
    if found != stage.record.checkpoint_hash:
        raise RunFolderError(
            f"{folder} is not the checkpoint that {stage.folder.name} reports on: its hash is {found[:12]}…, that in "
            f"stage.json {str(stage.record.checkpoint_hash)[:12]}…; restore it, or train the stage again"
        )


def _read_stage(folder: Path, index: int, name: str, tasks: set[str]) -> StoredStage:
    path = folder / "stage.json"
    # A kill before the first write leaves a folder without stage.json: it is a stage that was begun, no more.
    content = read_json(path) if path.is_file() else {"name": name, "index": index, "status": "interrupted"}
    _require(content, ("status",), path)
    record = StageRecord.from_json(content)
    if record.status == "running" and living_holder(folder) is None:
        record = replace(record, status="killed")
    metrics = map(TrainingRecord.from_json, _lines(folder / "metrics.jsonl", ("step",)))
    lines = _lines(folder / "validation.jsonl", ("kind", "step", "task", "loss"))
    rollouts = _lines(folder / "rollouts.jsonl", ("kind", "step", "task", "episodes"))
    validations = with_played(map(ValidationRecord.from_json, lines), rollouts)
    for line in validations:
        if line.task not in tasks:
            raise RunFolderError(
                f"{folder / 'validation.jsonl'} validates task {line.task}, which is not in run.json "
                f"({sorted(tasks)}): the stage belongs to another run; move it back there"
            )
    if record.status == "finished" and not any(line.kind == "end" for line in validations):
        raise RunFolderError(
            f"{folder} is finished, yet its validation.jsonl has no line of kind 'end': restore the file, or train "
            "the stage again"
        )
    replay, parameters, merge = (folder / name for name in ("replay_audit.json", "parameters.json", "merge.json"))
    groups = read_json(parameters, keys=("groups",))["groups"] if parameters.is_file() else None
    return StoredStage(
        folder=folder,
        index=index,
        name=name,
        record=record,
        metrics=tuple(_last_of_each({line.step: line for line in metrics})),
        validations=tuple(_last_of_each({(line.kind, line.step, line.task): line for line in validations})),
        replay=ReplayAudit.from_json(read_json(replay, keys=("drawn",))) if replay.is_file() else None,
        parameters=None if groups is None else tuple(map(GroupRecord.from_json, groups)),
        gate=tuple(map(GateRecord.from_json, _lines(folder / "gate.jsonl", ("step", "task", "change", "budget")))),
        merge=read_json(merge) if merge.is_file() else None,
    )


def _last_of_each[T: (TrainingRecord, ValidationRecord)](latest: Mapping[Hashable, T]) -> list[T]:
    """In the order of their steps."""
    return sorted(latest.values(), key=lambda line: line.step)


def _lines(path: Path, keys: tuple[str, ...]) -> list[Json]:
    """Lines that all hold `keys`; none where the file is not there."""
    lines = read_lines(path)
    for number, line in enumerate(lines, start=1):
        _require(line, keys, f"{path}: line {number}")
    return lines


def _require(content: JsonValue, keys: Iterable[str], where: Path | str) -> None:
    missing = [key for key in keys if not isinstance(content, Mapping) or key not in content]
    if missing:
        raise RunFolderError(f"{where} lacks {', '.join(map(repr, missing))}: it was not written by this trainer")
