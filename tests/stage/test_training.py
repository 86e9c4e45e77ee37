"""How a stage learns: its schedule, what it measures, tracks and saves, and how it goes on after an interruption."""

import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import interrupted_in_step
from stages import assert_equal_weights, changed, records, run, weights

from kuavo_train.config import RunConfig
from kuavo_train.errors import ConfigError, RunError
from kuavo_train.runs.run_folder import stage_folder
from kuavo_train.stage import setup
from kuavo_train.training import step_metrics
from kuavo_train.training.learner import Learner, TrainingDiverged
from kuavo_train.training.step_metrics import STEP_PARTS

Configs = Callable[..., list[RunConfig]]


def test_a_run_with_and_without_validation_ends_in_the_same_weights(small_configs: Configs, tmp_path: Path) -> None:
    often = small_configs(training={"max_steps": 6, "batch_size": 16}, validation={"every_epochs": 1})
    others = {"outputs": str(tmp_path / "rarely"), "validation": {"every_epochs": 99, "draws": 3}}
    rarely = [changed(config, **others) for config in often]
    assert run(often, 0) == run(rarely, 0) == 0
    assert len(records(stage_folder(often[0]), "epoch")) > len(records(stage_folder(rarely[0]), "epoch"))
    assert_equal_weights(weights(stage_folder(often[0])), weights(stage_folder(rarely[0])))


def test_accumulated_batches_are_one_step_of_the_schedule(small_configs: Configs, tmp_path: Path) -> None:
    recipe = {"log_every": 1, "warmup_steps": 2, "decay_steps": 4}
    at_once = small_configs(training=recipe, policy={"mem_backprop_depth": 0})
    parts = {"batch_size": 2, "gradient_accumulation_steps": 2}
    in_parts = [changed(config, outputs=str(tmp_path / "parts"), training=parts) for config in at_once]
    assert run(at_once, 0) == run(in_parts, 0) == 0
    metrics = [stage_folder(configs[0]).metrics.read() for configs in (at_once, in_parts)]
    for key in ("step", "lr", "task_frames"):
        one, other = ([record[key] for record in records] for records in metrics)
        assert one == other
    assert len({record["lr"] for record in metrics[1]}) == 4


def test_every_part_of_a_steps_time_is_told(small_configs: Configs, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that goes on by a second whenever it is looked at, which is once at the end of each part."""
    monkeypatch.setattr(step_metrics, "clock", partial(next, count()))
    configs = small_configs(training={"log_every": 1, "gradient_accumulation_steps": 2})
    assert run(configs, 0) == 0
    for record in stage_folder(configs[0]).metrics.read():
        parts = {part: record[f"{part}_ms"] / 1000 for part in STEP_PARTS}
        assert parts == {"wait": 1, "data": 2, "forward": 2, "backward": 2, "optimizer": 1}
        whole = sum(parts.values()) + 2  # with the looks at the step's beginning and end
        assert record["samples_per_s"] == round(2 * 4 / whole, 2)


def test_the_memorys_own_loss_is_reported_apart_from_that_on_the_actions(small_configs: Configs) -> None:
    lines = []
    for weight in (0, 5):
        configs = small_configs(training={"max_steps": 1}, policy={"mem_action_loss": weight}, run=f"weight{weight}")
        assert run(configs, 0) == 0
        lines += stage_folder(configs[0]).metrics.read()
    without, heavy = lines
    assert "memory_loss" not in without
    assert heavy["memory_loss"] > 0
    assert heavy["loss"] < without["loss"] + heavy["memory_loss"]  # not five times that on top


@pytest.mark.parametrize(
    ("stop_after", "depth", "words", "policy"),
    [
        (1, 0, (), {}),
        (3, 2, (), {}),
        (3, 2, ("memory=frames",), {}),
        (3, 1, ("memory=both",), {"mem_frames": 2}),
    ],
    ids=["alone", "through time", "frames", "both"],
)
def test_an_interrupted_stage_resumes_to_bit_identical_weights(
    small_configs: Configs, tmp_path: Path, stop_after: int, depth: int, words: tuple[str, ...], policy: dict[str, int]
) -> None:
    whole = small_configs(*words, training={"max_steps": 6}, policy={"mem_backprop_depth": depth, **policy})
    assert run(whole, 0) == 0
    cut = [replace(config, outputs=str(tmp_path / "cut")) for config in whole]
    with interrupted_in_step(stop_after):
        assert run(cut, 0) == 128 + signal.SIGTERM
    folder = stage_folder(cut[0])
    assert folder.status == "interrupted"
    assert folder.checkpoints.at("last").step == stop_after
    other = {"lr": 5e-4, "freeze_first_stage": ["expert"], "log_every": 1}
    message = r"other settings: training.lr \(was 0.002, is 0.0005\), training.freeze_first_stage .*; put them back"
    with pytest.raises(ConfigError, match=message):
        run(cut, 0, resume=True, training=other)
    assert run(cut, 0, resume=True) == 0
    assert_equal_weights(weights(stage_folder(whole[0])), weights(folder))
    states = [each.checkpoints.at("last").training_state() for each in (stage_folder(whole[0]), folder)]
    for state in states:
        state["progress"].pop("seconds")
    assert states[0]["scheduler"] == states[1]["scheduler"]
    one, other = states
    assert one["progress"] == other["progress"]
    assert bool(one["memory"]) == (depth > 0)
    assert_equal_weights(one["memory"], other["memory"])
    moments = [state["optimizer"]["state"] for state in states]
    for number in moments[0]:
        assert torch.equal(moments[0][number]["exp_avg_sq"], moments[1][number]["exp_avg_sq"])
    for name, keys in {"metrics": ("step", "loss", "lr"), "validations": ("step", "task", "kind", "loss")}.items():
        one, other = (
            [[line[key] for key in keys] for line in getattr(each, name).read()]
            for each in (stage_folder(whole[0]), folder)
        )
        assert len(one) > 2
        assert one == other


def test_a_stage_killed_before_its_first_checkpoint_starts_again(
    small_configs: Configs, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = small_configs()

    def die(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Learner, "learn", die)
        with pytest.raises(KeyboardInterrupt):
            run(configs, 0)
    assert run(configs, 0, resume=True) == 0
    assert len(records(stage_folder(configs[0]), "start")) == len(configs)


def test_a_loss_that_is_not_finite_stops_at_the_last_good_checkpoint_and_names_its_samples(
    small_configs: Configs, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = small_configs(training={"save_every": 1, "max_steps": 5})
    build = setup.build_policy

    def with_poison(*arguments: Any, **named: Any) -> Any:
        built = build(*arguments, **named)
        forward, calls = built.policy.forward, []

        def poisoned(*batch: Any, **keys: Any) -> Any:
            loss, values = forward(*batch, **keys)
            calls.append(built.policy.training)
            return (loss * float("nan") if sum(calls) == 3 else loss), values

        built.policy.forward = poisoned
        return built

    monkeypatch.setattr(setup, "build_policy", with_poison)
    message = r"loss nan .* step 3 .*\(moving_grasp, \d, \d+\).*last good checkpoint is .*000002"
    with pytest.raises(TrainingDiverged, match=message):
        run(configs, 0)
    folder = stage_folder(configs[0])
    assert folder.status == "failed"
    assert folder.checkpoints.at("last").step == 2
    assert all(torch.isfinite(value).all() for value in weights(folder).values())


def test_offline_tracking_leaves_a_weights_and_biases_run_in_the_stage_folder(small_configs: Configs) -> None:
    configs = small_configs(tracking="offline", training={"max_steps": 2})
    assert run(configs, 0) == 0
    assert list((stage_folder(configs[0]).path / "wandb").glob("offline-run-*/*.wandb"))


def test_a_tracked_stage_is_one_run_with_all_curves_that_goes_on(
    small_configs: Configs, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, curves = [], set()

    class Fake:
        def define_metric(self, name: str, *, step_metric: str) -> None:
            assert (name, step_metric) == ("*", "step")

        def log(self, values: dict[str, float]) -> None:
            assert "step" in values
            curves.update(values)

        def finish(self) -> None:
            pass

    def init(**about: Any) -> Fake:
        begun.append(about)
        return Fake()

    monkeypatch.setattr("wandb.init", init)
    where = {"project": "arms", "entity": "team"}
    configs = small_configs(tracking="offline", wandb=where, training={"max_steps": 2})
    assert run(configs, 0) == 0
    folder = stage_folder(configs[0])
    assert {"loss", "forward_ms", "validation/moving_grasp/loss", "validation/weighing/action_error"} <= curves
    folder.write(status="interrupted")
    assert run(configs, 0, resume=True) == 0
    assert run(configs, 1) == 0
    ids = [about["id"] for about in begun]
    assert ids[0] == ids[1] != ids[2]
    assert {(about["project"], about["entity"], about["resume"]) for about in begun} == {("arms", "team", "allow")}


def test_online_tracking_without_a_key_or_a_network_is_told_in_a_line(
    small_configs: Configs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    configs = small_configs(tracking="online", training={"max_steps": 2})
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"tracking=online must have a key .*, got none .*wandb login"):
        run(configs, 0)

    import wandb  # which takes seconds

    def init(**_about: Any) -> None:
        raise wandb.errors.CommError("the network is down")

    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr("wandb.init", init)
    with pytest.raises(RunError, match=r"must reach project kuavo_train .*got the network is down; .*off"):
        run(configs, 0)
    assert stage_folder(configs[0]).status == "failed"
