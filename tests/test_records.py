"""Lines of a run's logs as objects: what is written is what is read, and files of earlier versions are read."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from kuavo_train.errors import RunFolderError
from kuavo_train.metrics.intervals import Interval
from kuavo_train.reading import Json
from kuavo_train.runs.files import JsonLines, in_one_move, read_lines
from kuavo_train.runs.records import (
    ClosedLoop,
    DatasetRecord,
    EpisodeScore,
    GateReading,
    GateRecord,
    HeldOutScores,
    Moment,
    PlayedEpisode,
    RunRecord,
    StatisticsRecord,
    TaskRecord,
    TrainingRecord,
    ValidationRecord,
    with_played,
)
from kuavo_train.runs.run_facts import differences

EPISODES = (EpisodeScore(3, 9, 1.0, 0.5), EpisodeScore(4, 10, 2.0, 0.7))
HELD_OUT = HeldOutScores("weighing", 1.4, 0.61, {"claws": 0.4, "base_yaw": None}, 0.4, EPISODES, 2, 0.2)
MOMENT = Moment("end", 12, 2, "weighing", 1)
PLAYED = ClosedLoop(3, 4, 0.9, {"picked": 4, "stored": 3}, 2, 3, 8)


def test_a_line_of_validation_is_what_every_version_has_written() -> None:
    line = ValidationRecord(MOMENT, True, HELD_OUT, PLAYED).to_json()
    assert json.dumps(line) == (
        '{"stage": 2, "stage_name": "weighing", "kind": "end", "epoch": 1, "step": 12, "seen": true, '
        '"task": "weighing", "loss": 1.4, "action_error": 0.61, '
        '"action_error_by_group": {"claws": 0.4, "base_yaw": null}, "constant_error": 0.4, '
        '"episodes": [{"episode": 3, "frames": 9, "loss": 1.0, "action_error": 0.5}, '
        '{"episode": 4, "frames": 10, "loss": 2.0, "action_error": 0.7}], "draws": 2, "seconds": 0.2, '
        '"success": {"successes": 3, "trials": 4}, "progress": 0.9, "funnel": {"picked": 4, "stored": 3}, '
        '"branches": {"right": 2, "acted": 3}, "n_action_steps": 8}'
    )


def test_a_line_of_validation_read_again_is_the_record_that_was_written() -> None:
    for closed_loop in (PLAYED, None):
        record = ValidationRecord(MOMENT, True, HELD_OUT, closed_loop)
        assert ValidationRecord.from_json(json.loads(json.dumps(record.to_json()))) == record


def test_the_shortest_line_that_an_earlier_version_wrote_is_read() -> None:
    record = ValidationRecord.from_json({"kind": "epoch", "step": 4, "task": "weighing", "loss": 0.25})
    assert (record.kind, record.step, record.seen, record.closed_loop) == ("epoch", 4, False, None)
    assert record.scores("loss") == {}
    assert [record.cell(m) for m in ("loss", "action_error", "success", "progress")] == [0.25, None, None, None]
    assert record.curves() == {"validation/weighing/loss": 0.25}


@pytest.mark.parametrize(
    ("low", "followed", "end"),
    [
        (0.1, {}, '"exceeded": false, "action": null}'),
        (
            0.3,
            {"action": "raise_replay", "shares": {"weighing": 1.0}},
            '"exceeded": true, "action": "raise_replay", "shares": {"weighing": 1.0}}',
        ),
        (0.3, {"action": "warn"}, '"exceeded": true, "action": "warn", "shares": null}'),
    ],
)
def test_a_line_of_the_gate_is_what_every_version_has_written_and_is_read_again(
    low: float, followed: Json, end: str
) -> None:
    reading = GateReading("weighing", Interval(0.5, low, 0.7, 0.95, 12), 0.2)
    record = GateRecord(reading, step=40, epoch=1, stage=3, **followed)
    line = json.dumps(record.to_json())
    assert line == (
        '{"stage": 3, "epoch": 1, "step": 40, "task": "weighing", '
        f'"change": {{"estimate": 0.5, "low": {low}, "high": 0.7, "level": 0.95, "n": 12}}, "budget": 0.2, {end}'
    )
    assert GateRecord.from_json(json.loads(line)) == record


DATA = DatasetRecord("data/weighing", {"repo_id": "a/b"}, "0123456789abcdef", 3, 30, (0, 1), (2,))
WEIGHING = TaskRecord("weighing", 2, "weigh it", ("weigh it",), False, 0.6, None, {"epochs": 3}, DATA)
RUN = RunRecord(
    run="smoke",
    seed=1,
    strategy="replay",
    strategy_settings={"ewc": None},
    config_hash="c0ffee",
    tasks=(WEIGHING,),
    normalization=StatisticsRecord("joint", "fade"),
    created="today",
)


def test_what_run_json_says_read_again_is_what_was_written() -> None:
    content = RUN.to_json()
    assert content["tasks"][0]["dataset"]["from"] == {"repo_id": "a/b"}
    assert RunRecord.from_json(json.loads(json.dumps(content))) == RUN


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": 2}, r"seed must stay what run smoke began with \(1\), got 2; choose another run=NAME"),
        ({"strategy": "joint"}, r"strategy must stay what run smoke began with \(replay\), got joint"),
        (
            {"normalization": StatisticsRecord("joint", "bead")},
            r"normalization must .*'fade'}\), got .*'bead'}; choose",
        ),
        (
            {"tasks": (replace(WEIGHING, dataset=replace(DATA, hash="fedcba9876543210")),)},
            r"dataset of weighing must .* \(0123456789ab…\), got fedcba987654… in data/weighing; choose",
        ),
        (
            {"tasks": (replace(WEIGHING, dataset=replace(DATA, held_out_episodes=(1,))),)},
            r"held-out episodes of weighing must .* \(\[2\]\), got \[1\]: what was trained on .* put data.held_out",
        ),
        (
            {"tasks": (replace(WEIGHING, instructions=("lift it",)),)},
            r"instructions of weighing must .* in run smoke \(\['weigh it'\]\), got \['lift it'\]; put stage.instr",
        ),
        (
            {"tasks": (replace(WEIGHING, instructions_of_dataset=True),)},
            r"instructions of dataset of weighing must stay .* \(False\), got True",
        ),
    ],
)
def test_a_stage_that_belongs_to_another_run_is_told_what_differs(changed: Json, message: str) -> None:
    (difference,) = differences(RUN, replace(RUN, **changed), learnt=["weighing"])
    assert re.search(message, difference)


def test_a_stage_differs_in_nothing_that_its_run_has_not_written_down_or_not_learnt() -> None:
    later = replace(RUN, created=None, tasks=(WEIGHING, replace(WEIGHING, name="sorting")))
    began = RunRecord(run="smoke", tasks=(TaskRecord("weighing", 2),))
    assert list(differences(RUN, later, learnt=["weighing"])) == []
    assert list(differences(began, later, learnt=["weighing"])) == []
    other_words = replace(later, tasks=(replace(WEIGHING, instructions=("lift it",)),))
    assert list(differences(RUN, other_words, learnt=[])) == []


def test_all_that_differs_is_told_at_once() -> None:
    assert len(list(differences(RUN, replace(RUN, seed=2, config_hash="decaf"), learnt=[]))) == 2


def test_every_episode_counts_once_in_a_cell_whatever_its_length() -> None:
    record = ValidationRecord(MOMENT, True, HELD_OUT, PLAYED)
    assert record.cell("loss") == 1.5
    assert record.cell("success") == 0.75
    assert record.cell("progress") == 0.9


def test_an_episode_whose_environment_failed_is_no_trial_of_the_policy() -> None:
    episodes = [{"seed": 7, "success": True, "progress": 1.0}, {"seed": 8, "success": False, "error": "fell"}]
    rolled = {**MOMENT.to_json(), "task": "weighing", "episodes": episodes}
    (record,) = with_played([ValidationRecord(MOMENT, True, HELD_OUT, PLAYED)], [rolled])
    assert record.played == (PlayedEpisode(7, True, 1.0), PlayedEpisode(8, False, error="fell"))
    assert record.scores("success") == record.scores("progress") == {7: 1.0}


def test_what_a_later_version_adds_to_a_line_is_left_out() -> None:
    assert TrainingRecord.from_json({"step": 3, "loss": 1.0, "wait_ms": 2.0}) == TrainingRecord(3, loss=1.0)


def test_a_file_whose_writing_fails_keeps_what_it_held_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    path = tmp_path / "normalization.json"
    path.write_text("before")

    def interrupted() -> None:
        with in_one_move(path) as partial:
            partial.write_text("aft")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_lines_are_read_up_to_one_that_a_kill_cut_off_and_no_further(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_lines(path) == []
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert JsonLines(path).read() == [{"step": 1}, {"step": 2}]
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(RunFolderError, match=r"metrics.jsonl: line 2 is not JSON"):
        JsonLines(path).read()
