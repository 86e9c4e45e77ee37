"""A run that is called again: by other processes, beside another, from a copy."""

import json
import multiprocessing
import os
import signal
import socket
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from kuavo_train.compose import compose_run
from kuavo_train.config import RunConfig
from kuavo_train.learning.trainer import Trainer
from kuavo_train.run_folder import stage_folder
from kuavo_train.stage import run_stage

Overrides = Callable[..., list[str]]


def run(configs: list[RunConfig], place: int = 0, **changes: Any) -> int:
    return run_stage(replace(configs[place], **changes), [config.stage for config in configs])


def together(function: Callable[[], int], *, processes: int = 2) -> list[int]:
    """The statuses of `function` in processes that train together, forked from this one, which has its imports done."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]

    def work(rank: int) -> None:
        about = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
        os.environ.update({key: str(value) for key, value in about.items()}, MASTER_ADDR="localhost")
        AcceleratorState._reset_state(reset_partial_state=True)
        status = function()
        torch.distributed.destroy_process_group()
        os._exit(status)

    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=work, args=(rank,)) for rank in range(processes)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=120)
    return [worker.exitcode for worker in workers]


def test_a_stage_goes_on_with_another_number_of_processes(
    small_run: Overrides, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    configs = compose_run(small_run("training.max_steps=6", "policy.mem_backprop_depth=2", "training.save_every=9"))
    take_step = Trainer._step

    def stop_before(last: int) -> None:
        def interrupt(self: Trainer, step: int, *arguments: Any) -> Any:
            if step == last - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return take_step(self, step, *arguments)

        monkeypatch.setattr(Trainer, "_step", interrupt)

    stop_before(2)
    assert run(configs) == 143
    stop_before(4)
    assert together(lambda: run(configs, resume=True)) == [143, 143]
    folder = stage_folder(configs[0])
    state = folder.checkpoints.at("last").training_state()
    assert state["progress"]["sizes"] == [{"step": 0, "samples": 4}, {"step": 2, "samples": 8}]
    assert sum(state["progress"]["drawn"][0].values()) == 2 * 4 + 2 * 8
    monkeypatch.setattr(Trainer, "_step", take_step)
    assert run(configs, resume=True) == 0
    audit = json.loads((folder.path / "replay_audit.json").read_text())
    assert audit["total_frames"] == 2 * 4 + 2 * 8 + 2 * 4
    assert audit["passes"]["moving_grasp"] == pytest.approx(32 / audit_rows(configs))
    assert [line["task_frames"]["moving_grasp"] for line in folder.metrics.read()] == [8, 24, 32]
    assert "with batches of 8 samples from here on, 4 before" in capfd.readouterr().out


def audit_rows(configs: list[RunConfig]) -> int:
    from kuavo_train.data.tasks import open_task

    return len(open_task(configs[0].stage, configs[0].data).train_rows)
