"""Studies on an engine: cells at a time, stopped, gone on with, preempted; and a first stage that is trained once."""

import json
import os
import re
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import preempted
import pytest
from forked import Forked, when
from stages import assert_equal_weights, weights

from kuavo_train import launcher, study
from kuavo_train.config import EngineConfig, RunConfig
from kuavo_train.engine.choice import engine_of
from kuavo_train.engine.engine import Ended
from kuavo_train.errors import ConfigError
from kuavo_train.runs.run_folder import StageFolder, stage_folder
from kuavo_train.runs.study_file import Cell
from kuavo_train.study import compose_cells
from kuavo_train.training.learner import Learner
from kuavo_train.training.trainer import Progress, Trainer

Overrides = Callable[..., list[str]]
STEPS = 3
SHORT = (f"training.max_steps={STEPS}", "training.log_every=1", "training.save_every=1")
LOCAL = ("engine=local", "engine.jobs=2")


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Stages entered in this process, and at which step."""
    entered: list[tuple[str, int]] = []
    train = Trainer.run

    def remember(self: Trainer, progress: Progress) -> Progress:
        entered.append((self.description, progress.step))
        return train(self, progress)

    monkeypatch.setattr(Trainer, "run", remember)
    return entered


def entries(outputs: Path) -> dict[str, dict]:
    stored = json.loads((outputs / "smoke-study" / "study.json").read_text())
    return {cell["run"]: cell for cell in stored["cells"]}


def stage(outputs: Path, run: str, name: str) -> StageFolder:
    return StageFolder(outputs / run / name)


def test_cells_that_share_a_first_stage_train_it_once_and_end_in_the_same_bits(
    small_run: Overrides, tmp_path: Path, trained: list[tuple[str, int]], capsys: pytest.CaptureFixture
) -> None:
    shared = small_run(*SHORT, "seed=0")
    assert study.main([*shared, "strategy=replay,ewc", "ewc.batches=1"]) == 0
    first, second = "stage1_moving_grasp", "stage2_weighing"
    assert trained == [(first, 0), (second, 0), (first, STEPS), (second, 0)]
    trained.clear()
    assert study.main([*shared, "strategy=sequential", "ewc.batches=1"]) == 0  # a later command shares it too
    assert trained == [(first, STEPS), (second, 0)]
    outputs = tmp_path / "outputs"
    taken = stage(outputs, "smoke-ewc-s0", first)
    assert taken.about["status"] == "finished"
    origin = stage(outputs, "smoke-replay-s0", first).checkpoints.at("last")
    assert taken.about["taken_over"]["run"] == "smoke-replay-s0"
    assert taken.about["taken_over"]["checkpoint"] == origin.hash
    assert taken.importance.is_file()  # the strategy's own
    state = "training_state/state.pt"
    assert (taken.checkpoints.at("last").folder / state).samefile(origin.folder / state)
    assert "stage 1 of smoke-ewc-s0 goes on from the last step of that of smoke-replay-s0" in capsys.readouterr().out
    alone = [f"outputs={tmp_path / 'alone'}", "ewc.batches=1"]
    trained.clear()
    assert study.main([*shared, *alone, "strategy=ewc"]) == 0
    assert trained == [(first, 0), (second, 0)]
    for name in (first, second):
        one, other = (stage(each, "smoke-ewc-s0", name) for each in (outputs, tmp_path / "alone"))
        assert_equal_weights(weights(one, "best"), weights(other, "best"))
        assert [line["loss"] for line in one.validations.read()] == [line["loss"] for line in other.validations.read()]


def test_a_first_stage_is_shared_only_where_nothing_that_decides_it_differs() -> None:
    words = ("profile=smoke", "seed=0", "learn=[moving_grasp,weighing]")

    def key(*more: str) -> str:
        (cell,) = compose_cells([*words, *more])[2]
        return cell.first_stage

    here = key("strategy=replay")
    alike = ("replay.buffer=0.5", "training.freeze=[vision]", "training.log_every=7", "run=another", "engine=local")
    assert {here, key("strategy=sequential"), key("strategy=ewc"), key("strategy=merge")} == {here}
    assert {key("strategy=replay", word) for word in alike} == {here}
    others = ("training.lr=1e-3", "seed=1", "memory=strong", "learn=[moving_grasp,placement]", "data.root=elsewhere",
              "training.freeze_first_stage=[vision]", "validation.draws=3")  # fmt: skip
    assert here not in [key("strategy=replay", word) for word in others] + [key("strategy=joint")]


@pytest.fixture
def _forks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "START", "fork")


@pytest.mark.usefixtures("_forks")
def test_cells_in_processes_of_their_own_stop_together_and_the_same_command_goes_on(
    small_run: Overrides, tmp_path: Path, forked: Callable[..., Forked], capfd: pytest.CaptureFixture
) -> None:
    words = small_run(*SHORT, "seed=0", "strategy=sequential,joint")
    outputs = tmp_path / "outputs"

    def stop_in_the_second_step() -> None:
        launcher.START = "fork"
        when(Learner, "learn", lambda: os.kill(os.getppid(), signal.SIGTERM), call=2)

    running = forked("kuavo_train.study", *words, *LOCAL, before=stop_in_the_second_step)
    assert running.wait().returncode == 128 + signal.SIGTERM
    assert running.survivors() == []
    assert {run: cell["status"] for run, cell in entries(outputs).items()} == dict.fromkeys(
        ["smoke-sequential-s0", "smoke-joint-s0"], "interrupted"
    )
    assert study.main([*words, *LOCAL]) == 0
    assert {cell["status"] for cell in entries(outputs).values()} == {"finished"}
    out = capfd.readouterr().out
    assert "comparison: " in out
    assert re.search(r"smoke-joint-s0 +finished +1 of 1", out)
    logs = outputs / "smoke-study" / "logs"
    both = [(logs / f"smoke-{strategy}-s0.log").read_text() for strategy in ("sequential", "joint")]
    assert any("resumed at step" in log for log in both)  # the one that was first to its second step, and stopped all
    assert "finished stage 1 (joint)" in (logs / "smoke-joint-s0.log").read_text()
    inline = tmp_path / "inline"
    assert study.main([*words, f"outputs={inline}"]) == 0
    for run, name in (("smoke-sequential-s0", "stage2_weighing"), ("smoke-joint-s0", "stage1_joint")):
        assert_equal_weights(weights(stage(outputs, run, name), "best"), weights(stage(inline, run, name), "best"))


class Seen:
    def __init__(self) -> None:
        self.ended: dict[str, Ended] = {}

    def waits(self, cell: Cell, running: object) -> bool:
        return False

    def begins(self, cell: Cell) -> None: ...

    def ends(self, cell: Cell, state: Ended, *, seconds: float) -> None:
        self.ended[cell.run] = state


def test_a_preempted_job_is_queued_again_and_ends_in_the_same_bits(
    small_configs: Callable[..., list[RunConfig]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On submitit's own stand-in for a cluster, whose jobs are processes of this machine."""
    from kuavo_train.engine import slurm

    monkeypatch.setattr(slurm, "CLUSTER", "local")
    monkeypatch.setattr(slurm.Slurm, "look_s", 0.5)
    monkeypatch.setenv("PYTHONPATH", str(Path(preempted.__file__).parent))
    configs = small_configs(training={"max_steps": 4, "save_every": 100})[:1]
    cells = [Cell("replay", 0, [replace(each, run=run) for each in configs]) for run in ("preempted", "never")]
    engine = engine_of(EngineConfig("slurm", minutes=60), preempted.train_preempted, tmp_path / "logs")
    seen = Seen()
    assert engine.train(cells[:1], seen) == 0
    log = (tmp_path / "logs" / "preempted.log").read_text()
    assert seen.ended == {"preempted": "finished"}, log
    assert log.count("\n=== ") == 1  # a second time
    assert "interrupted: the checkpoint of step 3 is in" in log
    assert "resumed at step 3" in log
    assert study.train_cell(cells[1].configs) == 0
    one, other = (stage_folder(cell.configs[0]) for cell in cells)
    assert_equal_weights(weights(one), weights(other))


def test_an_old_study_without_axes_goes_on_and_takes_axes(
    small_run: Overrides, tmp_path: Path, trained: list[tuple[str, int]], capsys: pytest.CaptureFixture
) -> None:
    words = small_run(*SHORT, "learn=[moving_grasp]", "strategy=sequential", "seed=0")
    assert study.main(words) == 0
    path = tmp_path / "outputs" / "smoke-study" / "study.json"
    stored = json.loads(path.read_text())
    for cell in stored["cells"]:
        del cell["axes"], cell["first_stage"]
    path.write_text(json.dumps(stored))
    trained.clear()
    assert study.main(words) == 0
    assert trained == []
    assert study.main([*words, "training.lr=1e-4,2e-4"]) == 0
    names = [f"smoke-sequential-{each}s0" for each in ("", "lr_0.0001-", "lr_0.0002-")]
    assert list(entries(tmp_path / "outputs")) == names
    assert entries(tmp_path / "outputs")[names[2]]["axes"] == {"training.lr": "0.0002"}
    assert study.main([*words, "training.lr=4e-4"]) == 0  # a single value of what is varied is one more
    assert list(entries(tmp_path / "outputs"))[3:] == ["smoke-sequential-lr_0.0004-s0"]
    report = path.parent / "report" / "comparison.json"
    compared = [entry["strategy"] for entry in json.loads(report.read_text())["strategies"]]
    assert compared == ["sequential", *(f"sequential training.lr={rate}" for rate in ("0.0001", "0.0002", "0.0004"))]
    with pytest.raises(ConfigError, match=r"study smoke must keep .*: validation.draws \(was unset, is 2\);"):
        study.main([*small_run(*SHORT, "seed=0", "strategy=sequential"), "validation.draws=2"])
