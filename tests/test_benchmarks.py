"""The benchmarks run, compare like with like, and keep what they found."""

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from graphs_on_cpu import StandIn

from benchmarks import (
    arithmetic,
    data_path,
    decoding,
    end_to_end,
    latency,
    memory_cost,
    memory_joins,
    precision,
    scaling,
    start_up,
    step_profile,
)
from benchmarks.__main__ import main
from benchmarks.measuring import Spread, Table, Timing, alternate, store
from benchmarks.models import SIZES, lerobot_policy, make_batch, our_policy
from benchmarks.video_dataset import write_dataset
from kuavo_train.config import RunConfig
from kuavo_train.runs.trained_run import TrainedRun
from kuavo_train.stage.stage import run_stage
from kuavo_train.training.learner import Learner

Configs = Callable[..., list[RunConfig]]


def test_variants_take_turns_and_the_warm_up_does_not_count() -> None:
    order: list[str] = []
    timings = alternate({name: lambda name=name: order.append(name) for name in "ab"}, rounds=3, warm_up=1, block=2)
    assert "".join(order) == "aabb" * 4
    assert len(timings["a"].wall) == len(timings["b"].cpu) == 3


def test_the_ratio_is_taken_within_a_turn() -> None:
    # A machine that is ten times as slow in the second turn is so for both.
    slow, fast = Timing([2.0, 20.0, 2.0], [2.0, 2.0, 2.0]), Timing([1.0, 10.0, 1.0], [1.0, 1.0, 0.5])
    wall, cpu = fast.times_as_fast_as(slow)
    assert wall == Spread(2.0, 2.0, 2.0)
    assert cpu == Spread(2.0, 2.0, 4.0)


def test_a_training_step_is_compared_on_the_same_loss_and_the_result_is_stored(tmp_path: Path) -> None:
    assert main(["training_step", "size=tiny", "rounds=1", "threads=1", f"folder={tmp_path}"]) == 0
    tables = json.loads((tmp_path / "results.json").read_text())["training_step"]["tables"]
    assert len(tables) == 2
    for table in tables.values():
        rows = {row[""]: row for row in table["rows"]}
        for who in ("ours, pictures", "ours, features"):
            assert float(rows[who]["loss"]) == pytest.approx(float(rows["LeRobot"]["loss"]), rel=1e-5)
            assert rows[who]["× LeRobot"]["median"] > 0
        assert str(tmp_path) not in table["command"]
        assert table["versions"]["lerobot"]
    assert "× LeRobot" in (tmp_path / "RESULTS.md").read_text()


def test_a_query_of_ours_gives_lerobots_actions(tmp_path: Path) -> None:
    speeds, costs = latency.compare("tiny", ("float32",), tmp_path, rounds=1)
    errors = {row[""]: row["action error"] for row in speeds.rows if row["part"] == "whole query"}
    assert errors["ours"] < 1e-4
    assert [row["part"] for row in costs.rows] == ["whole query", "all that follows"]


def test_a_query_in_graphs_is_timed_beside_the_one_without_and_gives_its_actions(tmp_path: Path) -> None:
    size = SIZES["tiny"]
    vlm = size.make_vlm(tmp_path)
    policy = our_policy(lerobot_policy(size, vlm), size, vlm, tokens=2)
    noise = torch.randn(1, size.chunk, policy.config.max_action_dim)
    cpu = torch.device("cpu")
    rows = latency.graph_rows(policy, make_batch(size, rows=1), noise, cpu, rounds=1, capture=StandIn)
    assert {row[""]: row["action error"] for row in rows} == {"ours, memory": 0.0, "ours, memory, in graphs": 0.0}
    assert policy.graphed is None


def test_the_products_of_a_part_are_all_found_and_carried_out_alone(tmp_path: Path) -> None:
    with arithmetic.Products() as products:
        torch.nn.functional.linear(torch.ones(5, 3), torch.ones(4, 3), torch.ones(4))
        torch.ones(2, 5, 3) @ torch.ones(2, 3, 7)
    assert products.found == {((5, 3), (3, 4)): 1, ((2, 5, 3), (2, 3, 7)): 1}
    rows = arithmetic.compare("tiny", tmp_path, rounds=1).rows
    assert len(rows) == 3
    assert rows[2]["GFLOP in products"] <= rows[1]["GFLOP in products"]  # keys and values of the prefix only once


def test_every_way_to_a_batch_is_measured(tmp_path: Path) -> None:
    settings = data_path.Settings(frames=20, batch_size=4, rounds=1)
    rows = data_path.compare("96x96", settings, tmp_path / "data").rows
    ways = ("LeRobotDataset", "ours, decoding", "ours, frames", "ours, frames, as float", "ours, features")
    assert tuple(row[""] for row in rows) == ways


def test_frames_one_by_one_are_timed_beside_those_of_whole_episodes() -> None:
    settings = decoding.Settings(height=48, width=64, frames=4, rounds=1)
    (few, many) = (decoding.compare(name, settings).rows for name in list(decoding.ENCODERS)[1:])
    assert [row[""] for row in few] == [row[""] for row in many] == ["episode after episode", "one by one"]


def test_what_a_first_epoch_costs_is_measured_on_the_stage_that_is_trained(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data", height=48, width=64, episodes=3, frames=6)
    size = SIZES["tiny"]
    vlm = size.make_vlm(tmp_path / "vlm")
    run = end_to_end.overrides(size, vlm, tmp_path / "data", tmp_path, run="fill", steps=1)
    assert end_to_end.seconds_per_embedded_frame(run) > 0


def test_every_memory_is_measured_against_none(tmp_path: Path) -> None:
    settings = memory_cost.Settings(tokens=(2, 3), layout=("end", "start"), depth=(1, 2), rounds=1)
    rows = memory_cost.compare("tiny", "VLM frozen", settings, tmp_path).rows
    memories = ("end, 2 tokens", "end, 3 tokens", "start, 2 tokens")
    assert [row[""] for row in rows] == [
        "no memory",
        *(f"{memory}, K = {depth}" for memory in memories for depth in (1, 2)),
    ]


def test_a_memory_of_less_weight_disturbs_the_policy_it_joins_less(small_configs: Configs) -> None:
    (config,) = small_configs("policy=smolvla", "learn=[moving_grasp]", training={"max_steps": 1})
    assert run_stage(config, [config.stage]) == 0
    ask = memory_joins.HeldOutLoss(TrainedRun.open(config.run_folder))
    alone, faint, loud = (
        ask(seed=1, **memory)
        for memory in ({}, memory_joins.joining("end", 2, 1e-4), memory_joins.joining("end", 2, 2.0))
    )
    assert abs(faint - alone) < abs(loud - alone) / 10


def test_memory_grows_with_frames_whatever_the_number_of_tasks() -> None:
    (table,) = scaling.run(scaling.Settings(frames=(400, 4000), tasks=(1, 2), batch_size=8, rounds=1))
    assert [(row["tasks"], row["frames"]) for row in table.rows] == [(1, 400), (1, 4000), (2, 400), (2, 4000)]
    assert table.rows[1]["MiB"] > table.rows[0]["MiB"]


def test_a_start_is_measured_on_the_stage_that_is_opened(tmp_path: Path) -> None:
    for name in start_up.TASKS:
        start_up.write_tables(tmp_path / "data" / name, frames=500, base=name == "sorting")
    found = start_up.start(tmp_path)
    assert list(found) == ["hash s", "open s", "first batch s", "all s", "MiB"]
    assert found["all s"] == pytest.approx(found["open s"] + found["hash s"] + found["first batch s"])


def test_a_new_result_takes_the_place_of_the_old_one_and_of_no_other(tmp_path: Path) -> None:
    def result(title: str, value: float) -> list[Table]:
        return [Table(title, [{"ms": value}])]

    store(tmp_path, "latency", "About.", result("small", 1.0))
    store(tmp_path, "latency", "About.", result("large", 2.0))
    store(tmp_path, "scaling", "About.", result("small", 3.0))
    store(tmp_path, "latency", "About.", result("small", 4.0))
    found: dict[str, Any] = json.loads((tmp_path / "results.json").read_text())
    assert {title: table["rows"][0]["ms"] for title, table in found["latency"]["tables"].items()} == {
        "small": 4.0,
        "large": 2.0,
    }
    assert found["scaling"]["tables"]["small"]["rows"] == [{"ms": 3.0}]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["bench"], "a benchmark must be one of training_step"),
        (["scaling", "round=3"], "a key of scaling must be one of folder, batch_size"),
        (["scaling", "rounds=many"], "rounds must be int, got 'many'"),
    ],
)
def test_a_command_that_cannot_be_meant_is_refused(
    words: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    assert main(words) == 2
    assert message in capsys.readouterr().err


def test_the_steps_that_were_rounded_away_are_counted_and_an_interval_is_over_seeds() -> None:
    name = f"{precision.EXPERT}layers.0.weight"
    before = {name: torch.full((4,), 1.0, dtype=torch.bfloat16), "other": torch.zeros(1)}
    after = {name: torch.tensor([1.0, 1.0, 4.0, 5.0]), "other": torch.ones(1)}
    assert precision.changed_and_moved(before, after) == (0.5, 5.0)
    assert precision.with_interval([1.0, 2.0, 3.0]) == "+2.0000 (-0.4841 to +4.4841)"


@pytest.mark.slow
def test_learning_in_bfloat16_and_in_float32_is_measured_with_the_real_commands(tmp_path: Path) -> None:
    small = ["steps=4", "seed=0", "episodes=4", "held_out=2", "batch_size=4", "draws=1", "image=32"]
    for _ in range(2):  # the second time it is all there
        assert main(["precision", f"work={tmp_path / 'work'}", f"folder={tmp_path}", *small]) == 0
    learnt, _ = json.loads((tmp_path / "results.json").read_text())["precision"]["tables"].values()
    changed = [float(row["expert's weights that changed"].rstrip("%")) for row in learnt["rows"]]
    assert changed[0] < 60 < 99 < min(changed[1:])


def test_what_training_takes_is_said_of_every_way_to_train(tmp_path: Path) -> None:
    assert main(["step_memory", "size=tiny", "samples=8", f"folder={tmp_path}"]) == 0
    (table,) = json.loads((tmp_path / "results.json").read_text())["step_memory"]["tables"].values()
    per_sample = {(row["finetune"], row["checkpointing"]): row["activations, MiB per sample"] for row in table["rows"]}
    for finetune in ("expert_only", "lora", "end_to_end"):
        assert per_sample[finetune, "yes"] < per_sample[finetune, "no"]
    assert per_sample["end_to_end", "no"] > per_sample["expert_only", "no"]


def test_a_steps_time_is_divided_among_kinds_of_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = torch.randn(200, 200)

    def learn(_: object) -> dict[str, float]:
        return {"loss": float((weights @ weights).tanh().sum())}

    monkeypatch.setattr(Learner, "learn", learn)
    steps = 0
    with step_profile.watched() as watch, suppress(step_profile.Measured):
        for _ in range(1000):
            Learner.learn(None)  # type: ignore[arg-type, call-arg]
            steps += 1
    assert steps == step_profile.WARM + 2 * step_profile.STEPS
    assert Learner.learn is learn
    shares = watch.shares()
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["matrix products"] > 0.1
    assert shares["attention"] == 0
    assert "| matrix products | " in step_profile.table(watch)
