"""A run that is called again: by other processes, beside another, from a copy."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from forked import interrupted_in_step
from stages import run
from together import together

from kuavo_train.config import RunConfig
from kuavo_train.data.checkpoint_tasks import KnownTasks
from kuavo_train.errors import ConfigError
from kuavo_train.runs.lease import held
from kuavo_train.runs.run_folder import StageFolder, stage_folder
from kuavo_train.runs.stored_run import StoredRun, finished_cells
from kuavo_train.runs.study_file import StudyFile
from kuavo_train.runs.trained_run import TrainedRun
from kuavo_train.stage.lineage import check_settings
from kuavo_train.training.checkpoint import CheckpointFolder, Contents

Configs = Callable[..., list[RunConfig]]


def test_a_stage_goes_on_with_another_number_of_processes(
    small_configs: Configs, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    configs = small_configs(training={"max_steps": 6, "save_every": 9}, policy={"mem_backprop_depth": 2})
    with (
        held(stage_folder(configs[0]).path, "it"),
        pytest.raises(ConfigError, match=r"stage 1 .* one process at a time"),
    ):
        run(configs)
    with interrupted_in_step(2):
        assert run(configs) == 143
    stage_folder(configs[0]).write(status="running")  # as a kill leaves it
    assert stage_folder(configs[0]).status == StoredRun.open(configs[0].run_folder).stages[0].record.status == "killed"
    with interrupted_in_step(4):
        assert together(lambda: run(configs, resume=True)) == [143, 143]
    folder = stage_folder(configs[0])
    state = folder.checkpoints.at("last").training_state()
    assert state["progress"]["sizes"] == [{"step": 0, "samples": 4}, {"step": 2, "samples": 8}]
    assert sum(state["progress"]["drawn"][0].values()) == 2 * 4 + 2 * 8
    copy = folder.path.parents[2] / "copy"
    shutil.copytree(folder.path.parents[1], copy, symlinks=False)  # as scp or an object store would
    configs = [replace(config, outputs=str(copy)) for config in configs]
    folder = stage_folder(configs[0])
    with without_links():
        assert run(configs, resume=True) == 0
    result = folder.checkpoints.at("best")
    assert result.folder.name == folder.about["checkpoint"].split("/")[1] == "000006"
    assert not (folder.path / "checkpoints" / "best").is_symlink()
    for name in ("model.safetensors", "README.md"):
        opened = folder.path / "checkpoints" / "best" / "pretrained_model" / name
        assert opened.read_bytes() == (result.pretrained_model / name).read_bytes()
    audit = json.loads((folder.path / "replay_audit.json").read_text())
    assert audit["total_frames"] == 2 * 4 + 2 * 8 + 2 * 4
    assert audit["passes"]["moving_grasp"] == pytest.approx(32 / audit_rows(configs))
    assert [line["task_frames"]["moving_grasp"] for line in folder.metrics.read()] == [8, 24, 32]
    assert "with batches of 8 samples from here on, 4 before" in capfd.readouterr().out


@contextmanager
def without_links(error: Exception | None = None) -> Iterator[None]:
    with mock.patch.object(os, "symlink", side_effect=error or PermissionError(1, "Operation not permitted")):
        yield


class Weights(torch.nn.Linear):
    """As much of a policy as a checkpoint asks for."""

    def save_pretrained(self, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_text(str(self.weight.tolist()))


def saved(folder: Path, *steps: int, best: int | None = None) -> CheckpointFolder:
    checkpoints = CheckpointFolder(folder)
    for step in steps:
        checkpoints.save(step, Contents(Weights(1, 1), processors=(), documents={}, about={}), {"step": step})
    if best is not None:
        checkpoints.point("best", best)
    return checkpoints


def test_a_copy_whose_links_became_folders_or_were_lost_goes_on_as_the_original(tmp_path: Path) -> None:
    saved(tmp_path / "one", 1, 2, best=1)
    shutil.copytree(tmp_path / "one", tmp_path / "copy", symlinks=False)
    shutil.rmtree(tmp_path / "copy" / "000002" / "training_state")
    (tmp_path / "copy" / "000002" / "manifest.json").unlink()  # cut off while it was copied
    copy = CheckpointFolder(tmp_path / "copy")
    assert (copy.at("best").folder.name, copy.latest().step) == ("000001", 1)
    assert saved(tmp_path / "copy", 2, 3, best=2).at("best").folder.name == "000002"
    assert {path.name for path in copy.folder.iterdir()} == {"000001", "000002", "000003", "last", "best"}
    assert (copy.folder / "best").readlink() == Path("000002")
    copy.at("best").verify()
    for link in ("best", "last"):
        (copy.folder / link).unlink()
    (tmp_path / "stage.json").write_text(json.dumps({"status": "finished", "checkpoint": "copy/000001"}))
    assert copy.at("best").step == 1
    with pytest.raises(ConfigError, match=r"there must be a checkpoint at .*000009"):
        copy.at(9)


@pytest.mark.parametrize("error", [PermissionError(1, "no"), OSError(95, "no"), NotImplementedError()], ids=str)
def test_without_links_best_is_a_folder_that_opens(tmp_path: Path, error: Exception) -> None:
    with without_links(error):
        checkpoints = saved(tmp_path, 1, 2, best=1)
        for best in (2, 1, 1):
            checkpoints.point("best", best)
            files = {path.name for path in (tmp_path / "best" / "pretrained_model").iterdir()}
            assert files == {"config.json", "model.safetensors"}
            assert checkpoints.at("best").folder.name == f"00000{best}"
        checkpoints.at("best").verify()
        checkpoints.prune(keep={2})
        assert checkpoints.at("best").step == 1  # what the folder holds
        with mock.patch.object(os, "link", side_effect=error):
            checkpoints.point("best", 2)
        assert checkpoints.at("best").step == 2
    checkpoints.point("best", 2)  # where there are links again
    assert (tmp_path / "best").is_symlink()


def test_a_kill_while_a_folder_is_replaced_leaves_a_best_checkpoint(tmp_path: Path) -> None:
    saved(tmp_path / "one", 1, 2, best=1)
    shutil.copytree(tmp_path / "one", tmp_path / "copy", symlinks=False)
    copy = CheckpointFolder(tmp_path / "copy")
    with mock.patch.object(os, "replace", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        copy.point("best", 2)
    assert copy.at("best").step == 1
    copy.point("best", 2)
    assert copy.at("best").step == 2
    assert not [path for path in copy.folder.iterdir() if path.name.startswith(".")]


def test_outputs_that_were_moved_as_a_whole_bring_their_data_along(simulated_run: Path, tmp_path: Path) -> None:
    shutil.copytree(simulated_run.parent, tmp_path / "moved", symlinks=False)
    run = TrainedRun.open(tmp_path / "moved" / "smoke")
    assert [Path(task.root).parents[1] for task in run.tasks] == [tmp_path / "moved"] * 2
    assert run.checkpoint(run.stages[-1]).folder.name.isdigit()


def audit_rows(configs: list[RunConfig]) -> int:
    from kuavo_train.data.task import open_task

    return len(open_task(configs[0].stage, configs[0].data).train_rows)


DAMAGED = [  # file of a run, who reads it, what is told to do
    ("stage3_placement/stage.json", lambda run: StageFolder(run / "stage3_placement").status, "train the stage again"),
    ("stage3_placement/config.yaml", lambda run: StageFolder(run / "stage3_placement").settings, "train the stage"),
    ("stage3_placement/config.yaml", lambda run: TrainedRun.open(run).settings, "train the stage again"),
    ("stage3_placement/parameters.json", StoredRun.open, "train the stage again"),
    ("stage3_placement/replay_audit.json", StoredRun.open, "train the stage again"),
    ("run.json", StoredRun.open, "(restore it from a copy|it was not written by this trainer)"),
    ("normalization.json", TrainedRun.open, "choose another run=NAME"),
    (
        "stage3_placement/checkpoints/000002/manifest.json",
        lambda run: CheckpointFolder(run / "stage3_placement" / "checkpoints").latest(),
        "delete the checkpoint folder",
    ),
    (
        "stage3_placement/checkpoints/000002/pretrained_model/tasks.json",
        lambda run: KnownTasks.load(run / "stage3_placement" / "checkpoints" / "000002" / "pretrained_model"),
        "train the stage again",
    ),
]


@pytest.mark.parametrize(("file", "read", "remedy"), DAMAGED, ids=[f"{n}-{item[0]}" for n, item in enumerate(DAMAGED)])
@pytest.mark.parametrize(
    "content", [b"", b'{"status": "fin', b"\xff\xfe", b"{}"], ids=["empty", "cut off", "no text", "{}"]
)
def test_a_damaged_file_of_a_run_is_named_with_what_to_do(
    simulated_run: Path, tmp_path: Path, file: str, read: Callable[[Path], Any], remedy: str, content: bytes
) -> None:
    copy = shutil.copytree(simulated_run, tmp_path / "smoke", symlinks=True)
    (copy / file).write_bytes(content)
    with pytest.raises(ConfigError, match=rf"{file} (is not (JSON|YAML)|lacks) .*{remedy}"):
        read(copy)


@pytest.mark.parametrize("content", [b"", b"{}"], ids=["empty", "{}"])
def test_a_finished_stage_that_is_called_again_names_a_damaged_record_of_its_run(
    simulated_run: Path, tmp_path: Path, content: bytes
) -> None:
    copy = shutil.copytree(simulated_run, tmp_path / "smoke", symlinks=True)
    trained = TrainedRun.open(copy)
    config = trained.config(trained.stages[-1])
    curriculum = [trained.config(stage).stage for stage in trained.stages]
    check_settings(config, curriculum)
    (copy / "run.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"smoke/run.json (is not JSON|lacks 'run')"):
        check_settings(config, curriculum)


def test_a_damaged_stage_is_named_where_the_links_to_its_checkpoints_were_lost(
    simulated_run: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(simulated_run / "stage3_placement", tmp_path / "stage", symlinks=True)
    (copy / "checkpoints" / "best").unlink()
    (copy / "stage.json").write_text("")
    with pytest.raises(ConfigError, match=r"stage.json is not JSON .*train the stage again"):
        CheckpointFolder(copy / "checkpoints").at("best")


def test_a_study_file_that_lacks_its_parts_is_named_with_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "study.json"
    path.write_text("{}")
    with pytest.raises(ConfigError, match=r"study.json lacks 'cells': "):
        finished_cells(path)
    with pytest.raises(
        ConfigError, match=r"study.json lacks 'overrides', 'cells': .*delete it: the same command finds"
    ):
        StudyFile(path, "mine", [])


def test_a_folder_in_a_files_place_is_named_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "stage.json").mkdir()
    with pytest.raises(ConfigError, match=r"stage.json is not JSON .*directory.*train the stage again"):
        _ = StageFolder(tmp_path).about


def test_a_lock_file_that_is_no_text_is_anothers_until_it_is_old(tmp_path: Path) -> None:
    (tmp_path / ".lease-000001").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"one process at a time, got a second one"), held(tmp_path, "a stage"):
        pass
