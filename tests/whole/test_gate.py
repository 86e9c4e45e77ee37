"""The gate: who is over the budget, and what follows: a warning, the stage's end, more replay of what is being lost."""

import json
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import interrupted_in_step
from safetensors.torch import load_file
from stages import run

from kuavo_train.config import ForgettingConfig, RunConfig
from kuavo_train.data.replay.shares import proportional_shares, raised_shares
from kuavo_train.metrics.intervals import Interval
from kuavo_train.runs.records import GateReading
from kuavo_train.runs.run_folder import stage_folder
from kuavo_train.stage import stage
from kuavo_train.stage.training import StageHooks
from kuavo_train.strategies.forgetting_gate import Gate
from kuavo_train.training.epochs import Timetable

Configs = Callable[..., list[RunConfig]]
ByDepth = Callable[[int], list[RunConfig]]  # depth of backpropagation through the memory → a run, trained once
SHARES = {"first": 0.1, "second": 0.2, "new": 0.7}
LEARNT = {"first": {1: 0.10, 2: 0.12, 3: 0.08, 4: 0.11, 5: 0.09}, "second": {1: 0.2, 4: 0.3, 7: 0.25, 8: 0.22}}


def times(factor: float, scores: dict[int, float], spread: float = 0.0) -> dict[int, float]:
    """The scores `factor` times as high, more for some episodes and less for others by `spread`."""
    return {e: v * (factor + (spread if e % 2 else -spread)) for e, v in scores.items()}


def act(now: dict[str, dict[int, float]], *, over: bool = False, **settings: Any):
    gate = Gate(LEARNT, ForgettingConfig(**{"budget": 0.2, **settings}))
    return gate.act(gate.read(now), shares=SHARES, new="new", over=over)


def test_a_task_is_over_the_budget_when_the_lower_end_of_its_interval_is() -> None:
    gate = Gate(LEARNT, ForgettingConfig(budget=0.2))
    now = {"first": times(1.5, LEARNT["first"], 0.01), "second": times(1.1, LEARNT["second"]), "new": {1: 0.5}}
    first, second = gate.read(now)
    assert (first.task, second.task) == ("first", "second")
    assert first.change.estimate == pytest.approx(0.5, abs=0.01)
    assert first.exceeded
    assert not second.exceeded
    doubtful = gate.read({**now, "first": times(1.5, LEARNT["first"], 0.5)})[0]
    assert doubtful.change.estimate > 0.2 > doubtful.change.low
    assert not doubtful.exceeded


def test_the_gate_is_as_sure_as_the_verdict_is_asked_to_be() -> None:
    now = {"first": times(1.5, LEARNT["first"], 0.5), "second": LEARNT["second"]}
    lows = [Gate(LEARNT, ForgettingConfig(budget=0.2, confidence=c)).read(now)[0].change.low for c in (0.5, 0.99)]
    assert lows[0] > lows[1]


def test_a_single_episode_gives_no_interval_and_never_exceeds() -> None:
    gate = Gate({"first": {3: 0.1}}, ForgettingConfig(budget=0.2))
    assert not gate.read({"first": {3: 9.0}})[0].exceeded


def test_without_a_budget_nothing_is_read() -> None:
    assert Gate(LEARNT, ForgettingConfig()).read({}) == []


def test_other_episodes_than_when_the_task_was_learnt_are_refused() -> None:
    with pytest.raises(ValueError, match="the same episodes must be scored"):
        Gate(LEARNT, ForgettingConfig(budget=0.2)).read({"first": {1: 0.1}, "second": LEARNT["second"]})


def test_what_follows_is_what_the_configuration_says() -> None:
    kept, lost = LEARNT, {**LEARNT, "first": times(2, LEARNT["first"])}
    assert act(kept).name is None
    warned = act(lost)
    assert (warned.name, warned.stop, warned.shares) == ("warn", None, None)
    assert "first +100.0" in warned.reason
    assert "the budget is 20" in warned.reason
    stopped = act(lost, on_exceed="stop")
    assert stopped.stop == warned.reason
    raised = act(lost, on_exceed="raise_replay")
    assert raised.name == "raise_replay"
    assert raised.shares == pytest.approx({"first": 0.2, "second": 0.2 * 8 / 9, "new": 0.7 * 8 / 9}, abs=1e-4)
    for wish in ("stop", "raise_replay"):
        at_the_end = act(lost, on_exceed=wish, over=True)
        assert (at_the_end.name, at_the_end.stop, at_the_end.shares) == ("warn", None, None)
    bounded = act(lost, on_exceed="raise_replay", raise_limit=0.1)
    assert (bounded.name, bounded.shares) == ("warn", None)
    assert "cannot be raised any further" in bounded.reason


def raise_of(*tasks: str, factor: float = 2.0, limit: float = 0.4, floor: float = 0.3) -> dict[str, float]:
    raised = raised_shares(SHARES, tasks, new="new", factor=factor, limit=limit, floor=floor)
    assert sum(round(share * 10_000) for share in raised.values()) == 10_000
    return raised


def test_a_raised_share_is_multiplied_up_to_its_limit_and_the_others_shrink_in_proportion() -> None:
    raised = raise_of("second", factor=3)
    assert raised["second"] == 0.4
    assert raised["first"] / raised["new"] == pytest.approx(0.1 / 0.7, abs=1e-3)
    both = raise_of("first", "second")
    assert (both["first"], both["second"], both["new"]) == pytest.approx((0.2, 0.4, 0.4))


def test_the_new_task_keeps_its_floor_and_the_raises_share_what_is_left() -> None:
    raised = raise_of("first", "second", factor=4, floor=0.5)
    assert raised["new"] == pytest.approx(0.5)
    assert (raised["first"] - 0.1) / (raised["second"] - 0.2) == pytest.approx(0.3 / 0.2, rel=1e-2)
    assert raise_of("first", floor=0.9) == SHARES  # it has less already: nothing is taken from it


def test_a_share_at_its_limit_or_of_a_task_not_replayed_stays() -> None:
    assert raise_of("second", limit=0.2) == SHARES
    assert raise_of("absent") == SHARES


def test_shares_in_proportion_are_ten_thousandths_that_sum_to_one() -> None:
    shares = proportional_shares({"a": 1, "b": 1, "c": 1})
    assert sorted(shares.values()) == [0.3333, 0.3333, 0.3334]
    assert sum(map(round, (10_000 * share for share in shares.values()))) == 10_000


def test_epochs_after_a_raise_are_longer_and_the_plan_goes_by_passes() -> None:
    timetable = Timetable(epochs=5, steps_per_epoch=10)
    assert timetable.steps == 50
    assert [timetable.planned(step) for step in (0, 7, 20)] == [0, 7, 20]
    timetable.change(20, 15)
    assert timetable.steps == 20 + 3 * 15
    assert [timetable.epoch(step) for step in (10, 20, 35, 65)] == [1, 2, 3, 5]
    assert [timetable.planned(step) for step in (10, 20, 35, 65)] == [10, 20, 30, 50]
    assert [s for s in range(1, 66) if timetable.validates(s, every=2)] == [20, 50, 65]
    timetable.change(65, 20)
    assert timetable.steps == 65
    assert Timetable(epochs=5, steps_per_epoch=10, max_steps=33).steps == 33


# --- whole stages -----------------------------------------------------------------------------------------------------


def continued(first: list[RunConfig], outputs: Path, on_exceed: str) -> list[RunConfig]:
    """A run of its own that begins with the first stage of another, which need not be trained again."""
    shutil.copytree(first[0].run_folder, outputs / first[0].run, symlinks=True)
    return [replace(c, outputs=str(outputs), forgetting=replace(c.forgetting, on_exceed=on_exceed)) for c in first]


@pytest.fixture
def lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every validation finds the earlier tasks twice as bad as when they were learnt."""
    lose_all(monkeypatch)


def lose_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(gate: Gate, now: Any) -> list[GateReading]:
        return [GateReading(task, Interval(1.0, 0.9, 1.1, 0.95, 2), 0.2) for task in gate.learnt]

    monkeypatch.setattr(Gate, "read", read)


FEW_WHOLE_EPOCHS = (
    "training.max_steps=null",
    "training.epochs=3",
    "training.batch_size=16",
    "training.save_every=3",
    "forgetting.budget=0.2",
)


@pytest.fixture(scope="module")
def begun(small_configs_in: Configs, tmp_path_factory: pytest.TempPathFactory) -> ByDepth:
    """A run of few, whole epochs whose gate is on, with its first stage done."""

    @cache
    def train(depth: int) -> list[RunConfig]:
        outputs = tmp_path_factory.mktemp("begun")
        three = "learn=[moving_grasp,weighing,placement]"
        configs = small_configs_in(outputs, three, *FEW_WHOLE_EPOCHS, policy={"mem_backprop_depth": depth})
        assert run(configs, 0) == 0
        return configs

    return train


@pytest.fixture(scope="module")
def raised(begun: ByDepth, tmp_path_factory: pytest.TempPathFactory) -> ByDepth:
    """With the second stage done too, during which what it had learnt was lost and replayed more."""

    @cache
    def train(depth: int) -> list[RunConfig]:
        configs = continued(begun(depth), tmp_path_factory.mktemp("raised"), "raise_replay")
        with pytest.MonkeyPatch.context() as monkeypatch:
            lose_all(monkeypatch)
            assert run(configs, 1) == 0
        return configs

    return train


@pytest.mark.usefixtures("lost")
def test_stop_ends_the_stage_at_its_best_checkpoint_and_the_next_one_goes_on(begun: ByDepth, tmp_path: Path) -> None:
    configs = continued(begun(0), tmp_path, "stop")
    assert stage_folder(configs[0]).gate.read() == []  # nothing can be lost while the first task is learnt
    assert run(configs, 1) == 0
    folder = stage_folder(configs[1])
    about = folder.about
    assert about["status"] == "finished"
    assert about["stopped"].startswith("held-out loss since learnt: moving_grasp +100.0")
    assert about["steps"] == about["total_steps"] / 3  # after the first of three epochs
    assert folder.checkpoints.at("best").step == about["best"]["step"] == about["steps"]
    lines = folder.gate.read()
    assert [(line["task"], line["exceeded"], line["action"]) for line in lines] == [("moving_grasp", True, "stop")]
    assert run(configs, 2) == 0


@pytest.mark.parametrize(("result", "place"), [("best", 0), ("last", 2)])
def test_a_stage_that_only_gets_worse_ends_in_its_first_checkpoint_or_where_told_in_its_last(
    small_configs: Configs, monkeypatch: pytest.MonkeyPatch, result: str, place: int
) -> None:
    worse = iter([0.1, 0.2, 0.3])
    epoch_done = StageHooks.epoch_done
    monkeypatch.setattr(
        StageHooks, "epoch_done", lambda *words, **named: replace(epoch_done(*words, **named), loss=next(worse))
    )
    configs = small_configs(*FEW_WHOLE_EPOCHS, policy={"mem_backprop_depth": 0}, validation={"result": result})
    assert run(configs, 0) == 0
    folder = stage_folder(configs[0])
    lines = folder.validations.read()
    epochs = [line for line in lines if line["kind"] == "epoch"]
    assert len(epochs) == 3
    step = epochs[place]["step"]
    assert folder.checkpoints.at("best").step == step
    assert folder.about["best"] == {"step": step, "loss": [0.1, 0.2, 0.3][place]}
    assert folder.about["result"] == result
    end = next(line for line in lines if (line["kind"], line["task"]) == ("end", "moving_grasp"))
    assert end["loss"] == epochs[place]["loss"] != epochs[2 - place]["loss"]
    weights = [
        load_file(folder.path / f"checkpoints/{link}/pretrained_model/model.safetensors") for link in ("best", "last")
    ]
    same = all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert same == (result == "last")


@pytest.mark.usefixtures("lost")
def test_a_stage_stopped_and_killed_before_its_conclusion_is_concluded_not_continued(
    begun: ByDepth, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = continued(begun(0), tmp_path, "stop")
    with monkeypatch.context() as patched:
        patched.setattr(stage, "conclude", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(configs, 1)
    assert run(configs, 1, resume=True) == 0
    about = stage_folder(configs[1]).about
    assert about["steps"] < about["total_steps"]
    assert "moving_grasp" in about["stopped"]


@pytest.mark.parametrize("depth", [0, 2])
def test_a_raise_keeps_quotas_in_every_segment_and_the_new_task_its_passes(raised: ByDepth, depth: int) -> None:
    configs = raised(depth)
    folder = stage_folder(configs[1])
    audit = json.loads((folder.path / "replay_audit.json").read_text())
    segments = audit["segments"]
    assert [segment["declared"]["moving_grasp"] for segment in segments] == [0.2, 0.4]
    batch, clip = configs[1].training.batch_size, max(depth, 1)
    steps = [segments[0]["from_step"], segments[1]["from_step"], folder.about["steps"]]
    for segment, length in zip(segments, np.diff(steps), strict=True):
        frames = {task: drawn["frames"] for task, drawn in segment["drawn"].items()}
        assert sum(frames.values()) == length * batch
        for task, share in segment["declared"].items():
            assert abs(frames[task] - share * length * batch) < clip
    assert audit["declared"]["moving_grasp"] == pytest.approx(np.average([0.2, 0.4], weights=np.diff(steps)))
    assert 3 <= audit["passes"]["weighing"] < 3 + 3 * batch / 42  # as without a raise, but for the last batches
    assert steps[2] == folder.about["total_steps"]
    actions = [line["action"] for line in folder.gate.read()]
    assert actions == ["raise_replay", "warn", "warn"]  # then it is at its limit
    rates = [record["lr"] for record in folder.metrics.read()]
    assert rates[-1] == pytest.approx(1e-5, rel=1e-2)  # the plan's end, though it took longer


@pytest.mark.usefixtures("lost")
@pytest.mark.parametrize(("stop_at", "depth"), [(2, 0), (4, 0), (6, 2)])  # before the raise, at it, after it
def test_a_stage_resumed_across_a_raise_is_bit_identical(
    begun: ByDepth, raised: ByDepth, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int, depth: int
) -> None:
    whole, cut = raised(depth), continued(begun(depth), tmp_path, "raise_replay")
    with interrupted_in_step(stop_at):
        assert run(cut, 1) == 128 + signal.SIGTERM
    assert stage_folder(cut[1]).checkpoints.at("last").step == stop_at
    assert run(cut, 1, resume=True) == 0
    folders = [stage_folder(configs[1]) for configs in (whole, cut)]
    for link in ("last", "best"):
        one, other = (load_file(f.path / f"checkpoints/{link}/pretrained_model/model.safetensors") for f in folders)
        assert all(torch.equal(one[name], other[name]) for name in one)
    for file in ("replay_audit.json", "gate.jsonl"):
        assert (folders[0].path / file).read_text() == (folders[1].path / file).read_text()
    assert len(json.loads((folders[1].path / "replay_audit.json").read_text())["segments"]) == 2


def test_in_the_middle_of_an_epoch_as_well_and_no_pass_is_shortened() -> None:
    timetable = Timetable(epochs=3, steps_per_epoch=10)
    timetable.change(4, 5)  # twice the processes: the other six tenths in three steps
    assert timetable.steps == 17
    assert [step for step in range(1, 18) if timetable.validates(step, every=1)] == [7, 12, 17]
    timetable.change(8, 7)
    assert timetable.steps == 21  # 1.8 epochs of 7 steps, rounded up
    assert [step for step in range(1, 22) if timetable.validates(step, every=1)] == [7, 14, 21]
    assert [timetable.number(step) for step in (3, 7, 8, 14, 20, 21)] == [1, 1, 2, 2, 3, 3]
    assert [timetable.planned(step) for step in (4, 7)] == [4, 10]
