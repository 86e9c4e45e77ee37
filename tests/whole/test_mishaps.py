"""What goes wrong around a stage: a line says what to do, the status is true, and the run goes on from a checkpoint."""

import json
import os
import resource
import signal
import socket
from collections.abc import Callable
from multiprocessing import resource_sharer
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Forked, fork, when
from stages import run
from torch.utils.data import get_worker_info

from kuavo_train.config import RunConfig
from kuavo_train.data import workers
from kuavo_train.data.dataset import MixedDataset
from kuavo_train.data.images.plan import size_text
from kuavo_train.data.workers import begin_as_worker
from kuavo_train.errors import ConfigError, RunError
from kuavo_train.runs import run_folder
from kuavo_train.runs.files import JsonLines
from kuavo_train.runs.run_folder import StageFolder, stage_folder
from kuavo_train.stage import findings
from kuavo_train.training.checkpoint import CheckpointFolder
from kuavo_train.training.learner import Learner

Overrides = Callable[..., list[str]]
Configs = Callable[..., list[RunConfig]]
Start = Callable[..., Forked]


def die(number: int) -> None:
    os.kill(os.getpid(), number)


def lose_room() -> None:
    """As in a shared memory that is full: what cannot be allocated is an error in a thread of the worker's."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))


@pytest.mark.parametrize(
    "mishap",
    [
        pytest.param(lose_room, id="no room"),
        pytest.param(lambda: die(signal.SIGKILL), id="killed"),
        pytest.param(lambda: die(signal.SIGBUS), id="bus error"),
        pytest.param(lambda: os._exit(0), id="gone", marks=pytest.mark.slow),  # torch looks every 5 s
    ],
)
def test_the_death_of_a_worker_ends_the_run_with_a_line(
    small_run: Overrides, tmp_path: Path, forked: Start, mishap: Callable[[], None]
) -> None:
    def let_a_worker_die() -> None:
        fetch = MixedDataset.__getitems__

        def poisoned(dataset: MixedDataset, draws: Any) -> Any:
            about = get_worker_info()
            if about is not None and about.id == 1:
                mishap()
            return fetch(dataset, draws)

        MixedDataset.__getitems__ = poisoned  # type: ignore[method-assign]

    words = small_run("learn=[moving_grasp]", "data.num_workers=2", "training.save_every=1")
    running = forked("kuavo_train", *words, before=let_a_worker_die)
    done = running.wait()
    assert done.returncode == 1
    message = done.stderr.splitlines()[-1]
    assert message.startswith("error: the data loader has lost a worker: DataLoader worker (pid"), done.stderr
    assert "data.num_workers=0" in message
    assert "--shm-size=" in message
    assert "Traceback" not in done.stderr
    assert running.survivors() == []
    stage = StageFolder(tmp_path / "outputs" / "smoke" / "stage1_moving_grasp")
    assert stage.status == "failed"
    assert stage.about["reason"] in message


def hand_over_to_nobody() -> int:
    begin_as_worker(0)
    address, _ = resource_sharer.DupFd(1)._id
    for bytes_read in (0, 4):
        with socket.socket(socket.AF_UNIX) as trainer:
            trainer.connect(address)
            trainer.recv(bytes_read)
    resource_sharer.stop(timeout=20)
    raise LookupError("a fault of its own is reported")


def test_a_worker_says_nothing_of_a_trainer_that_has_gone_while_it_hands_over_a_batch(tmp_path: Path) -> None:
    done = fork(hand_over_to_nobody, tmp_path / "printed").wait()
    assert "ConnectionResetError" not in done.stderr
    assert "EOFError" not in done.stderr
    assert done.stderr.splitlines()[-1] == "LookupError: a fault of its own is reported"


def test_batches_that_do_not_fit_into_shared_memory_are_refused(
    small_configs: Configs, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = small_configs(data={"num_workers": 3}, training={"gradient_accumulation_steps": 2})
    monkeypatch.setattr(workers, "free_shared_memory", lambda: 2**16)
    message = (
        r"data.num_workers=3 needs [\d.]+ [KM]iB of shared memory, 10 batches of [\d.]+ [KM]iB, /dev/shm has 64.0 KiB "
        r"free; set data.num_workers=0, or give the container more \(docker run --shm-size=1g\)"
    )
    with pytest.raises(ConfigError, match=message):
        run(configs)


def test_a_full_disk_leaves_nothing_half_written_and_the_run_goes_on_once_there_is_room(
    small_run: Overrides, tmp_path: Path, forked: Start
) -> None:
    words = small_run("learn=[moving_grasp]", "resume=true")
    stage = StageFolder(tmp_path / "outputs" / "cut" / "stage1_moving_grasp")

    def fill_the_disk() -> None:
        limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))  # noqa: E731
        when(CheckpointFolder, "_write_into", limit, call=2)

    done = forked("kuavo_train", *words, "run=cut", before=fill_the_disk).wait()
    assert done.returncode == 1
    message = done.stderr.splitlines()[-1]
    assert message.startswith("error: there is no room to write: "), done.stderr
    assert "the last good checkpoint is " in message
    assert "Traceback" not in done.stderr
    assert stage.status == "failed"
    assert stage.about["reason"] in message
    assert sorted(path.name for path in (stage.path / "checkpoints").iterdir()) == ["000002", "last"]
    assert forked("kuavo_train", *words, "run=cut").wait().returncode == 0
    assert "reason" not in stage.about
    assert forked("kuavo_train", *words, "run=whole").wait().returncode == 0
    whole = StageFolder(tmp_path / "outputs" / "whole" / "stage1_moving_grasp")
    model = "checkpoints/last/pretrained_model/model.safetensors"
    assert (stage.path / model).read_bytes() == (whole.path / model).read_bytes()


def test_a_disk_without_room_for_a_line_is_told_and_the_status_is_right(
    small_configs: Configs, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = small_configs("learn=[moving_grasp]")

    def refuse(*_: Any) -> None:
        raise OSError(28, "No space left on device", "metrics.jsonl")

    with monkeypatch.context() as patched:
        patched.setattr(JsonLines, "append", lambda *_: (patched.setattr(run_folder, "write_text", refuse), refuse()))
        with pytest.raises(
            RunError, match=r"there is no room to write: .*metrics.jsonl.*; no checkpoint was written yet"
        ):
            run(configs)
    assert stage_folder(configs[0]).status == "failed"
    assert "no room" in stage_folder(configs[0]).about["reason"]


def test_too_little_memory_is_told_with_what_takes_it(
    small_configs: Configs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def no_memory(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8")

    monkeypatch.setattr(Learner, "learn", no_memory)
    monkeypatch.setenv("PATH", str(tmp_path))  # without git
    configs = small_configs(
        "learn=[moving_grasp]", training={"freeze_first_stage": ["expert", "state_proj"], "batch_size": 8}
    )
    message = (
        r"out of memory: CUDA out of memory. Tried to allocate 2.00 GiB.*; lower training.batch_size=8 and raise "
        r"training.gradient_accumulation_steps=1 by as much, or freeze more groups "
        r"\(training.freeze_first_stage=\[expert, state_proj\]; training.freeze=\[vision, connector\]\)"
    )
    with pytest.raises(RunError, match=message):
        run(configs)
    assert stage_folder(configs[0]).status == "failed"
    assert json.loads((configs[0].run_folder / "run.json").read_text())["git_commit"] == "unknown"


def test_a_fault_of_our_own_keeps_its_traceback_and_is_named_in_the_status(
    small_configs: Configs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fault(*_: Any, **__: Any) -> None:
        raise KeyError("observation.state")

    monkeypatch.setattr(Learner, "learn", fault)
    configs = small_configs("learn=[moving_grasp]")
    with pytest.raises(KeyError):
        run(configs)
    assert stage_folder(configs[0]).about["reason"] == "KeyError: 'observation.state'"
    assert stage_folder(configs[0]).status == "failed"


def test_a_signal_to_the_process_group_does_not_cost_the_commit(
    small_configs: Configs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "git").write_text("#!/bin/sh\ncut -d' ' -f5 /proc/self/stat\n")  # tells its process group
    (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    configs = small_configs("learn=[moving_grasp]")
    assert run(configs) == 0
    commit = json.loads((configs[0].run_folder / "run.json").read_text())["git_commit"]
    assert commit.isdigit()
    assert int(commit) != os.getpgrp()


def test_sizes_are_told_in_units_that_show_something() -> None:
    assert [size_text(count) for count in (0, 900, 60 * 2**10, 5 * 2**20, 2**30)] == [
        "0 bytes",
        "0.9 KiB",
        "60.0 KiB",
        "5.0 MiB",
        "1.0 GiB",
    ]


def test_a_disk_too_small_for_the_checkpoints_is_told_in_such_units(
    small_configs: Configs, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = findings.shutil.disk_usage("/")._replace(free=20_000)
    monkeypatch.setattr(findings.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ConfigError, match=r"the checkpoints need [1-9][\d.]* MiB below .*, 19.5 KiB are free"):
        run(small_configs())
