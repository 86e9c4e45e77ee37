"""The files of a stage as it begins and ends: what it writes, forgets, and says of itself."""

import contextlib
from collections.abc import Iterator
from hashlib import sha256

from kuavo_train.errors import Interrupted, RunError
from kuavo_train.reading import JsonValue, read_json
from kuavo_train.runs.files import now, write_json
from kuavo_train.runs.run_facts import write_run_facts
from kuavo_train.stage.remedies import reported_in_one_line
from kuavo_train.stage.setup import OpenedStage
from kuavo_train.training.parameter_groups import ParameterGroup, take_fingerprints
from kuavo_train.training.tracking import NoTracker, Tracker, make_tracker
from kuavo_train.training.trainer import Progress


def open_folder(opened: OpenedStage) -> None:
    """Create the stage's files; forget what lies beyond the checkpoint the stage resumes from."""
    config, folder, resumed = opened.config, opened.folder, opened.start.resumed
    if not opened.accelerator.is_main_process:
        return
    config.run_folder.mkdir(parents=True, exist_ok=True)
    write_json(config.run_folder / "normalization.json", opened.normalization.to_json())
    write_run_facts(config, opened.curriculum, opened.tasks, opened.normalization)
    folder.path.mkdir(parents=True, exist_ok=True)
    step = resumed.step if resumed else -1
    for lines in (folder.metrics, folder.validations, folder.rollouts, folder.gate):
        lines.forget(lambda line: line["step"] > step or line.get("kind") == "end")
    began = {} if resumed else {"started": now()}
    stage = {
        "name": config.stage.name,
        "index": config.stage.index,
        "epochs": config.training.epochs,
        "result": config.validation.result,
    }
    caches = [cache.name for cache in opened.images.caches]
    folder.write(**stage, caches=caches, total_steps=opened.timetable.steps, status="running", reason=None, **began)
    folder.answer_for(config)
    (folder.path / "checkpoints").mkdir(exist_ok=True)


@contextlib.contextmanager
def true_end(opened: OpenedStage, progress: Progress) -> Iterator[None]:
    """However the stage ends, stage.json says how, and what the user can mend is reported in a line."""
    folder = opened.folder

    def write_end(**values: JsonValue) -> None:
        if opened.accelerator.is_main_process:
            folder.write_end(steps=progress.step, **values)

    try:
        with reported_in_one_line(opened.config):
            yield
    except (Interrupted, KeyboardInterrupt):
        write_end(status="interrupted")
        raise
    except RunError as error:
        write_end(status="failed", reason=str(error))
        last = folder.checkpoints.latest()
        kept = f"the last good checkpoint is {last.folder}" if last else "no checkpoint was written yet"
        raise type(error)(f"{error}; {kept}") from error
    except BaseException as error:
        write_end(status="failed", reason=f"{type(error).__name__}: {error}")
        raise


def fingerprints_before(opened: OpenedStage) -> list[ParameterGroup]:
    """Fingerprints when the stage began; a resumed stage compares with its own beginning, not its middle."""
    path = opened.folder.path / "parameters.json"
    groups = take_fingerprints(opened.built.policy)
    if opened.start.resumed is not None:
        return [ParameterGroup.when_begun(record) for record in read_json(path, keys=("groups",))["groups"]]
    if opened.accelerator.is_main_process:
        write_json(path, {"groups": [group.as_begun() for group in groups]})
    return groups


def forget_unfinished_validation(opened: OpenedStage, progress: Progress) -> None:
    """What of it was written is measured again."""
    if progress.validation_due and opened.accelerator.is_main_process:
        for lines in (opened.folder.validations, opened.folder.rollouts, opened.folder.gate):
            lines.forget(lambda line: line["step"] >= progress.step)


@contextlib.contextmanager
def tracker_of(opened: OpenedStage) -> Iterator[Tracker]:
    """One run per stage, named by when the run was created: a resumed stage goes on with it."""
    config = opened.config
    tracker: Tracker = NoTracker()
    if opened.accelerator.is_main_process:
        created = read_json(config.run_folder / "run.json", keys=("created",))["created"]
        about = f"{created}/{config.run}/{config.stage.folder_name}"
        tracker = make_tracker(config, run_id=sha256(about.encode()).hexdigest()[:16], folder=opened.folder.path)
    try:
        yield tracker
    finally:
        tracker.finish()
