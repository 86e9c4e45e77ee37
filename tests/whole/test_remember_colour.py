"""The remember-the-colour task and the questions that are asked of a memory, on policies of milliseconds."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.remember_colour import (
    COLOURS,
    LAYOUTS,
    Settings,
    build,
    colour_task,
    decide,
    main,
    parse,
    run,
    table,
    train,
)
from kuavo_train.probing.linear_probe import linear_probe, nearest
from kuavo_train.probing.memory_walk import MemoryProbe, seeded_noise

TINY = Settings(
    tokens=2, depth=3, steps=2, short_steps=1, batch_size=6, longest_delay=2, training_layouts=1, held_out_layouts=2
)
TINY = replace(TINY, hidden=32, layers=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vlm")


def probe_of(settings: Settings, folder: Path, delays=(1, 3)) -> MemoryProbe:
    policy, preprocessor = build(settings, folder)
    return MemoryProbe(policy, colour_task(delays, [0]).dataset(), preprocessor)


def test_at_the_decision_the_four_episodes_of_a_layout_look_the_same() -> None:
    data = colour_task([1, 4], [0, 1])
    last = data.task.bounds[:, 1] - 1
    decisions = data.pictures[last].reshape(-1, len(COLOURS), 3, 32, 32)
    assert torch.equal(decisions, decisions[:, :1].expand_as(decisions))
    first = data.pictures[data.task.bounds[:, 0]].float().mean(dim=(2, 3))
    assert len(torch.unique(first[: len(COLOURS)].round(), dim=0)) == len(COLOURS)


def test_without_memory_exactly_one_of_four_is_right_and_so_with_a_memory_reset(folder: Path) -> None:
    for settings in (replace(TINY, tokens=0), TINY):
        policy, preprocessor = build(settings, folder)
        with torch.no_grad():  # new weights answer 0 to everything: let them say something
            policy.model.action_out_proj.bias.normal_(std=2.0)
        result = decide(settings, policy, preprocessor, [1, 2])
        assert result["n"] == 16
        assert result["on" if settings.tokens == 0 else "reset"] == 4


def test_a_walk_carries_the_memory_that_the_robot_carries(folder: Path) -> None:
    probe = probe_of(TINY, folder)
    walk = probe.walk([probe.queries_of(0, episode) for episode in (1, 6)])
    assert walk.states is not None
    for place, episode in enumerate((1, 6)):
        draws = probe.queries_of(0, episode)
        probe.policy.reset()
        for query, draw in enumerate(draws):
            seen = probe.dataset.fetch([draw])
            observation = {key: value for key, value in seen.inputs.items() if key.startswith("observation")}
            batch = probe.preprocessor({**observation, "task": seen.instructions})
            batch["observation.images.camera"] = batch["observation.images.camera"].float() / 255
            probe.policy.predict_action_chunk(batch)
            carried = probe.policy.get_memory().tokens[0]
            torch.testing.assert_close(carried, walk.states[query + 1].tokens[place], atol=1e-5, rtol=1e-5)
    # the shorter episode has ended, and keeps its memory while the longer goes on
    assert torch.equal(walk.states[3].tokens[0], walk.states[5].tokens[0])
    assert not torch.equal(walk.states[3].tokens[1], walk.states[5].tokens[1])


def test_every_intervention_hands_over_the_memory_it_names(folder: Path) -> None:
    probe = probe_of(TINY, folder)
    walk = probe.walk([probe.queries_of(0, episode) for episode in (1, 6)])
    assert walk.states is not None
    memories = probe.intervened(walk, questions=[2, 4], cue_seen=[0, 0], donors=[1, 0])
    initial = probe.policy.model.memory.initial(1).tokens[0]
    for place, query in enumerate([2, 4]):
        assert torch.equal(memories["on"].tokens[place], walk.states[query].tokens[place])
        assert torch.equal(memories["frozen"].tokens[place], walk.states[1].tokens[place])
        assert torch.equal(memories["swapped"].tokens[place], memories["on"].tokens[1 - place])
        assert torch.equal(memories["reset"].tokens[place], initial)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_shares_of_attention_are_all_there(folder: Path, layout: str) -> None:
    probe = probe_of(replace(TINY, layout=layout), folder)
    draws = probe.queries_of(0, 0)
    noise = seeded_noise(probe.policy, [[0]])
    walk = probe.walk([draws])
    answer = probe.predict(draws[1:2], walk.before([1]), noise)
    shares = probe.attention(draws[1:2], walk.before([1]), noise)
    assert list(shares) == ["memory", "images", "language", "state", "actions"]
    assert sum(shares.values()) == pytest.approx(1, abs=1e-5)
    assert min(shares.values()) > 0
    assert np.array_equal(answer, probe.predict(draws[1:2], walk.before([1]), noise))  # watching leaves nothing behind


def test_nearest_looks_at_valid_entries_only() -> None:
    references = np.array([[[[0.0, 0.0]], [[1.0, 9.0]]]])
    predicted = np.array([[[0.9, 0.0]]])
    assert nearest(predicted, references, np.array([[[True, False]]])).tolist() == [1]
    assert nearest(predicted, references, np.array([[[True, True]]])).tolist() == [0]


def test_a_linear_probe_reads_what_is_linear_and_nothing_else() -> None:
    random = np.random.default_rng(0)
    labels = np.arange(60) % 3
    noise = random.normal(size=(120, 40))
    features = noise[:60] + 5 * np.eye(3, 40)[labels]
    held_out = noise[60:] + 5 * np.eye(3, 40)[labels]
    assert (linear_probe(features, labels, held_out) == labels).mean() > 0.9
    assert (linear_probe(noise[:60], labels, noise[60:]) == labels).mean() < 0.6


def test_a_run_is_recorded_and_its_seeds_are_pooled(folder: Path) -> None:
    records = [run(replace(TINY, seed=seed), folder) for seed in (0, 1)]
    for record in records:
        for part in ("trained_delays", "longer_delays"):
            assert record[part]["n"] == 16
            assert all(0 <= record[part][name] <= 16 for name in ("on", "reset", "frozen", "swapped", "probe"))
    shown = table(records).splitlines()
    assert len(shown) == 3
    assert "K=3 end gated M=2" in shown[2]
    assert shown[2].count(" n=32") == 6


def test_arguments_multiply_and_bad_ones_are_named(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    todo, output = parse(["depth=0,4", "seed=0,1,2", "frozen_vlm=true", f"output={tmp_path / 'x.json'}"])
    assert len(todo) == 6
    assert all(settings.frozen_vlm for settings in todo)
    assert output.name == "x.json"
    for word, message in (
        ("depht=4", "key of output, tokens, depth"),
        ("depth=four", "depth must be a int, got 'four'"),
        ("layout=middle", "layout must be one of start, both, end, got 'middle'"),
    ):
        assert main([word]) == 2
        assert message in capsys.readouterr().err


def test_a_memory_joins_a_trained_twin_and_training_ends_once_enough_is_right(folder: Path) -> None:
    settings = replace(TINY, twin_steps=2)
    twin, joined = (build(each, folder)[0].state_dict() for each in (replace(settings, tokens=0), settings))
    assert all(torch.equal(joined[name], weight) for name, weight in twin.items())
    assert any(not torch.equal(weight, build(TINY, folder)[0].state_dict()[name]) for name, weight in twin.items())
    assert [train(replace(settings, stop_at=share), folder)[3] for share in (0.0, 1.1)] == [1, 2]


def test_a_memory_trained_through_time_is_used(folder: Path) -> None:
    """The smallest that learns it, until it has: one query between the colour and the decision."""
    settings = Settings(depth=3, steps=300, short_steps=0, batch_size=48, longest_delay=1, training_layouts=8)
    settings = replace(settings, hidden=64, layers=2, lr=2e-3)
    record = run(replace(settings, held_out_layouts=8, stop_at=0.9), folder)
    found = record["trained_delays"]
    assert found["reset"] == found["n"] / 4
    assert found["on"] > 0.7 * found["n"], json.dumps(record)
    assert found["swapped"] > 0.7 * found["n"]
