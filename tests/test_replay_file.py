"""What is kept of earlier tasks in one file: later stages learn from it what they would learn from the datasets."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from stages import assert_equal_weights, changed, records, run, weights

from kuavo_train.config import RunConfig
from kuavo_train.data.replay_file import FORMAT, ExportedTask, exported_tasks
from kuavo_train.data.task import open_task
from kuavo_train.errors import ConfigError
from kuavo_train.runs.run_folder import stage_folder
from kuavo_train.stage.description import describe
from kuavo_train.stage.preflight import examine_stage
from kuavo_train.stage.replay_export import Exported, export_replay

Configs = Callable[..., list[RunConfig]]
FILE = "kept.safetensors"


def placed(configs: list[RunConfig], folder: Path, **changes: Any) -> list[RunConfig]:
    """With datasets and outputs in `folder`."""
    data = folder / "data"
    return [
        changed(
            config,
            outputs=str(folder / "outputs"),
            stage={"root": str(data / config.stage.name)},
            data={"root": str(data)},
            **changes,
        )
        for config in configs
    ]


def exported(configs: list[RunConfig], place: int, folder: Path, **changes: Any) -> Exported:
    config = changed(configs[place], **changes)
    return export_replay(config, [each.stage for each in configs], folder / FILE)


def forget(folder: Path, *names: str) -> None:
    """Delete the demonstrations of tasks, and all that was made of them."""
    for name in names:
        shutil.rmtree(folder / "data" / name)
        for path in (folder / "data" / ".cache").glob(f"*/{name}-*"):
            shutil.rmtree(path)


@pytest.fixture(scope="module")
def learnt(small_configs_in: Configs, datasets: Path, tmp_path_factory: pytest.TempPathFactory) -> list[RunConfig]:
    """A run of three tasks of which the first is learnt: one of its three training episodes is kept, and exported."""
    folder = tmp_path_factory.mktemp("learnt")
    shutil.copytree(datasets, folder / "data")
    words = "learn=[moving_grasp,weighing,placement]"
    configs = placed(
        small_configs_in(folder / "outputs", words), folder, replay={"buffer": 0.3}, policy={"mem_backprop_depth": 2}
    )
    assert run(configs) == 0
    exported(configs, 1, folder)
    return configs


def copied(configs: list[RunConfig], folder: Path) -> list[RunConfig]:
    shutil.copytree(Path(configs[0].outputs).parent, folder, symlinks=True, dirs_exist_ok=True)
    return placed(configs, folder)


def read(path: Path, name: str) -> Any:
    return json.loads((path / name).read_text())


def from_file(folder: Path) -> dict[str, Any]:
    return {"data": {"replay_file": str(folder / FILE)}}


def test_with_the_demonstrations_deleted_a_stage_ends_in_the_weights_that_it_would_have_ended_in_with_them(
    learnt: list[RunConfig], tmp_path: Path
) -> None:
    one, other = copied(learnt, tmp_path / "one"), copied(learnt, tmp_path / "other")
    assert run(one, 1) == 0
    forget(tmp_path / "other", "moving_grasp")
    assert run(other, 1, **from_file(tmp_path / "other")) == 0
    assert not (tmp_path / "other" / "data" / "moving_grasp").exists()
    folders = [stage_folder(configs[1]) for configs in (one, other)]
    assert_equal_weights(weights(folders[0]), weights(folders[1]))
    audits = [read(folder.path, "replay_audit.json") for folder in folders]
    assert audits[0] == audits[1]
    assert audits[1]["kept"]["moving_grasp"]["frames"] == 14
    assert audits[1]["drawn"]["moving_grasp"]["frames"] > 0
    assert audits[1]["frames_drawn_not_kept"] == audits[1]["held_out_frames_drawn"] == 0
    measured = [[{**record, "seconds": 0} for record in records(folder)] for folder in folders]
    assert measured[0] == measured[1]
    assert {record["task"] for record in measured[1]} == {"moving_grasp", "weighing", "placement"}
    best = [folder.path / "checkpoints" / "best" / "pretrained_model" for folder in folders]
    assert read(best[0], "tasks.json") == read(best[1], "tasks.json")
    facts = [
        [{**t["dataset"], "root": Path(t["dataset"]["root"]).name} for t in read(each[0].run_folder, "run.json")["tasks"]]
        for each in (one, other)
    ]
    assert facts[0] == facts[1]
