"""A study: one run per strategy and seed, each trained once, and their comparison."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import cell_records
from kuavo_train import study
from kuavo_train.errors import ConfigError
from kuavo_train.stage import stage as stage_module
from kuavo_train.study import compose_cells
from kuavo_train.training.learner import TrainingDiverged
from kuavo_train.training.trainer import Progress, Trainer

Overrides = Callable[..., list[str]]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The stages entered, as run/stage."""
    entered: list[str] = []
    run_stage = stage_module.run_stage

    def remember(config: Any, curriculum: Any) -> int:
        entered.append(f"{config.run}/{config.stage.folder_name}")
        return run_stage(config, curriculum)

    monkeypatch.setattr(stage_module, "run_stage", remember)
    return entered


def cells_of(tmp_path: Path) -> dict[str, str]:
    stored = json.loads((tmp_path / "outputs" / "smoke-study" / "study.json").read_text())
    return {cell["run"]: cell["status"] for cell in stored["cells"]}


ONE = "learn=[moving_grasp]"
SHORT = ("learn=[moving_grasp,weighing]", "training.max_steps=2")


def test_the_cells_are_strategies_times_seeds_with_runs_of_their_own() -> None:
    run, shared, cells = compose_cells(["profile=smoke", "strategy=sequential,ewc", "seed=3,4", "ewc.strength=7", ONE])
    assert run == "smoke"
    assert shared == ["profile=smoke", "ewc.strength=7", ONE]
    names = ["smoke-sequential-s3", "smoke-ewc-s3", "smoke-sequential-s4", "smoke-ewc-s4"]
    assert [cell.run for cell in cells] == names
    assert [(cell.strategy, cell.seed) for cell in cells[1:3]] == [("ewc", 3), ("sequential", 4)]
    assert [cell.configs[0].ewc and cell.configs[0].ewc.strength for cell in cells] == [None, 7, None, 7]
    named = compose_cells(["run=mine", "seed=1", ONE])
    assert named[:2] == ("mine", [ONE])
    assert [cell.run for cell in named[2]] == ["mine-replay-s1", "mine-sequential-s1", "mine-joint-s1"]
    assert len({cell.configs[0].data.root for cell in named[2]}) == 1  # demonstrations are recorded once


def test_any_setting_that_can_change_a_result_may_be_varied() -> None:
    words = [
        "profile=smoke",
        "strategy=replay,sequential",
        "seed=0",
        "memory=light,strong",
        "replay.buffer=0.2,0.5",
        ONE,
    ]
    _, shared, cells = compose_cells(words)
    assert shared == ["profile=smoke", ONE]
    replay = [f"smoke-replay-memory_{m}-buffer_{b}-s0" for m in ("light", "strong") for b in ("0.2", "0.5")]
    others = [f"smoke-sequential-memory_{memory}-s0" for memory in ("light", "strong")]  # which have no buffer
    assert [cell.run for cell in cells] == [*replay, *others]
    last = cells[3].configs[0]
    assert (last.policy["num_mem_tokens"], last.replay.buffer) == (8, 0.5)
    assert last.axes == {"memory": "strong", "replay.buffer": "0.5"}
    assert cells[3].title == "replay, memory=strong, replay.buffer=0.5, seed 0"
    assert cells[5].axes == {"memory": "strong"}


def test_merge_with_and_without_replay_are_two_cells_that_share_the_settings_of_merging() -> None:
    words = ["profile=smoke", "strategy=replay,merge,merge_replay", "seed=0", "merge.episodes=1", "replay.buffer=0.5"]
    _, _, cells = compose_cells([*words, ONE])
    assert [cell.strategy for cell in cells] == ["replay", "merge", "merge_replay"]
    assert [cell.run for cell in cells] == ["smoke-replay-s0", "smoke-merge-s0", "smoke-merge_replay-s0"]
    first = [cell.configs[0] for cell in cells]
    assert [c.strategy for c in first] == ["replay", "merge", "merge"]
    assert [c.mixture for c in first] == ["replay", "own_task", "replay"]
    assert [c.merge and c.merge.episodes for c in first] == [None, 1, 1]
    assert [c.replay.buffer for c in first] == [0.5, None, 0.5]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("outputs=here,there", r"outputs must have one value, since a study varies what can change a result"),
        ("training.lr=1e-3,-1", r"training.lr must be positive, got -1"),
        ("strategy=replay,dreaming", r"strategy must be one of adapters, distill, ewc, .*dreaming"),
        ("seed=0,-1", r"seed must not be negative, got -1"),
        ("stage.epochs=2", r"must hold for every stage, got stage.epochs=2"),
        ("seed=", r"seed"),
    ],
)
def test_what_a_study_cannot_mean_is_refused_before_anything_is_trained(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose_cells([override, ONE])


def test_a_study_has_no_place_below_a_file() -> None:
    with pytest.raises(
        ConfigError, match=r"outputs must be a folder, or a place for one \(.*test_study.py is a file\)"
    ):
        study.main([f"outputs={__file__}/outputs", "profile=smoke", "strategy=sequential", "seed=0", ONE])


def test_an_interrupted_study_goes_on_where_it_was_and_finished_cells_are_skipped(
    small_run: Overrides,
    tmp_path: Path,
    trained: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    arguments = small_run(*SHORT, "strategy=sequential,joint", "seed=0")
    run_training = Trainer.run

    def interrupt(self: Trainer, progress: Progress) -> Progress:
        if self.description == "stage1_joint":
            os.kill(os.getpid(), signal.SIGTERM)
        return run_training(self, progress)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "run", interrupt)
        assert study.main(arguments) == 128 + signal.SIGTERM
    sequential = ["smoke-sequential-s0/stage1_moving_grasp", "smoke-sequential-s0/stage2_weighing"]
    assert trained == [*sequential, "smoke-joint-s0/stage1_joint"]
    assert cells_of(tmp_path) == {"smoke-sequential-s0": "finished", "smoke-joint-s0": "interrupted"}
    trained.clear()
    assert study.main(arguments) == 0
    assert trained == ["smoke-joint-s0/stage1_joint"]
    assert set(cells_of(tmp_path).values()) == {"finished"}
    out = capsys.readouterr().out
    assert "run 1 of 2: sequential, seed 0 is finished in" in out
    outputs = tmp_path / "outputs"
    comparison = outputs / "smoke-study" / "report" / "comparison.html"
    assert f"comparison: {comparison}" in out
    assert comparison.is_file()
    assert all((outputs / run / "report" / "report.html").is_file() for run in cells_of(tmp_path))
    message = r"study smoke must keep .*: training.batch_size \(was 4, is 2\); .* another run=NAME"
    with pytest.raises(ConfigError, match=message):
        study.main([*arguments, "training.batch_size=2"])
    trained.clear()
    more = ("strategy=replay", "training.log_every=1")  # strategies add to the study, the other cannot change a result
    assert study.main([*arguments, *more]) == 0
    assert {name.split("/")[0] for name in trained} == {"smoke-replay-s0"}
    assert len(cells_of(tmp_path)) == 3
    trained.clear()
    records = tmp_path / "records"
    assert cell_records.main([f"pack={outputs}/smoke-study/study.json", f"into={records}"]) == 0
    for folder in outputs.glob("smoke-*"):
        shutil.rmtree(folder)
    assert cell_records.main([f"unpack={records}", f"into={outputs}"]) == 0
    assert study.main([*arguments, *more]) == 0
    assert trained == []
    assert set(cells_of(tmp_path).values()) == {"finished"}


def test_a_run_that_diverges_is_told_and_the_others_go_on(
    small_run: Overrides, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    train = study.train_all_stages

    def diverge(configs: Any) -> int:
        if configs[0].seed == 0:
            raise TrainingDiverged("loss nan")
        return train(configs)

    monkeypatch.setattr(study, "train_all_stages", diverge)
    assert study.main(small_run(*SHORT, "strategy=sequential", "seed=0,1")) == 1
    assert cells_of(tmp_path) == {"smoke-sequential-s0": "failed", "smoke-sequential-s1": "finished"}
    captured = capsys.readouterr()
    assert "error: run 1 of 2: sequential, seed 0: loss nan" in captured.err
    assert "nothing to compare yet: 1 finished runs" in captured.out
