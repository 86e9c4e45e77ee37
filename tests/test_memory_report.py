"""The memory report on a checkpoint of a few steps: its numbers agree with each other, bad input is named."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from reading import is_drawn, memory_report_of

from kuavo_train.memory_report import main


@pytest.fixture
def stage(simulated_run: Path) -> Path:
    """A finished stage of weighing, the task whose cue is shown in the middle; placement, without cues, beside it."""
    return simulated_run / "stage2_weighing"


def test_the_numbers_of_a_report_agree(stage: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    found = memory_report_of(stage, "weighing", tmp_path)
    decision = found["decision"]
    assert decision["n"] == len(found["episodes"]) == decision["identical_observations"]
    assert decision["chance"] == 0.5
    assert list(decision["interventions"]) == ["on", "reset", "frozen", "swapped"]
    for row in decision["interventions"].values():
        assert row["accuracy"] == row["correct"] / row["n"]
        assert row["low"] <= row["accuracy"] <= row["high"]
        assert row["action_error"] > 0
    trace = found["trace"]
    queries = len(trace["change"][0])
    assert [len(trace[kind]) for kind in ("norm", "change", "cosine")] == [4, 4, 4]
    assert [len(trace[kind][0]) for kind in ("norm", "change", "cosine")] == [queries + 1, queries, queries]
    norm, change, cosine = (np.array(trace[kind]) for kind in ("norm", "change", "cosine"))
    before, after = norm[:, :-1], norm[:, 1:]
    expected = np.sqrt(np.maximum(before**2 + after**2 - 2 * before * after * cosine, 0))
    assert np.allclose(change, expected, atol=0.02)  # law of cosines
    assert sum(found["attention"].values()) == pytest.approx(1, abs=1e-5)
    for name in ("memory_trace.png", "memory_cue.png"):
        assert is_drawn(tmp_path / name)
    shown = capsys.readouterr().out
    assert f"{decision['interventions']['on']['correct']}/{decision['n']}" in shown


def test_a_task_without_cues_has_a_trace_and_no_decision(stage: Path, tmp_path: Path) -> None:
    checkpoint = stage / "checkpoints" / "last" / "pretrained_model"
    assert main([f"checkpoint={checkpoint}", "task=placement", "episodes=1", f"output={tmp_path}"]) == 0
    found = json.loads((tmp_path / "memory.json").read_text())
    assert "decision" not in found
    assert len(found["episodes"]) == 1
    assert (tmp_path / "memory_trace.png").is_file()
    assert not (tmp_path / "memory_cue.png").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "juggling"}, "task must be one of the run's (weighing, placement), got 'juggling'"),
        ({"checkpoint": "nowhere"}, "checkpoint must be a folder of a stage's checkpoints, or its pretrained_model"),
        ({"episodes": "9"}, "episodes must be in [1, 2], those there are, got 9"),
        ({"episodes": "two"}, "episodes must be a whole number, got 'two'"),
        ({"colour": "red"}, "arguments must be key=value with a key of checkpoint, task, data, episodes, cue_column, "),
        ({"task": None}, "task must be given, got 'nothing'"),
        ({"data": "DATA"}, "data must be another dataset than the run's own"),
        ({"data": "nowhere"}, "dataset nowhere does not exist"),
    ],
)
def test_bad_input_is_named(stage: Path, changes: dict, message: str, capsys: pytest.CaptureFixture) -> None:
    given = {"checkpoint": str(stage / "checkpoints" / "best"), "task": "weighing", **changes}
    if given.get("data") == "DATA":
        given["data"] = str(stage.parents[1] / "data_smoke" / "weighing")
    assert main([f"{key}={value}" for key, value in given.items() if value is not None]) == 2
    assert message in capsys.readouterr().err


def test_episodes_that_the_simulation_does_not_repeat_are_refused(
    stage: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    data = tmp_path / "weighing"
    shutil.copytree(stage.parents[1] / "data_smoke" / "weighing", data)
    path = data / "kuavo_sim_episodes.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({**line, "seed": line["seed"] + 50}) + "\n" for line in lines))
    (data / "meta" / "note").write_text("no longer the run's own")
    given = [f"checkpoint={stage / 'checkpoints' / 'best'}", "task=weighing", f"data={data}"]
    assert main(given) == 2
    assert "kuavo_sim must repeat episode 0" in capsys.readouterr().err
