"""`python -m kuavo_train.evaluate`: checkpoints play the same layouts, and JSON, page and terminal agree on it."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import worlds  # noqa: F401 - registers what is played in
from reading import Page, options_of

from kuavo_train.errors import ConfigError
from kuavo_train.evaluate import main
from kuavo_train.evaluation import latency
from kuavo_train.evaluation.checkpoint_evaluation import evaluate
from kuavo_train.evaluation.checkpoints import rows_of
from kuavo_train.evaluation.environment import Environment, evaluation_seeds
from kuavo_train.metrics.number_format import FORMATS
from kuavo_train.reporting.html_page import look_up

IN_THE_ARMS_WORLD = ("tasks=weighing", "environment=worlds:Arms-v0", "n_episodes=5", "workers=1", "parallel=3")


@pytest.fixture(scope="module")
def evaluated(small_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two names for one checkpoint, with ablations."""
    output = tmp_path_factory.mktemp("evaluated") / "results.json"
    words = [f"one={small_checkpoint}", f"two={small_checkpoint / 'pretrained_model'}", f"output={output}"]
    assert main([*words, *IN_THE_ARMS_WORLD, "ablate=language,memory", "videos=2"]) == 0
    return output


@pytest.fixture(autouse=True, scope="module")
def _few_timings() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency, "QUERIES", 4)
        yield


def test_every_row_plays_the_same_layouts(evaluated: Path) -> None:
    found = json.loads(evaluated.read_text())
    names = [row["name"] for row in found["rows"]]
    assert names[:3] == ["one", "one without language", "one without memory"]
    assert names[3:] == [name.replace("one", "two", 1) for name in names[:3]]
    for row in found["rows"]:
        assert [episode["seed"] for episode in row["tasks"][0]["episodes"]] == evaluation_seeds(5)
        assert row["tasks"][0]["success"]["successes"] == 3  # the even layouts, whatever is done


def test_rows_are_compared_with_the_first_checkpoint_or_with_their_own_as_it_is(evaluated: Path) -> None:
    rows = {row["name"]: row for row in json.loads(evaluated.read_text())["rows"]}
    assert rows["one"]["against"] is None
    assert rows["one"]["tasks"][0]["difference"] is None
    assert rows["two"]["against"] == "one"
    assert rows["two without memory"]["against"] == "two"
    assert rows["two"]["tasks"][0]["difference"]["p_value"] == 1.0


def test_an_ablation_changes_what_the_policy_does_and_the_same_weights_do_the_same(evaluated: Path) -> None:
    rows = {row["name"]: row["tasks"][0] for row in json.loads(evaluated.read_text())["rows"]}
    assert rows["one"]["episodes"] == rows["two"]["episodes"]
    for ablation in ("language", "memory"):
        assert rows[f"one without {ablation}"]["episodes"] != rows["one"]["episodes"], ablation


def test_time_and_memory_are_measured(evaluated: Path) -> None:
    row = json.loads(evaluated.read_text())["rows"][0]
    query, action = row["cost"]["query_ms"], row["cost"]["action_ms"]
    assert 0 < query["p50"] <= query["p95"]
    assert 0 < action["p50"] <= action["p95"]
    assert row["peak_rss_mib"] > 100


class Taking:
    """A policy of two actions a query. Its clock says what they take: the query 30 s, its second action 4 s."""

    n_action_steps = 2

    def __init__(self) -> None:
        self.now, self.calls, self.warming_up = 0.0, 0, 2 * latency.WARM_UP

    def reset(self) -> None:
        self.calls = 0

    def select_action(self, observation: Any) -> np.ndarray:
        self.now += 1000 if self.calls < self.warming_up else (30, 4)[self.calls % 2]
        self.calls += 1
        return np.zeros((1, 16), np.float32)


def test_a_query_is_shared_among_its_actions_and_the_first_ones_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    policy: Any = Taking()
    monkeypatch.setattr(latency, "clock", lambda: policy.now)
    found = latency.time_queries(policy, Environment("worlds:Arms-v0", "weigh"), seed=0)
    assert found == {
        "queries": latency.QUERIES,
        "query_ms": {"p50": 30_000, "p95": 30_000},
        "action_ms": {"p50": 17_000, "p95": 17_000},
    }


def test_every_number_on_the_page_is_the_one_in_the_json(evaluated: Path) -> None:
    found = json.loads(evaluated.read_text())
    page = Page(evaluated.with_suffix(".html").read_text(encoding="utf-8"))
    assert len(page.numbers) > 100
    for pointer, form, text in page.numbers:
        assert text == FORMATS[form](look_up(found, pointer)), pointer


def test_a_checkpoint_alone_may_be_evaluated_at_several_horizons(
    small_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    output = tmp_path / "deep" / "results.json"
    words = [f"it={small_checkpoint}", *IN_THE_ARMS_WORLD, "ablate=cameras", "n_action_steps=1,2"]
    assert main([*words, "delay_ms=100", "handover=blend", f"output={output}"]) == 0
    rows = [(row["name"], row["n_action_steps"]) for row in json.loads(output.read_text())["rows"]]
    assert rows == [("it", 2), ("it, 1 step a look", 1), ("it, blend, 100 ms", 2), ("it without cameras", 2)]
    printed = capsys.readouterr().out
    assert "60.0" in printed
    assert "it without cameras, weighing: success" in printed
    assert "jump at borders" in printed
    assert "jump at borders" in output.with_suffix(".html").read_text()
    assert str(output) in printed


def test_a_failing_environment_is_told_and_is_no_success_rate_of_zero(
    small_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = [f"it={small_checkpoint}", "tasks=weighing", "environment=worlds:Missing-v0", "n_episodes=2", "workers=1"]
    assert main([*words, f"output={tmp_path / 'results.json'}"]) == 0
    row = json.loads((tmp_path / "results.json").read_text())["rows"][0]
    assert row["tasks"][0]["success"] is None
    assert row["cost"] is None
    assert "Missing" in capsys.readouterr().out


def test_a_checkpoint_is_compared_with_itself_as_it_is_whatever_horizons_are_asked_for(tmp_path: Path) -> None:
    options = options_of([f"it={tmp_path}", "n_action_steps=2,4", "sampling_temperature=0,1"])
    policy: Any = SimpleNamespace(n_action_steps=8, sampling_temperature=1.0)
    rows = list(rows_of("it", policy, options, "it"))
    assert [(row.name, row.n_action_steps, row.sampling_temperature, row.against) for row in rows] == [
        ("it", 8, 1, None),
        ("it, 2 steps a look", 2, 1, "it"),
        ("it, 4 steps a look", 4, 1, "it"),
        ("it, temperature 0", 8, 0, "it"),
    ]
    asked = [(row.of(policy), policy.n_action_steps, policy.sampling_temperature)[1:] for row in reversed(rows)]
    assert asked == [(8, 0), (4, 1), (2, 1), (8, 1)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tasks=weighing"], "arguments must name a checkpoint"),
        (
            ["it=CHECKPOINT", "n_episode=3"],
            r"n_episode must be an option \(tasks, .* '3'; did you mean n_ep",
        ),
        (["it=CHECKPOINT", "n_episodes=none"], "n_episodes must be a whole number, got 'none'"),
        (["it=CHECKPOINT", "tasks=weighing,weighing"], "tasks must be values with commas between, each once"),
        (["it=CHECKPOINT", "it=CHECKPOINT"], "it must be given once"),
        (["it=CHECKPOINT", "n_action_steps=2,7"], "n_action_steps must be at most 6, what it plans, got 7"),
        (["it=CHECKPOINT", "sampling_temperature=2"], r"sampling_temperature must be in \[0, 1\], got 2"),
        (["it=CHECKPOINT", "device=cpu", "cuda_graphs=true"], "it: cuda_graphs must be false on cpu, got true"),
        (["it=CHECKPOINT", "ablate=hands"], "ablate must be one of language, memory, cameras, got 'hands'"),
        (["it=CHECKPOINT", "tasks=juggling"], r"tasks must be among those that it has learnt \(.*\), got 'juggling'"),
        (["it=CHECKPOINT", "environment=worlds:Arms-v0"], "tasks must be one with environment, got None"),
        (["it=CHECKPOINT", "output=there"], "output must be a .json file, got 'there'"),
        (["it=CHECKPOINT/training_state"], "it: .*training_state must be a checkpoint's folder"),
        (["it=CHECKPOINT", "data=/nowhere", "videos=2"], "videos must not be given with data"),
        (["CHECKPOINT"], "arguments must be key=value with a key of NAME, tasks, .*, environment.KEY, data, got"),
    ],
)
def test_a_wrong_request_names_what_is_wrong(small_checkpoint: Path, words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        evaluate(options_of([word.replace("CHECKPOINT", str(small_checkpoint)) for word in words]))


def test_pictures_of_another_size_are_refused_with_the_task_and_the_reason(small_checkpoint: Path) -> None:
    words = [f"it={small_checkpoint}", "tasks=weighing", "environment.image_size=40", "environment.renderer=none"]
    with pytest.raises(ConfigError, match=r"it on weighing in kuavo_sim/Weighing-v0: .* must be of the size in train"):
        evaluate(options_of([*words, "n_episodes=1", "workers=1"]))


def test_kuavo_sim_is_played_at_the_size_of_the_checkpoints_pictures(small_checkpoint: Path) -> None:
    words = [f"it={small_checkpoint}", "tasks=weighing", "environment.renderer=none", "max_steps=3", "n_episodes=2"]
    outcome = evaluate(options_of([*words, "workers=1", "seed=1"]))["rows"][0]["tasks"][0]
    assert outcome["environment"]["settings"] == {"renderer": "none", "image_size": 32}
    assert [episode["steps"] for episode in outcome["episodes"]] == [3, 3]
    assert [episode["seed"] for episode in outcome["episodes"]] == evaluation_seeds(2, seed=1)
    assert np.isfinite(outcome["roughness"]["estimate"])


def test_checkpoints_as_they_are_get_videos_that_the_page_links(evaluated: Path) -> None:
    found = json.loads(evaluated.read_text())
    films = {row["name"]: row["videos"]["weighing"] for row in found["rows"]}
    assert [name for name in films if films[name]] == ["one", "two"]
    assert [film["rank"] for film in films["one"]] == ["best", "worst"]
    assert [film["success"] for film in films["one"]] == [True, False]
    page = Page(evaluated.with_suffix(".html").read_text(encoding="utf-8"))
    for film in films["one"]:
        assert film["file"] in page.loaded
        assert (evaluated.parent / film["file"]).stat().st_size > 1000
