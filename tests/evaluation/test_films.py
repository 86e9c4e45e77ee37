"""Films of a run's final policy: they show what was counted, played again, and open the page in little room."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from reading import bare_page_of, matrix_of
from synthetic_run import edit, edit_lines, write_run

from kuavo_sim import ENVIRONMENT_IDS
from kuavo_train.evaluation import films
from kuavo_train.evaluation.environment import Environment
from kuavo_train.evaluation.episodes import Rollouts
from kuavo_train.evaluation.films import ensure_films, make_films
from kuavo_train.evaluation.replays import Replay, keep, read_kept
from kuavo_train.evaluation.rollout import roll_out
from kuavo_train.report import main
from kuavo_train.reporting.films import INLINED_BYTES, films_of
from kuavo_train.reporting.run_analysis import analyse
from kuavo_train.reporting.write_report import write_report
from kuavo_train.runs.run_folder import StageFolder
from kuavo_train.runs.stored_run import StoredRun

COUNTING = Environment("worlds:Counting-v0", "count to the goal")
FPS = 10.0


class Counts:
    """Acts as the goal of most episodes demands, and wrongly in every third; remembers how often it was asked."""

    n_action_steps = 1

    def __init__(self) -> None:
        self.asked = 0

    def reset(self, indices: Sequence[int] | None = None, *, seeds: Sequence[int] | None = None) -> None:
        pass

    def select_action(self, observation: Mapping[str, Any]) -> np.ndarray:
        self.asked += 1
        seeds = observation["observation.state"][:, 0]
        return np.stack([np.full(2, seed if seed % 3 else -1.0, np.float32) for seed in seeds])

    def due(self) -> Sequence[int]:
        return range(8)

    def memory_norms(self) -> np.ndarray | None:
        return np.array([[self.asked, 1.0]])


def played(seeds: Sequence[int] = range(5)) -> Rollouts:
    return roll_out(Counts(), COUNTING, seeds, parallel=1, workers=1, replayable=True, progress=False)


@pytest.fixture(scope="module")
def rollouts() -> Rollouts:
    return played()


def stage_of(folder: Path) -> StageFolder:
    return StageFolder(folder / "stage1_moving_grasp")


@pytest.fixture
def run(tmp_path: Path, rollouts: Rollouts) -> Path:
    """One task, learnt and rolled out: layout 1 succeeds in 4 steps, 2 in 5, 4 in 7, 0 and 3 fail in 6 and 12."""
    folder = write_run(tmp_path / "run", stages=(1,))
    stage = stage_of(folder)
    closed_loop = rollouts.closed_loop()
    assert closed_loop is not None
    edit_lines(stage.validations.path, lambda line: line | (closed_loop.to_json() if line["kind"] == "end" else {}))
    stage.rollouts.append({"kind": "end", "step": 200, "task": "moving_grasp", **rollouts.to_json()})
    keep(stage.recordings("moving_grasp"), rollouts, fps=FPS)
    return folder


def test_an_episode_played_again_is_the_one_that_was_played_without_asking_the_policy(
    tmp_path: Path, rollouts: Rollouts
) -> None:
    keep(tmp_path / "kept.npz", rollouts, fps=FPS)
    kept = read_kept(tmp_path / "kept.npz")
    assert kept is not None
    assert [(each.rank, each.seed) for each in kept.recordings] == [("best", 1), ("typical", 4)]
    seeds = [4, 1]  # in another order, at other places
    again = roll_out(Replay(kept.recordings), COUNTING, seeds, parallel=2, workers=1, traces=True, progress=False)
    assert list(again.episodes) == [rollouts.episodes[seed] for seed in seeds]
    for episode in again.episodes:
        then, now = rollouts.episodes[episode.seed].trace, episode.trace
        assert then is not None
        assert now is not None
        assert np.array_equal(then.actions, now.actions)
        assert np.array_equal(then.memory_norms, now.memory_norms)
        assert (len(then.pictures), len(now.pictures)) == (0, episode.steps)


def test_a_stage_without_any_played_episode_keeps_nothing_of_an_earlier_one(tmp_path: Path, rollouts: Rollouts) -> None:
    path = tmp_path / "kept.npz"
    keep(path, rollouts, fps=FPS)
    keep(path, Rollouts(COUNTING, 1, ()), fps=FPS)
    assert read_kept(path) is None


def test_the_best_and_the_typical_episode_are_filmed_step_by_step(run: Path) -> None:
    found = make_films(StoredRun.open(run), workers=1, progress=False)
    shown = [(film["rank"], film["seed"], film["success"], film["steps"], film["trials"]) for film in found["films"]]
    assert shown == [("best", 1, True, 4, 5), ("typical", 4, True, 7, 5)]
    assert found["left_out"] == []
    for film in found["films"]:
        with av.open(str(run / "report" / "films" / film["file"])) as container:
            assert len(list(container.decode(video=0))) == film["steps"] + 1.5 * FPS


def test_the_page_opens_with_the_films_and_success_comes_before_losses(run: Path) -> None:
    make_films(StoredRun.open(run), workers=1, progress=False)
    page = write_report(analyse(StoredRun.open(run))).read_text()
    places = [page.index(text) for text in ("<video", 'class="verdicts"', "<h2>Success</h2>", "<h2>Losses and errors")]
    assert places == sorted(places)
    assert page.count("data:video/mp4;base64,") == 2
    shown = {pointer: text for pointer, _, text in bare_page_of(run).numbers}
    assert (shown["/films/shown/1/seed"], shown["/films/shown/1/steps"]) == ("4", "7")


def test_a_film_that_does_not_come_out_as_it_was_counted_is_left_out_and_the_page_says_so(run: Path) -> None:
    def another_outcome(line: dict) -> dict:
        line["episodes"][1]["success"] = False
        return line

    edit_lines(stage_of(run).rollouts.path, another_outcome)
    found = make_films(StoredRun.open(run), workers=1, progress=False)
    assert [film["rank"] for film in found["films"]] == ["typical"]
    (why,) = found["left_out"]
    assert why.startswith("moving_grasp, layout 1: played again it did not come out as it was counted (success differ")
    assert why in bare_page_of(run).text


def test_films_take_no_more_than_their_room_and_are_left_out_where_that_is_too_little(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fine = make_films(StoredRun.open(run), workers=1, progress=False)["films"]
    assert sum(4 * film["bytes"] / 3 for film in fine) <= INLINED_BYTES
    room = min(film["bytes"] for film in fine)  # in base64 less than it takes
    monkeypatch.setattr(films, "INLINED_BYTES", 2 * room)
    coarse = make_films(StoredRun.open(run), workers=1, progress=False)["films"]
    assert [film["crf"] > of["crf"] for film, of in zip(coarse, fine, strict=True)] == [True, True]
    assert all(4 * film["bytes"] / 3 <= room for film in coarse)
    monkeypatch.setattr(films, "INLINED_BYTES", 200)
    found = make_films(StoredRun.open(run), workers=1, progress=False)
    assert found["films"] == []
    assert "at the lowest quality, more than the 100 there are for it" in found["left_out"][0]


def test_films_of_an_earlier_policy_are_not_shown_and_those_of_this_one_not_made_again(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_films(StoredRun.open(run), workers=1, progress=False)
    monkeypatch.setattr(films, "make_films", lambda _: pytest.fail("they are there"))
    ensure_films(StoredRun.open(run))
    edit(run / "stage1_moving_grasp" / "stage.json", lambda stage: stage.update(checkpoint_hash="another"))
    assert films_of(StoredRun.open(run)) is None
    assert matrix_of(run)["films"] == {"shown": [], "left_out": []}


def test_a_run_that_is_not_rolled_out_has_no_films_and_by_hand_the_command_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_run(tmp_path / "run")
    ensure_films(StoredRun.open(folder))
    assert not (folder / "report").exists()
    assert main([f"run={folder}", "films=true"]) == 2
    assert "films must be of a run that is rolled out (rollout.episodes)" in capsys.readouterr().err
    assert main(["runs=outputs/a,outputs/b", "films=true"]) == 2


def test_what_was_rolled_out_by_an_earlier_version_is_said_not_to_have_been_kept(run: Path) -> None:
    stage_of(run).recordings("moving_grasp").unlink()
    found = make_films(StoredRun.open(run), workers=1, progress=False)
    assert (found["films"], len(found["left_out"])) == ([], 1)
    assert "what the robot did was not kept" in found["left_out"][0]


def test_films_that_cannot_be_made_are_no_reason_for_no_report(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stage_of(run).recordings("moving_grasp").write_bytes(b"cut off")
    ensure_films(StoredRun.open(run))
    assert "no films: RunFolderError: " in capsys.readouterr().err
    assert "Success" in bare_page_of(run).text


@pytest.mark.parametrize(("size", "finer"), [(32, [128, 128]), ([48, 64], [128, 171]), (256, [256, 256])])
def test_simulated_jobs_are_drawn_finer_and_happen_alike(size: Any, finer: list[int]) -> None:
    environment = Environment(f"kuavo_sim:{ENVIRONMENT_IDS['placement']}", "place it", {"image_size": size})
    assert films._finer(environment).settings == {"image_size": finer}
    assert films._finer(COUNTING) == COUNTING
    assert {**asdict(films._finer(environment)), "settings": environment.settings} == asdict(environment)


def test_a_simulated_episode_is_filmed_as_it_was_counted_though_it_is_drawn_finer(tmp_path: Path) -> None:
    environment = Environment(f"kuavo_sim:{ENVIRONMENT_IDS['placement']}", "place it", {"image_size": 16}, max_steps=4)
    seeds = [10**9, 10**9 + 1, 10**9 + 2]
    rollouts = roll_out(Wanders(), environment, seeds, workers=1, parallel=3, replayable=True, progress=False)
    keep(tmp_path / "kept.npz", rollouts, fps=FPS)
    kept = read_kept(tmp_path / "kept.npz")
    assert kept is not None
    chosen = [each.seed for each in kept.recordings]
    finer = films._finer(environment)
    again = roll_out(Replay(kept.recordings), finer, chosen, workers=1, traces=True, progress=False)
    counted = {episode.seed: episode for episode in rollouts.episodes}
    assert list(again.episodes) == [counted[seed] for seed in chosen]


class Wanders(Counts):
    """Moves all joints a little, each episode otherwise."""

    def select_action(self, observation: Mapping[str, Any]) -> np.ndarray:
        state = observation["observation.state"]
        return (state + np.arange(len(state))[:, None] * 0.01 + 0.02).astype(np.float32)

    def memory_norms(self) -> np.ndarray | None:
        return None
