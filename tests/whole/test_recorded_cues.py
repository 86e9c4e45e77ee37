"""The memory on any dataset: cues from columns, and losses where no column names one."""

import json
import shutil
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from reading import is_drawn, memory_report_of
from small_datasets import write_dataset

from kuavo_train.compose import compose_run
from kuavo_train.data.normalization import fit_normalization
from kuavo_train.data.task import Task, open_task
from kuavo_train.errors import ConfigError
from kuavo_train.probing.cue_source import Asked
from kuavo_train.probing.memory_decisions import answer_rounds
from kuavo_train.probing.memory_interventions import loss_sentences
from kuavo_train.probing.memory_walk import MemoryProbe
from kuavo_train.probing.recorded_cues import RecordedCues, moments
from kuavo_train.probing.run_probes import run_probe
from kuavo_train.reading import Json, read_json
from kuavo_train.runs.trained_run import TrainedRun
from kuavo_train.stage.stage import run_stage

COLOURS = ["blue", "red"]


@pytest.fixture(scope="session")
def trained(once: Callable[..., Path], small_run_in: Callable[..., list[str]]) -> Path:
    """A run on episodes of 16 frames, a query every 4: moving_grasp's cues are words, weighing names none."""

    def train(outputs: Path) -> None:
        for name, cues in (("moving_grasp", COLOURS), ("weighing", None)):
            write_dataset(outputs / "data" / name, episodes=8, length=16, cues=cues)
        words = ["data.held_out_episodes=4", "policy.mem_backprop_depth=2", "training.max_steps=1"]
        configs = compose_run(small_run_in(outputs, *words, f"data.root={outputs / 'data'}"))
        for config in configs:
            assert run_stage(config, [each.stage for each in configs]) == 0

    return once("recorded_cues", train) / "smoke"


@pytest.fixture(scope="session")
def task(trained: Path) -> Task:
    return TrainedRun.open(trained).task("moving_grasp")


def source(task: Task, stride: int = 4) -> RecordedCues:
    return RecordedCues(task, task, fit_normalization([task], "joint"), stride)


def without(task: Task, *, decision: bool = True, visible: bool = True) -> Task:
    """The task as if its dataset had neither column."""
    assert task.cues is not None
    changes = {**({} if decision else {"decision": None}), **({} if visible else {"visible": None})}
    return replace(task, cues=replace(task.cues, **changes))


@pytest.fixture(scope="module")
def reported(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Json, Path, str]:
    """The report on the stage whose cues are columns, its folder, and what it printed."""
    output, printed = tmp_path_factory.mktemp("reported"), StringIO()
    with redirect_stdout(printed):
        found = memory_report_of(trained / "stage1_moving_grasp", "moving_grasp", output)
    return found, output, printed.getvalue()


def test_the_report_asks_where_the_columns_say_that_the_cue_must_be_acted_on(
    reported: tuple[Json, Path, str],
) -> None:
    found, output, printed = reported
    decision = found["decision"]
    assert found["cue_columns"] == ["cue", "cue_visible", "decision"]
    assert decision["n"] == decision["episodes"] == decision["distinguished"] == len(found["episodes"]) == 4
    assert decision["queries_since_cue"] == 2  # seen at query 0, acted on from frame 8 on
    assert decision["chance"] is None
    assert decision["identical_observations"] is None
    assert list(decision["interventions"])[:3] == ["on", "reset", "frozen"]
    assert decision["takes_away"]["reset"]["n"] == 4
    assert is_drawn(output / "memory_cue.png")
    assert "cues from column cue; pictures may tell them too, so compare with reset" in printed


def test_without_a_cue_the_report_says_what_memory_does_to_the_loss(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    found = memory_report_of(trained / "stage2_weighing", "weighing", tmp_path)
    held_out = found["held_out"]
    assert "decision" not in found
    assert list(held_out["loss"]) == ["on", "reset", "swapped"]
    for name in ("reset", "swapped"):
        each = np.array(held_out["loss_by_episode"][name]) - np.array(held_out["loss_by_episode"]["on"])
        lowered = held_out["loss_lowered"][name]
        assert lowered["estimate"] == pytest.approx(each.mean(), abs=1e-9)
        assert lowered["low"] < lowered["estimate"] < lowered["high"]
        assert lowered["n"] == 4
    line = json.loads((trained / "stage2_weighing" / "validation.jsonl").read_text().splitlines()[-1])
    assert line["task"] == "weighing"
    (about,) = (task for task in read_json(trained / "run.json")["tasks"] if task["name"] == "weighing")
    losses = dict(zip(about["dataset"]["held_out_episodes"], held_out["loss_by_episode"]["on"], strict=True))
    for validated in line["episodes"]:
        assert losses[validated["episode"]] == pytest.approx(validated["loss"], rel=1e-5)
    shown = capsys.readouterr().out
    assert "no cue in this task's data: nothing to decide from memory" in shown
    for sentence in loss_sentences(held_out):
        assert sentence in shown
    assert is_drawn(tmp_path / "memory_loss.png")
    assert not (tmp_path / "memory_cue.png").exists()


def test_the_probe_of_a_run_asks_the_same(trained: Path, reported: tuple[Json, Path, str], tmp_path: Path) -> None:
    copy = tmp_path / "smoke"
    shutil.copytree(trained, copy, symlinks=True)
    found = json.loads(run_probe("memory", copy).read_text())
    grasping, weighing = found["stages"][0]["tasks"]
    direct, _, _ = reported
    assert grasping["decision"] == direct["decision"]
    assert grasping["loss_lowered"] == direct["held_out"]["loss_lowered"]
    assert weighing["decision"] is None
    assert found["tasks"][0]["evidence"].count("pictures may tell it too") == 1
    assert found["tasks"][1]["evidence"].endswith("No cue of this task is known.")


@pytest.mark.parametrize(
    ("lowered", "sentence"),
    [
        ((0.2, 0.1, 0.3), "Memory lowers the loss by 0.200 [0.100, 0.300] (5 episodes) against a reset"),
        (
            (0.2, -0.1, 0.5),
            "No effect on the loss shown against a reset at every query: lowered by 0.200 [-0.100, 0.500]",
        ),
        ((-0.2, -0.3, -0.1), "Memory raises the loss by 0.200 [0.100, 0.300] (5 episodes) against a reset"),
        ((0.2, None, None), "No effect on the loss shown against a reset at every query: a single episode"),
    ],
)
def test_an_interval_that_holds_zero_is_no_effect(lowered: tuple, sentence: str) -> None:
    record = dict(zip(("estimate", "low", "high"), lowered, strict=True), n=5)
    said = loss_sentences({"loss_lowered": {"reset": record, "swapped": record}})[0]
    assert said.replace("−", "-").startswith(sentence)


def test_a_decision_is_a_stretch_of_frames_and_is_asked_at_the_query_before_it(task: Task) -> None:
    (moment,) = moments(task, 0, 4)
    assert (moment.query, moment.first, moment.stop, moment.place, moment.answer, moment.cue_seen) == (
        (2, 8, 12, 0, "blue", 0)
    )
    (moment,) = moments(task, 1, 3)
    assert (moment.query, moment.first, moment.answer) == (2, 8, "red")  # a query at frame 6 carries frame 8 out


def test_without_a_decision_column_every_query_after_the_cue_is_asked(task: Task) -> None:
    undecided = without(task, decision=False)
    assert [(each.query, each.first, each.stop) for each in moments(undecided, 0, 4)] == [
        (1, 4, 8),
        (2, 8, 12),
        (3, 12, 16),
    ]
    assert undecided.cues is not None
    late = np.isin(undecided.frame, [0, 1, 8])  # the cue shows once more, at query 2
    seen = replace(undecided, cues=replace(undecided.cues, visible=late))
    assert [(each.query, each.place, each.cue_seen) for each in moments(seen, 0, 4)] == [(3, 1, 2)]
    unseen = without(undecided, visible=False)
    assert [(each.query, each.place, each.cue_seen) for each in moments(unseen, 0, 4)] == [
        (1, 1, None),
        (2, 2, None),
        (3, 3, None),
    ]


def test_what_a_cue_demands_is_the_mean_of_the_training_episodes_alone(task: Task) -> None:
    asked = source(task).ask(task.held_out_episodes)
    first = asked.rounds[0][0]
    mean = task.action[task.train_rows].mean(axis=0)
    std = task.action[task.train_rows].std(axis=0)
    for cue in range(2):
        rows = [task.bounds[each][0] + 8 for each in task.train_episodes if each % 2 == cue]
        expected = ((task.action[rows] - mean) / std).mean(axis=0)
        assert np.allclose(first.actions[cue][8], expected, atol=1e-3)
    _, counted = first.references(6)
    assert counted.any(axis=1).tolist() == [True] * 4 + [False] * 2


def test_a_place_that_training_episodes_of_one_cue_lack_is_left_out(task: Task) -> None:
    assert task.cues is not None
    blue = [each for each in task.train_episodes if each % 2 == 0]
    given = task.cues.answers.copy()
    given[np.isin(task.episode, blue) & (task.frame >= 8)] = ""  # the blue ones decide nothing
    lacking = replace(task, cues=replace(task.cues, answers=given, decision=None))
    asked = source(lacking).ask(task.held_out_episodes)
    assert [{each.query for each in of} for of in asked.rounds] == [{1}]
    assert asked.left_out == 8


def test_several_questions_of_an_episode_count_as_one_episode(trained: Path, task: Task) -> None:
    run = TrainedRun.open(trained)
    policy, preprocessor = run.policy(run.checkpoint(run.stages[0]))
    undecided = without(task, decision=False, visible=False)
    probe = MemoryProbe(policy, run.dataset([undecided], policy.config), preprocessor)
    episodes = undecided.held_out_episodes
    walk = probe.walk([probe.queries_of(0, episode) for episode in episodes])
    asked: Asked = source(undecided).ask(episodes)
    found = answer_rounds(probe, walk, episodes, asked.rounds)
    assert (found["n"], found["episodes"]) == (12, 4)
    assert "frozen" not in found["interventions"]  # nobody said when the cue was last seen
    assert found["takes_away"]["reset"]["n"] == 4
    assert found["queries_since_cue"] is None


def test_a_policy_that_acts_on_its_memory_alone_is_found_out(task: Task) -> None:
    """One whose memory is the cue: right when on, the donor's when swapped, one and the same after a reset."""
    asked = source(task).ask(task.held_out_episodes)
    probe = ActsOnItsMemory(asked)
    found = answer_rounds(probe, StandInWalk(), list(task.held_out_episodes), asked.rounds)  # type: ignore[arg-type]
    rows = found["interventions"]
    assert rows["on"]["accuracy"] == rows["swapped"]["accuracy"] == 1
    assert rows["reset"]["correct"] == sum(question.cue == 0 for question in asked.rounds[0])
    assert found["takes_away"]["swapped"]["estimate"] == 1


class StandInWalk:
    episodes = ((None,) * 9,) * 4

    def select(self, episodes: list[int]) -> "StandInWalk":
        return self


class ActsOnItsMemory:
    policy = SimpleNamespace(
        config=SimpleNamespace(chunk_size=6), draw_noise=lambda generators: torch.zeros(len(generators))
    )

    def __init__(self, asked: Asked):
        self.questions = asked.rounds[0]

    def intervened(self, walk: object, at: object, seen: object, donors: list[int]) -> dict[str, list[int]]:
        cues = [question.cue for question in self.questions]
        return {"on": cues, "reset": [0] * len(cues), "swapped": [cues[donor] for donor in donors]}

    def predict(self, draws: object, memory: list[int], noise: object) -> np.ndarray:
        pairs = zip(self.questions, memory, strict=True)
        return np.stack([question.references(6)[0][cue] for question, cue in pairs])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cue_column": "colour"}, "cue_column must be a column of the dataset (observation.state, action, "),
        ({"cue_column": "colour"}, ", cue, cue_visible, decision, timestamp"),
        ({"cue_column": "action"}, "cue_column must be a column of one value per frame, of dtype bool or int8"),
        ({"cue_column": "action"}, "got 'action of dtype float32, shape "),
        ({"decision_column": "cue"}, "decision_column must be a column of one value per frame"),
        ({"cue_column": "", "decision_column": "decision"}, "decision_column must come with a cue_column"),
    ],
)
def test_a_column_that_cannot_be_is_named(trained: Path, task: Task, changes: dict, message: str) -> None:
    run = TrainedRun.open(trained)
    with pytest.raises(ConfigError) as refused:
        open_task(replace(run.recipe("moving_grasp"), **changes), run.settings.data)
    assert message in str(refused.value)


def test_an_empty_key_takes_no_column_and_a_number_can_be_a_cue(trained: Path, tmp_path: Path) -> None:
    run = TrainedRun.open(trained)
    recipe = run.recipe("moving_grasp")
    assert open_task(replace(recipe, cue_column=""), run.settings.data).cues is None
    write_dataset(tmp_path / "moving_grasp", episodes=5, length=4, cues=[-1, 7])
    cues = open_task(replace(recipe, root=str(tmp_path / "moving_grasp")), run.settings.data).cues
    assert cues is not None
    assert set(cues.answers.tolist()) == {-1, 7}
    assert (cues.given == (cues.answers == 7)).all()
