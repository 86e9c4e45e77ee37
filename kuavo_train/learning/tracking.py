"""What a stage records while it runs: JSON lines always, Weights & Biases when asked for."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol, cast


class JsonLines:
    """An append-only file of one JSON object a line."""

    def __init__(self, path: Path):
        self.path = path

    def append(self, record: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """All complete lines; a last line cut off by a kill is left out."""
        if not self.path.is_file():
            return []
        lines = self.path.read_text().split("\n")
        return [json.loads(line) for line in lines[:-1] if line]

    def forget(self, doubtful: Callable[[dict[str, Any]], bool]) -> None:
        """Drop the records that a resumed stage makes again."""
        if not self.path.is_file():
            return
        kept = [record for record in self.read() if not doubtful(record)]
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(record) + "\n" for record in kept))
        os.replace(partial, self.path)


class Tracker(Protocol):
    def log(self, values: dict[str, float], step: int) -> None: ...
    def finish(self) -> None: ...


class NoTracker:
    def log(self, values: dict[str, float], step: int) -> None:
        pass

    def finish(self) -> None:
        pass


class WandbTracker:
    def __init__(self, *, mode: str, run: str, stage: str, folder: Path, config: dict[str, Any]):
        import wandb

        self.run = wandb.init(
            project="kuavo_train",
            group=run,
            name=f"{run}/{stage}",
            dir=str(folder),
            config=config,
            mode=cast(Literal["offline", "online"], mode),
        )

    def log(self, values: dict[str, float], step: int) -> None:
        self.run.log(values, step=step)

    def finish(self) -> None:
        self.run.finish()


def make_tracker(mode: str, *, run: str, stage: str, folder: Path, config: dict[str, Any]) -> Tracker:
    return NoTracker() if mode == "off" else WandbTracker(mode=mode, run=run, stage=stage, folder=folder, config=config)
