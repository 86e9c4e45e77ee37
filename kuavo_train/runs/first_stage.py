"""Cells of a study that would train the same first stage train it once: the others go on from its last checkpoint.

What comes after the last step, such as what a strategy or a replay buffer keeps of the task, is each cell's own. So a
cell that has taken over a first stage ends in the same bits as if it had trained it.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from kuavo_train.compose import stages_to_run
from kuavo_train.config import RunConfig
from kuavo_train.errors import ConfigError
from kuavo_train.reading import Json, JsonValue
from kuavo_train.runs.files import write_json
from kuavo_train.runs.run_folder import StageFolder
from kuavo_train.runs.settings import is_free
from kuavo_train.training.checkpoint import Checkpoint, link_or_copy
from kuavo_train.training.manifest import MANIFEST

OURS = ("replay", "sequential", "ewc", "merge", "adapters")
"""Strategies that train the first stage alike. Joint training has another one, and a user's own may do anything."""

OF_LATER = (
    "strategy",
    "mixture",
    "ewc",
    "merge",
    "adapters",
    "replay",
    "forgetting",
    "training.freeze",
    "stage.replay",
)
"""What they heed in later stages alone, or after the first one's last step."""

COPIED = ("metrics.jsonl", "validation.jsonl", "rollouts.jsonl", "parameters.json")


def first_stage_key(configs: Sequence[RunConfig]) -> str:
    """A hash of all that decides what the first stage of a run is trained to. `configs` has one entry per task."""
    first = stages_to_run(configs)[0]
    of_later = OF_LATER if first.strategy in OURS else ()
    decides = {key: value for key, value in _leaves(asdict(first)) if not is_free(key) and not _among(key, of_later)}
    tasks = [
        {key: value for key, value in _leaves(asdict(each.stage), "stage.") if not is_free(key)} for each in configs
    ]
    places = [each.stage.root for each in configs]
    content = json.dumps([decides, tasks, places], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()


def _leaves(values: Json, where: str = "") -> Iterator[tuple[str, JsonValue]]:
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{where}{name}.")
        else:
            yield f"{where}{name}", value


def _among(key: str, keys: Iterable[str]) -> bool:
    return any(key == each or key.startswith(f"{each}.") for each in keys)


def take_over(source: StageFolder, target: StageFolder, config: RunConfig, about: Json) -> bool:
    """Let a first stage that has not begun go on from the last step of a finished one, as that stood after it.

    Files of checkpoints are hard links where there are such.

    Args:
        config: of the stage that goes on, in `target`.
        about: where it comes from, for stage.json.

    Returns:
        Whether there was a whole checkpoint to go on from.
    """
    last = _last_step(source)
    if last is None:
        return False
    target.path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(source.path.parent / "normalization.json", target.path.parent / "normalization.json")
    partial = StageFolder(target.path.with_name(f".{target.path.name}.partial"))
    shutil.rmtree(partial.path, ignore_errors=True)
    (partial.path / "checkpoints").mkdir(parents=True)
    for name in COPIED:
        if (source.path / name).is_file():
            shutil.copy2(source.path / name, partial.path / name)
    was = source.about
    for step in {last.step, was["best"]["step"]}:
        _take(source.checkpoints.at(step), partial.path / "checkpoints", run=config.run)
    partial.checkpoints.point("last", last.step)
    partial.answer_for(config)
    stage = {key: was[key] for key in ("name", "index", "epochs", "result", "total_steps", "started") if key in was}
    partial.write(**stage, status="interrupted", steps=last.step, taken_over={**about, "checkpoint": last.hash})
    shutil.rmtree(target.path, ignore_errors=True)  # nothing but what a kill left hidden
    partial.path.rename(target.path)
    return True


def _last_step(stage: StageFolder) -> Checkpoint | None:
    """The checkpoint of a finished stage's last step, if it is whole and training can go on from it."""
    try:
        if stage.status != "finished" or not (stage.path.parent / "normalization.json").is_file():
            return None
        last = stage.checkpoints.latest()
        if last is None or last.step != stage.about.get("steps"):
            return None
        for step in {last.step, stage.about["best"]["step"]}:
            stage.checkpoints.at(step).verify()
    except (ConfigError, KeyError):
        return None
    return last if "training_state/state.pt" in last.manifest["files"] else None


def _take(checkpoint: Checkpoint, into: Path, *, run: str) -> None:
    """Its files are the same, it is of another run."""
    folder = into / checkpoint.folder.name
    shutil.copytree(checkpoint.folder, folder, copy_function=link_or_copy)
    write_json(folder / MANIFEST, {**checkpoint.manifest, "run": run})
