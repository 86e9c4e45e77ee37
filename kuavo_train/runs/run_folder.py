"""Files of a run and of its stages, each written in one move.

outputs/<run>/run.json, normalization.json
outputs/<run>/stage2_weighing/stage.json, config.yaml, metrics.jsonl, validation.jsonl, replay_audit.json,
                              parameters.json, checkpoints/; with rollout.episodes rollouts.jsonl and
                              rollouts/<task>.npz, with a forgetting.budget gate.jsonl, with a replay.buffer
                              replay_buffer.json, with strategy=ewc ewc.safetensors, with strategy=merge merge.json
"""

import contextlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

from kuavo_train.config import RunConfig, StageConfig
from kuavo_train.reading import Json, JsonValue, read_json, read_yaml
from kuavo_train.runs.files import JsonLines, write_json, write_text
from kuavo_train.runs.lease import living_holder
from kuavo_train.training.checkpoint import CheckpointFolder


@dataclass(frozen=True)
class StageFolder:
    """Files of one stage, and whether it may be entered."""

    path: Path

    @property
    def status(self) -> str:
        """absent, running, interrupted, failed, finished, or killed: running as it says, yet no process is there."""
        if not (self.path / "stage.json").is_file():
            return "absent"
        status = self.about["status"]
        return "killed" if status == "running" and living_holder(self.path) is None else status

    @property
    def about(self) -> Json:
        return read_json(self.path / "stage.json", keys=("status",))

    @property
    def holds_files(self) -> bool:
        """Anything but what a kill left hidden before the stage was begun."""
        return self.path.exists() and any(not path.name.startswith(".") for path in self.path.iterdir())

    @property
    def settings(self) -> Json | None:
        """What the stage's files were made with; None before it began."""
        path = self.path / "config.yaml"
        return read_yaml(path, keys=("stage",)) if path.is_file() else None

    def answer_for(self, config: RunConfig) -> None:
        """From now on the stage's files mean these settings."""
        write_text(self.path / "config.yaml", yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True))

    def write(self, **values: JsonValue) -> None:
        """Update stage.json in one move; None takes a value out."""
        about = {**(self.about if self.status != "absent" else {}), **values}
        write_json(self.path / "stage.json", {key: value for key, value in about.items() if value is not None})

    def write_end(self, **values: JsonValue) -> None:
        """As `write`, also on a full disk, where only what lies on it already can be written over."""
        try:
            self.write(**values)
        except OSError:
            about = {**self.about, **values}
            with contextlib.suppress(OSError), open(self.path / "stage.json", "r+") as file:
                file.write(json.dumps(about))
                file.truncate()

    @property
    def checkpoints(self) -> CheckpointFolder:
        return CheckpointFolder(self.path / "checkpoints")

    @property
    def metrics(self) -> JsonLines:
        return JsonLines(self.path / "metrics.jsonl")

    @property
    def importance(self) -> Path:
        """What elastic weight consolidation keeps of the stages up to this one."""
        return self.path / "ewc.safetensors"

    @property
    def buffer(self) -> Path:
        """What of the stage's own task is kept for replay in later ones."""
        return self.path / "replay_buffer.json"

    @property
    def gate(self) -> JsonLines:
        return JsonLines(self.path / "gate.jsonl")

    @property
    def rollouts(self) -> JsonLines:
        return JsonLines(self.path / "rollouts.jsonl")

    def recordings(self, task: str) -> Path:
        """What the robot did in some episodes at the stage's end, see evaluation/replays.py."""
        return self.path / "rollouts" / f"{task}.npz"

    @property
    def validations(self) -> JsonLines:
        return JsonLines(self.path / "validation.jsonl")


def stage_folder(config: RunConfig, stage: StageConfig | None = None) -> StageFolder:
    """Folder of a stage of the run, by default of the config's own."""
    return StageFolder(config.run_folder / (stage or config.stage).folder_name)
