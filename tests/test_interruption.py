"""Signals to the whole process group, as schedulers, docker and terminals send them: in every phase of a stage."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forked import Forked, send, when

from kuavo_sim import record
from kuavo_train.data.images.episode_cache import EpisodeCache
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

PHASES: list[tuple[str, Callable[[], None], int, str, int | None]] = [
    # phase, what sends the signal, its number, the status it leaves and the step of the last checkpoint
    ("filling", lambda: when(EpisodeCache, "mark_filled", send(signal.SIGUSR1), call=2), 10, "absent", None),
    ("first validation", lambda: when(validation, "asks", send(signal.SIGINT)), 2, "interrupted", None),
    ("training", lambda: when(Learner, "learn", send(signal.SIGTERM), call=2), 15, "interrupted", 2),
    ("dying", lambda: when(Learner, "learn", lambda: os.kill(os.getpid(), signal.SIGKILL)), 9, "killed", 2),
    ("validation", lambda: when(validation, "asks", send(signal.SIGTERM)), 15, "interrupted", 3),
    ("rollout", lambda: when(Robots, "advance", send(signal.SIGUSR1), call=3), 10, "interrupted", 6),
    ("dying in a rollout", lambda: when(Robots, "advance", lambda: os.kill(os.getpid(), 9), call=4), 9, "killed", 6),
    ("last validation", lambda: when(validation, "asks", send(signal.SIGTERM), call=2), 15, "interrupted", 6),
    ("writing the end", lambda: when(StageFolder, "tell", send(signal.SIGTERM), call=3), 15, "finished", 6),
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


def test_recording_stops_at_once_and_leaves_nothing_half_made(tmp_path: Path, forked: Start) -> None:
    words = ("profile=smoke", f"outputs={tmp_path}", "learn=[moving_grasp]", "simulation.episodes=2")
    recording = forked("kuavo_train", *words, "data.record_workers=2", before=interrupt_recording)
    done = recording.wait()
    assert done.returncode == 128 + signal.SIGUSR1, done
    assert "interrupted: nothing was trained yet; the same command begins again" in done.stdout
    assert "Traceback" not in done.stderr
    assert recording.survivors() == []
    assert [path.name for path in (tmp_path / "data_smoke").iterdir()] == [".moving_grasp.lock"]


def interrupt_recording() -> None:
    when(record, "contact_sheet", send(signal.SIGUSR1))


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
