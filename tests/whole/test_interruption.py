"""Signals to the whole process group, as schedulers, docker and terminals send them: in every phase of a stage."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forked import Forked, send, when

from kuavo_sim import record
from kuavo_sim.children import STOP_SIGNALS
from kuavo_train.data.images.part import Part
from kuavo_train.errors import Interrupted
from kuavo_train.evaluation import validation
from kuavo_train.evaluation.environment_pool import Robots
from kuavo_train.interruption import Listening
from kuavo_train.runs.run_folder import StageFolder
from kuavo_train.runs.stored_run import StoredRun
from kuavo_train.stage import setup
from kuavo_train.training.learner import Learner

Overrides = Callable[..., list[str]]
Start = Callable[..., Forked]
ON_LINUX = pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="where /proc says what is not heard")

PHASES: list[tuple[str, Callable[[], None], int, str, int | None]] = [
    # phase, what sends the signal, its number, the status it leaves and the step of the last checkpoint
    ("filling", lambda: when(Part, "mark_filled", send(signal.SIGUSR1), call=2), 10, "absent", None),
    ("first validation", lambda: when(validation, "query_of", send(signal.SIGINT)), 2, "interrupted", None),
    ("training", lambda: when(Learner, "learn", send(signal.SIGTERM), call=2), 15, "interrupted", 2),
    ("dying", lambda: when(Learner, "learn", die), 9, "killed", 2),
    ("validation", lambda: when(validation, "query_of", send(signal.SIGTERM)), 15, "interrupted", 3),
    ("rollout", lambda: when(Robots, "advance", send(signal.SIGUSR1), call=3), 10, "interrupted", 6),
    ("dying in a rollout", lambda: when(Robots, "advance", die, call=4), 9, "killed", 6),
    ("last validation", lambda: when(validation, "query_of", send(signal.SIGTERM), call=2), 15, "interrupted", 6),
    ("writing the end", lambda: when(StageFolder, "write", send(signal.SIGTERM), call=3), 15, "finished", 6),
]


def test_a_run_stopped_in_every_phase_ends_as_one_that_never_was(
    small_run: Overrides, tmp_path: Path, forked: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = small_run(
        "learn=[moving_grasp]",
        "training.max_steps=6",
        "training.batch_size=16",
        "training.save_every=100",
        "validation.every_epochs=1",
        "data.num_workers=2",
        "+stage.environment=worlds:Arms-v0",
        "rollout.episodes=3",
        "rollout.every_epochs=2",
        "rollout.workers=1",
        "resume=true",
    )
    monkeypatch.setattr(setup, "check_environment", lambda *_: None)  # a process to start, each time
    whole = StageFolder(tmp_path / "outputs" / "whole" / "stage1_moving_grasp")
    assert forked("kuavo_train", *words, "run=whole").wait().returncode == 0
    cut = StageFolder(tmp_path / "outputs" / "cut" / "stage1_moving_grasp")
    for phase, interrupt, number, status, step in PHASES:
        running = forked("kuavo_train", *words, "run=cut", f"data.cache_root={tmp_path / 'cache'}", before=interrupt)
        done = running.wait()
        assert done.returncode == (-number if number == signal.SIGKILL else 128 + number), (phase, done)
        assert ("interrupted: " in done.stdout) == (number != signal.SIGKILL), phase
        assert "Traceback" not in done.stderr, (phase, done.stderr)
        assert running.survivors() == [], phase
        assert cut.status == status, phase
        last = cut.checkpoints.latest() if status != "absent" else None
        assert (last and last.step) == step, phase
    assert results(cut) == results(whole)


def results(folder: StageFolder) -> dict[str, Any]:
    """What must not depend on how often a stage was stopped."""
    last = folder.path / "checkpoints" / "last"
    return {
        "weights": (last / "pretrained_model" / "model.safetensors").read_bytes(),
        "validations": [{**line, "seconds": None} for line in folder.validations.read()],
        "rollouts": folder.rollouts.read(),
        "losses": [(line["step"], line["loss"], line["lr"]) for line in folder.metrics.read()],
        "audit": json.loads((folder.path / "replay_audit.json").read_text()),
        "about": {key: folder.about[key] for key in ("best", "steps", "status")},
    }


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGINT], ids=lambda number: number.name)
def test_recording_stops_at_once_and_leaves_nothing_half_made(
    tmp_path: Path, forked: Start, number: signal.Signals
) -> None:
    recording = forked("kuavo_train", *recording_in(tmp_path), before=lambda: when_recorded(send(number)))
    done = recording.wait()
    assert done.returncode == 128 + number, done
    assert "interrupted: nothing was trained yet; the same command begins again" in done.stdout
    assert "Traceback" not in done.stderr
    assert recording.survivors() == []
    assert [path.name for path in (tmp_path / "data_smoke").iterdir()] == [".moving_grasp.lock"]


@ON_LINUX
def test_recorders_are_deaf_and_end_with_the_process_that_they_work_for(tmp_path: Path, forked: Start) -> None:
    noted = tmp_path / "blocked"

    def note_and_die() -> None:
        noted.write_text(json.dumps([blocked(child.pid) for child in multiprocessing.active_children()]))
        die()

    recording = forked("kuavo_train", *recording_in(tmp_path), before=lambda: when_recorded(note_and_die))
    assert recording.wait().returncode == -signal.SIGKILL
    assert json.loads(noted.read_text()) == [sorted(STOP_SIGNALS)] * 2
    assert recording.survivors() == []


def blocked(pid: int | None) -> list[int]:
    """The stop signals that a process does not hear."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    mask = int(next(line for line in lines if line.startswith("SigBlk:")).split()[1], 16)
    return [number for number in sorted(STOP_SIGNALS) if mask >> (number - 1) & 1]


def recording_in(folder: Path) -> tuple[str, ...]:
    small = ("simulation.episodes=2", "simulation.image_size=16", "data.record_workers=2")
    return ("profile=smoke", "learn=[moving_grasp]", *small, f"outputs={folder}")


def when_recorded(do: Callable[[], Any]) -> None:
    """Once the first episode is there, while the others are on their way."""
    when(record, "contact_sheet", do)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


FIRST_CHILD = """
import signal, time
from multiprocessing import get_context
from kuavo_sim.children import STOP_SIGNALS, born_deaf

def deaf_to(pid):
    (line,) = [line for line in open(f"/proc/{pid}/status") if line.startswith("SigBlk:")]
    return {number for number in STOP_SIGNALS if int(line.split()[1], 16) >> (number - 1) & 1}

child = get_context("spawn").Process(target=time.sleep, args=(60,))
with born_deaf():
    child.start()
print(deaf_to(child.pid) == STOP_SIGNALS, deaf_to("self") == set())
child.kill()
"""


@ON_LINUX
def test_the_first_process_that_is_started_is_deaf_and_the_one_that_starts_it_hears_again() -> None:
    """In a process of its own, in which none was started before."""
    done = subprocess.run([sys.executable, "-c", FIRST_CHILD], capture_output=True, text=True, check=True)
    assert done.stdout == "True True\n"


def test_a_second_ctrl_c_interrupts_at_once_but_not_the_launchers_copy_of_the_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    listener = Listening()
    listener.hear(signal.SIGTERM)
    listener.hear(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        listener.hear(signal.SIGINT)
    monkeypatch.setenv("WORLD_SIZE", "2")
    listener.hear(signal.SIGINT)
    assert listener.number == signal.SIGTERM
    with pytest.raises(Interrupted), listener.giving_up():
        pytest.fail("what can be done again must not begin once a signal has arrived")


def test_ctrl_c_ends_what_trains_nothing_with_a_word(forked: Start) -> None:
    process = forked("kuavo_train.report", "run=any", before=lambda: when(StoredRun, "open", send(signal.SIGINT)))
    done = process.wait()
    assert done.returncode == 130
    assert done.stderr == "interrupted\n"
