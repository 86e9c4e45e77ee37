"""Studies on a real cluster: where `sinfo` answers, `make test-full` trains small cells as its jobs.

A machine becomes a cluster of one node with slurmctld, slurmd, slurmdbd (sacct needs it) and munged. Jobs are warned
and queued again by SLURM's commands, and run out of time by its own doing.
"""

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from stages import assert_equal_weights, weights

from kuavo_train import study
from kuavo_train.runs.run_folder import StageFolder

Overrides = Callable[..., list[str]]
STAGE = "stage1_moving_grasp"
STEPS, SOON = 600, 50
JOBS = ("engine=slurm", "engine.gpus=0", "engine.cpus=1")


def answers() -> bool:
    if shutil.which("sinfo") is None:
        return False
    try:
        return subprocess.run(["sinfo"], capture_output=True, timeout=10).returncode == 0
    except subprocess.TimeoutExpired:  # it waits long for a controller that is not there
        return False


pytestmark = [pytest.mark.slow, pytest.mark.skipif(not answers(), reason="no SLURM controller answers to sinfo")]


def words(small_run: Overrides, *more: str, steps: int = STEPS) -> list[str]:
    rare = ("training.save_every=100000", "validation.every_epochs=100000", "training.log_every=10")
    return small_run(
        "learn=[moving_grasp]",
        "strategy=sequential",
        f"training.max_steps={steps}",
        f"training.epochs={steps}",
        *rare,
        *more,
    )


def until(holds: Callable[[], bool], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.5)


def trains(folder: StageFolder) -> bool:
    return folder.metrics.path.exists() and len(folder.metrics.read()) * 10 > SOON


def jobs() -> dict[str, str]:
    """Those of the cluster that wait or run, and their state."""
    listed = subprocess.run(["squeue", "-h", "-r", "-o", "%i %T"], capture_output=True, text=True, check=True)
    return dict(line.split() for line in listed.stdout.splitlines())


@pytest.fixture
def started(small_run: Overrides, tmp_path: Path):
    """Starts a study on the cluster; its process, and what it prints."""
    running: list[subprocess.Popen] = []

    def start(*more: str, steps: int = STEPS) -> subprocess.Popen:
        with (tmp_path / "printed").open("w") as printed:
            command = [sys.executable, "-m", "kuavo_train.study", *words(small_run, *JOBS, *more, steps=steps)]
            running.append(subprocess.Popen(command, stdout=printed, stderr=subprocess.STDOUT))
        return running[-1]

    yield start
    for process in running:
        process.send_signal(signal.SIGTERM)
        process.wait(120)


def test_warned_and_preempted_jobs_are_queued_again_and_end_in_the_bits_of_a_run_without_a_cluster(
    started: Callable[..., subprocess.Popen], small_run: Overrides, tmp_path: Path
) -> None:
    outputs, logs = tmp_path / "outputs", tmp_path / "outputs" / "smoke-study" / "logs"
    process = started("seed=0,1")
    cells = {f"smoke-sequential-s{seed}": StageFolder(outputs / f"smoke-sequential-s{seed}" / STAGE) for seed in (0, 1)}
    until(lambda: all(trains(folder) for folder in cells.values()))
    warned, preempted = sorted(jobs())
    subprocess.run(["scancel", "--signal=USR1", warned], check=True)  # what comes before a job's time is over
    subprocess.run(["scontrol", "requeue", preempted], check=True)  # what preemption leads to
    printed = (tmp_path / "printed").read_text
    assert process.wait(600) == 0, printed()
    assert study.main(words(small_run, f"outputs={tmp_path / 'alone'}", "seed=0,1")) == 0
    for name, folder in cells.items():
        log = (logs / f"{name}.log").read_text()
        assert "interrupted: the checkpoint of step" in log, log
        assert "resumed at step" in log, log
        assert_equal_weights(weights(folder), weights(StageFolder(tmp_path / "alone" / name / STAGE)))


def test_a_job_whose_time_is_over_goes_on_in_another(
    started: Callable[..., subprocess.Popen], small_run: Overrides, tmp_path: Path
) -> None:
    process = started("seed=0", "engine.minutes=2", "engine.warning_seconds=45", steps=5 * STEPS)
    assert process.wait(1800) == 0, (tmp_path / "printed").read_text()
    log = (tmp_path / "outputs" / "smoke-study" / "logs" / "smoke-sequential-s0.log").read_text()
    assert "interrupted: the checkpoint of step" in log, log
    assert "resumed at step" in log, log


def test_a_stopped_study_leaves_no_job_behind(started: Callable[..., subprocess.Popen], tmp_path: Path) -> None:
    before = set(jobs())
    process = started("seed=0,1", steps=1000 * STEPS)
    outputs = tmp_path / "outputs"
    until(lambda: trains(StageFolder(outputs / "smoke-sequential-s0" / STAGE)))
    process.send_signal(signal.SIGTERM)
    assert process.wait(300) == 128 + signal.SIGTERM, (tmp_path / "printed").read_text()
    until(lambda: set(jobs()) <= before)
    assert not list(outputs.glob(f"smoke-sequential-s*/{STAGE}/.*"))
