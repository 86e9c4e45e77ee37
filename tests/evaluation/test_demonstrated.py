"""Policies on demonstrations: errors are what they should be, over the horizon, by joint group, on unseen episodes."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from reading import Page, options_of

from kuavo_train.data.images.frames import DecodedFrames
from kuavo_train.data.task import Task
from kuavo_train.errors import ConfigError
from kuavo_train.evaluate import main
from kuavo_train.evaluation.checkpoint_evaluation import evaluate
from kuavo_train.evaluation.checkpoints import Contestant
from kuavo_train.evaluation.open_loop import judge_errors, walk
from kuavo_train.metrics.number_format import FORMATS
from kuavo_train.reporting.html_page import look_up
from kuavo_train.runs.records import DatasetRecord, TaskRecord

HORIZON, STRIDE = 6, 4


class Demonstrator:
    """Plans what was demonstrated after the state it is shown, off by `off` for each step into the chunk."""

    n_action_steps = STRIDE

    def __init__(self, task: Task, off: np.ndarray):
        self.task, self.off, self.looks, self.begun = task, off, 0, []

    def reset(self, indices: Sequence[int] | None = None, *, seeds: Sequence[int] | None = None) -> None:
        self.begun += seeds or []

    def predict_chunk(self, observation: Mapping[str, Any]) -> np.ndarray:
        self.looks += 1
        assert set(observation["task"]) == {self.task.instruction}
        chunks = []
        for state, picture in zip(
            observation["observation.state"], observation[next(iter(self.task.cameras))], strict=True
        ):
            assert picture.shape[-1] == 3
            row = int(np.flatnonzero((self.task.state == state).all(axis=1))[0])
            rows = np.minimum(np.arange(row, row + HORIZON), len(self.task.action) - 1)
            chunks.append(self.task.action[rows] + self.off * np.arange(HORIZON)[:, None])
        return np.stack(chunks)


@pytest.fixture(scope="module")
def contestant(small_checkpoint: Path) -> Contestant:
    return Contestant.open("it", str(small_checkpoint))


@pytest.fixture(scope="module")
def task(contestant: Contestant, datasets: Path) -> Task:
    return contestant.demonstrations("sorting", datasets)


def test_errors_are_told_over_the_horizon_and_by_joint_group(task: Task) -> None:
    off = np.zeros(len(task.action_names), np.float32)
    off[list(task.action_names).index("left_claw")] = 0.5
    policy = Demonstrator(task, off)
    frames = DecodedFrames(task, image_size=None, video_backend="pyav")
    errors = walk(policy, task, [0, 2], frames, parallel=2, progress=False)
    assert policy.begun == [0, 2]
    lengths = {episode: int(task.bounds[episode, 1] - task.bounds[episode, 0]) for episode in (0, 2)}
    assert {episode: each.queries for episode, each in errors.items()} == {
        e: -(-n // STRIDE) for e, n in lengths.items()
    }
    judged = {group["name"]: group for group in judge_errors(errors, task.action_names, None)["groups"]}
    assert list(judged) == ["all", "left_arm", "claws", "right_arm", "base_position", "base_yaw", "base_mode"]
    assert judged["left_arm"]["error"]["estimate"] == pytest.approx(0, abs=1e-6)
    assert judged["claws"]["horizon"] == pytest.approx([0.25 * step for step in range(HORIZON)], abs=1e-6)
    assert judged["claws"]["difference"] is None


def test_what_comes_after_an_episodes_end_is_not_counted(task: Task) -> None:
    policy = Demonstrator(task, np.zeros(len(task.action_names), np.float32))
    frames = DecodedFrames(task, image_size=None, video_backend="pyav")
    errors = walk(policy, task, [0, 1], frames, parallel=1, progress=False)
    assert all(np.nanmax(each.error) < 1e-6 for each in errors.values())  # the next episode's actions are others


def test_a_difference_is_paired_by_episode(task: Task) -> None:
    frames = DecodedFrames(task, image_size=None, video_backend="pyav")
    walked = [
        walk(
            Demonstrator(task, np.full(len(task.action_names), off)),
            task,
            [0, 1, 2],
            frames,
            parallel=3,
            progress=False,
        )
        for off in (0.1, 0.2)
    ]
    judged = judge_errors(walked[1], task.action_names, walked[0])["groups"][0]
    assert judged["difference"]["estimate"] == pytest.approx(judged["error"]["estimate"] / 2, rel=1e-4)
    assert judged["difference"]["n"] == 3


def test_episodes_that_the_run_was_trained_on_are_left_out(contestant: Contestant, task: Task) -> None:
    assert contestant.unseen(task) == set(range(len(task.bounds)))
    for content, expected in ((task.content_hash, {1, 3}), ("another", set(range(len(task.bounds))))):
        entry = TaskRecord("sorting", 4, dataset=DatasetRecord(hash=content, held_out_episodes=(1, 3)))
        trained = SimpleNamespace(stored=SimpleNamespace(tasks=[entry]))
        assert replace(contestant, run=trained).unseen(task) == expected


def test_checkpoints_walk_demonstrations_and_the_page_agrees_with_the_json(
    small_checkpoint: Path, datasets: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    output = tmp_path / "results.json"
    words = [f"one={small_checkpoint}", f"two={small_checkpoint}", f"data={datasets}", "tasks=weighing,sorting"]
    assert main([*words, "n_episodes=2", "ablate=language", f"output={output}"]) == 0
    found = json.loads(output.read_text())
    rows = {row["name"]: row["tasks"][0]["groups"][0] for row in found["rows"]}
    assert list(rows) == ["one", "one without language", "two", "two without language"]
    assert rows["two"]["difference"]["estimate"] == 0.0
    assert rows["one without language"]["difference"]["estimate"] != 0.0
    assert len(rows["one"]["horizon"]) == 6
    page = Page(output.with_suffix(".html").read_text(encoding="utf-8"))
    assert len(page.numbers) > 50
    for pointer, form, text in page.numbers:
        assert text == FORMATS[form](look_up(found, pointer)), pointer
    assert "mean absolute action error" in capsys.readouterr().out


def test_data_that_is_not_there_is_refused(small_checkpoint: Path, tmp_path: Path) -> None:
    options = options_of([f"it={small_checkpoint}", "tasks=weighing", f"data={tmp_path}"])
    with pytest.raises(ConfigError, match=r"dataset .*weighing does not exist"):
        evaluate(options)
