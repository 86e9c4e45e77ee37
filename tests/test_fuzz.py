"""Stages killed at random instants, in whatever they are doing, end as stages that were left alone.

    KUAVO_KILLS=200 .venv/bin/python -m pytest -m slow tests/test_fuzz.py -s     # 200 kills; 12 unless said otherwise
    KUAVO_KILLS=200 KUAVO_FUZZ_SEED=7 …                                           # at other instants

Two stages of the smoke profile are run by the same command again and again: recorded, cached, trained, validated,
rolled out, saved, reported. They are killed after a random while, the process alone by SIGKILL, or its whole group by
SIGTERM or SIGUSR1, until that many kills are survived. One half of the kills is for one process, the other for two that
train one policy.
"""

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from forked import Forked, fork, run_main
from torch.distributed import TCPStore

from kuavo_train.runs.run_folder import StageFolder

KILLS = int(os.environ.get("KUAVO_KILLS", "12"))
SEED = int(os.environ.get("KUAVO_FUZZ_SEED", "0"))
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1)
STAGES = ("stage1_moving_grasp", "stage2_weighing")
FREE = ("seconds", "started", "finished", "created")  # of a record: when and how long


def words(outputs: Path) -> list[str]:
    return [
        "profile=smoke",
        f"outputs={outputs}",
        "learn=[moving_grasp,weighing]",
        "simulation.episodes=4",
        "simulation.image_size=32",
        "data.held_out_episodes=2",
        "data.record_workers=2",
        "data.num_workers=1",
        "rollout.every_epochs=1",
        "rollout.workers=1",
        "rollout.max_steps=4",
        "training.save_every=3",
        "validation.every_epochs=1",
        "tiny_vlm.image_size=32",
        "policy.resize_imgs_with_padding=[32,32]",
    ]


def start(outputs: Path, folder: Path, processes: int) -> list[Forked]:
    """The command, as one process or as those that torchrun would start."""
    command = ("kuavo_train.curriculum", *words(outputs))
    if processes == 1:
        return [fork(lambda: run_main(*command), folder)]
    port = str(TCPStore("127.0.0.1", 0, is_master=True).port)  # a free one, once the store is gone

    def rank(number: int) -> Callable[[], int]:
        about = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}

        def run() -> int:
            os.environ.update({key: str(value) for key, value in {**about, **where}.items()})
            return run_main(*command)

        return run

    return [fork(rank(number), folder / str(number)) for number in range(processes)]


def kill(running: list[Forked], number: int, chance: random.Random) -> None:
    """As the memory's guard, or a scheduler: SIGKILL ends one of the commands or all, the others go to whole groups."""
    if number != signal.SIGKILL:
        for each in running:
            each.send(number)
        return
    for each in chance.sample(running, chance.randint(1, len(running))):
        each.process.kill()
        each.process.join()
    _end_the_others(running)


def _end_the_others(running: list[Forked]) -> None:
    """As torchrun does once one of its processes has ended: SIGTERM, and SIGKILL for who waits for the dead."""
    for each in running:
        each.process.join(1.0)
        if each.process.is_alive():
            os.kill(each.process.pid or 0, signal.SIGTERM)
            each.process.join(30.0)
            each.process.kill()


def ended(running: list[Forked], patience: float = 240.0) -> list[int]:
    """The exit statuses. Nothing may be left running, and none may need longer than `patience` seconds to end."""
    deadline = time.monotonic() + patience
    statuses = [each.wait(max(deadline - time.monotonic(), 1.0)).returncode for each in running]
    for each in running:
        assert each.survivors() == []
    return statuses


def results(outputs: Path) -> dict[str, Any]:
    """All that a run comes to."""
    run = outputs / "smoke"
    found: dict[str, Any] = {"matrix": _timeless(json.loads((run / "report" / "matrix.json").read_text()))}
    for name in STAGES:
        stage = StageFolder(run / name)
        lines = {(line["kind"], line["step"], line["task"]): _timeless(line) for line in stage.validations.read()}
        found[name] = {
            "weights": (stage.checkpoints.at("best").pretrained_model / "model.safetensors").read_bytes(),
            "last": (stage.checkpoints.at("last").pretrained_model / "model.safetensors").read_bytes(),
            "audit": json.loads((stage.path / "replay_audit.json").read_text()),
            "validations": lines,
            "rollouts": {(line["kind"], line["step"], line["task"]): line for line in stage.rollouts.read()},
        }
    return found


def _timeless(record: Any) -> Any:
    """Without what is another every time: times, speeds, and hashes of what holds times."""
    if isinstance(record, list):
        return [_timeless(each) for each in record]
    if not isinstance(record, dict):
        return record
    speeds = ("samples_per_s", "training_seconds", "validation_seconds", "share", "checkpoint_hash")
    return {k: _timeless(v) for k, v in record.items() if k not in (*FREE, *speeds, "hashes", "validation_cost", "run")}


@dataclass
class Undisturbed:
    """What a run comes to, and the seconds it takes, that nobody disturbs; the same with its demonstrations there."""

    outputs: Path
    takes: float
    takes_with_data: float


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Undisturbed]:
    """By number of processes."""
    found = {}
    for processes in (1, 2):
        folder, took = tmp_path_factory.mktemp(f"undisturbed{processes}"), []
        for attempt in ("first", "second"):
            shutil.rmtree(folder / "outputs" / "smoke", ignore_errors=True)
            shutil.rmtree(folder / "outputs" / "data_smoke" / ".cache", ignore_errors=True)
            began = time.monotonic()
            assert ended(start(folder / "outputs", folder / attempt, processes)) == [0] * processes
            took.append(time.monotonic() - began)
        found[processes] = Undisturbed(folder / "outputs", *took)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_stages_that_are_killed_anywhere_end_as_those_left_alone(
    undisturbed: dict[int, Undisturbed], tmp_path: Path, processes: int
) -> None:
    expected, takes = results(undisturbed[processes].outputs), undisturbed[processes].takes
    chance, kills, runs = random.Random(f"{SEED}/{processes}"), 0, 0
    while kills < KILLS / 2:
        outputs, killed, wait = tmp_path / f"outputs{runs}", 0, takes
        if runs % 4:  # recording takes the longest: the other phases have their share of kills without
            data = undisturbed[processes].outputs / "data_smoke"
            shutil.copytree(data, outputs / "data_smoke", ignore=shutil.ignore_patterns(".cache"))
            wait = undisturbed[processes].takes_with_data
        while True:
            printed = tmp_path / f"printed{runs}-{killed}"
            running = start(outputs, printed, processes)
            number, instant = chance.choice(SIGNALS), chance.uniform(0.0, wait)
            running[0].process.join(instant if kills < KILLS / 2 else None)
            if all(each.process.is_alive() for each in running):
                kill(running, number, chance)
                kills, killed = kills + 1, killed + 1
                statuses = ended(running)
                # What is killed before it listens dies of it; who has lost the other process says so.
                allowed = {-number, 128 + number, 0, *((1, -9, -15, 143) if processes > 1 else ())}
                print(f"{kills}: signal {number} after {instant:.1f} s: {statuses}, {_state(outputs)}", flush=True)
                assert set(statuses) <= allowed, _said(running)
            else:
                assert ended(running) == [0] * processes, _said(running)
                break
            for each in running:
                assert "Traceback" not in each.printed("stderr") or processes > 1, _said(running)
        assert results(outputs) == expected
        shutil.rmtree(outputs)
        runs += 1


def _state(outputs: Path) -> str:
    states = []
    for name in STAGES:
        stage = StageFolder(outputs / "smoke" / name)
        last = stage.checkpoints.latest() if stage.status != "absent" else None
        states.append(f"{stage.status} at {last.step if last else '-'}")
    return ", ".join(states)


def _said(running: list[Forked]) -> str:
    return "\n".join(each.printed("stdout")[-1500:] + each.printed("stderr")[-3000:] for each in running)
