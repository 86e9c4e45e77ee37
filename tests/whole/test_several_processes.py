"""Stages of several processes: the results of one, whatever ends them on the way."""

import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from forked import Forked, interrupted_in_step, when
from stages import changed, records, run
from together import together
from torch.distributed import distributed_c10d

from kuavo_train import launcher
from kuavo_train.config import MergeConfig, RunConfig
from kuavo_train.data.batch import Batch
from kuavo_train.data.images import plan
from kuavo_train.evaluation import validation
from kuavo_train.evaluation.environment import evaluation_seeds
from kuavo_train.runs.run_folder import StageFolder, stage_folder
from kuavo_train.stage import stage, stage_validation
from kuavo_train.training.learner import Learner

Configs = Callable[..., list[RunConfig]]
Step = list[tuple[int, ...]]
"""Task, episode, frame and stream of the samples of a step."""
RECIPE = {"max_steps": 6, "batch_size": 8, "log_every": 1}
BATCHES = {"batch_size": 1}


def test_two_processes_come_to_the_numbers_of_one_and_one_goes_on_where_they_were(
    small_configs: Configs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    both = small_configs(training=RECIPE, policy={"mem_backprop_depth": 2}, validation=BATCHES, processes=2)
    alone = [changed(config, outputs=str(tmp_path / "alone"), processes=1) for config in both]
    queries_of, asked = validation.query_of, []
    monkeypatch.setattr(validation, "query_of", lambda *of: asked.append(of) or queries_of(*of))

    def train() -> int:
        with interrupted_in_step(4):
            status = run(both)
        (tmp_path / os.environ["RANK"]).write_text(str(len(asked)))
        return status

    assert together(train) == [143, 143]
    parts = [int((tmp_path / rank).read_text()) for rank in "01"]
    assert run(both, resume=True, processes=1) == 0
    asked.clear()
    assert run(alone) == 0
    at_first = len(alone) * alone[0].data.held_out_episodes
    assert parts == [at_first // 2, at_first // 2]
    two, one = stage_folder(both[0]), stage_folder(alone[0])
    assert records_of(two, "start") == records_of(one, "start")  # to the last digit: of the same weights
    for key in ("loss", "memory_loss", "grad_norm", "lr"):
        of_two, of_one = ([line[key] for line in folder.metrics.read()] for folder in (two, one))
        assert of_two == pytest.approx(of_one, rel=1e-4), key
    audits = [json.loads((folder.path / "replay_audit.json").read_text()) for folder in (two, one)]
    assert audits[0] == audits[1]
    assert {**two.settings, "outputs": "", "resume": ""} == {**one.settings, "outputs": "", "resume": ""}
    states = [folder.checkpoints.at("last").training_state()["progress"]["sizes"] for folder in (two, one)]
    assert states == [[{"step": 0, "samples": 8}]] * 2


def test_while_the_first_process_records_and_fills_caches_the_other_waits_longer_than_torch_would(
    small_configs: Configs, monkeypatch: pytest.MonkeyPatch
) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    seconds, fill = 3, plan.fill_frames
    monkeypatch.setattr(distributed_c10d, "default_pg_timeout", timedelta(seconds=seconds))

    def first_takes_its_time(*of: Any, **how: Any) -> None:
        time.sleep(2 * seconds if os.environ["RANK"] == "0" else 0)

    monkeypatch.setattr(stage, "record_missing_data", first_takes_its_time)
    monkeypatch.setattr(plan, "fill_frames", lambda *of, **how: first_takes_its_time() or fill(*of, **how))
    recipe = {"max_steps": 1, "batch_size": 8}
    both = small_configs("learn=[moving_grasp]", training=recipe, validation=BATCHES, processes=2)
    assert together(lambda: run(both)) == [0, 0]


STEPS_OF_TWO, STEPS = 50, 55
LONG = {"max_steps": STEPS, "epochs": STEPS, "batch_size": 8, "log_every": 1, "lr": 5e-5, "decay_lr": 1e-6}


def test_fifty_steps_of_two_processes_have_the_samples_and_losses_of_one_which_may_go_on(
    small_configs: Configs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    validation = {"every_epochs": STEPS, **BATCHES}
    both = small_configs("learn=[moving_grasp]", training=LONG, validation=validation, processes=2)
    alone = [changed(config, outputs=str(tmp_path / "alone"), processes=1) for config in both]
    learn, dealt = Learner.learn, list[Step]()

    def learn_and_note(learner: Learner, batches: Sequence[Batch], **how: Any) -> dict[str, float]:
        dealt.append([tuple(row) for batch in batches for row in torch.stack(batch.origin, dim=1).tolist()])
        return learn(learner, batches, **how)

    monkeypatch.setattr(Learner, "learn", learn_and_note)

    def train() -> int:
        with interrupted_in_step(STEPS_OF_TWO):
            status = run(both)
        (tmp_path / os.environ["RANK"]).write_text(json.dumps(dealt))
        return status

    assert together(train) == [143, 143]
    shares = [json.loads((tmp_path / rank).read_text()) for rank in "01"]
    dealt_to_two = [[tuple(row) for share in step for row in share] for step in zip(*shares, strict=True)]
    assert run(both, resume=True, processes=1) == 0
    dealt_to_two, dealt[:] = dealt_to_two + dealt, []
    assert run(alone) == 0
    assert len(dealt) == STEPS
    assert dealt_to_two == dealt
    two, one = ([line["loss"] for line in stage_folder(each[0]).metrics.read()] for each in (both, alone))
    assert two == pytest.approx(one, rel=1e-5)


def test_two_processes_with_gradient_checkpointing_come_to_the_losses_of_one_without(
    small_configs: Configs, tmp_path: Path
) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    recipe = {**RECIPE, "freeze_first_stage": [], "lr": 5e-5, "decay_lr": 1e-6}
    alone = small_configs("learn=[moving_grasp]", training=recipe)
    both = [
        changed(config, outputs=str(tmp_path / "two"), processes=2, policy={"gradient_checkpointing": True})
        for config in alone
    ]
    assert together(lambda: run(both)) == [0, 0]
    assert run(alone) == 0
    two, one = ([line["loss"] for line in stage_folder(each[0]).metrics.read()] for each in (both, alone))
    assert two == pytest.approx(one, rel=1e-5)


@pytest.mark.parametrize("episodes", [5, 1])  # of one, the second process plays none
def test_two_processes_validate_and_roll_out_what_one_does(
    small_configs: Configs, tmp_path: Path, episodes: int
) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    words = ("learn=[moving_grasp]", "stage.environment=worlds:Arms-v0", "rollout.workers=1")
    rollout = {"episodes": episodes, "parallel": 2}
    recipe = {"max_steps": 1, "batch_size": 8}
    both = small_configs(*words, training=recipe, rollout=rollout, validation=BATCHES, processes=2)
    alone = [changed(config, outputs=str(tmp_path / "alone"), processes=1) for config in both]
    played = []

    def train() -> int:
        play = stage_validation.roll_out
        stage_validation.roll_out = lambda *of, **how: played.append(len(of[2])) or play(*of, **how)
        status = run(both)
        (tmp_path / os.environ["RANK"]).write_text(json.dumps(played))
        return status

    assert together(train) == [0, 0]
    assert [json.loads((tmp_path / rank).read_text()) for rank in "01"] == [[(episodes + 1) // 2], [episodes // 2]]
    assert run(alone) == 0
    two, one = stage_folder(both[0]), stage_folder(alone[0])
    (of_two,), (of_one,) = (folder.rollouts.read() for folder in (two, one))
    assert [each["seed"] for each in of_two["episodes"]] == evaluation_seeds(episodes)
    for key in ("successes", "trials", "progress"):
        assert of_two[key] == of_one[key], key
    for kind in ("start", "epoch"):
        losses = [[record["loss"] for record in records(folder, kind)] for folder in (two, one)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_two_processes_choose_the_alphas_that_one_does(small_configs: Configs, tmp_path: Path) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    recipe = {"max_steps": 1, "batch_size": 8}
    merge = MergeConfig(alphas=[0.5, 1.0], episodes=2)
    how = {"strategy": "merge", "mixture": "own_task", "merge": merge, "validation": BATCHES}
    both = small_configs(training=recipe, processes=2, **how)
    alone = [changed(config, outputs=str(tmp_path / "alone"), processes=1) for config in both]
    assert together(lambda: max(run(both, 0), run(both, 1))) == [0, 0]
    assert max(run(alone, 0), run(alone, 1)) == 0
    two, one = (json.loads((stage_folder(configs[1]).path / "merge.json").read_text()) for configs in (both, alone))
    assert two["chosen"] == one["chosen"]
    for of_two, of_one in zip(two["rounds"], one["rounds"], strict=True):
        losses = [[entry["loss"] for entry in swept["sweep"]] for swept in (of_two, of_one)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def records_of(folder: StageFolder, kind: str) -> list[dict[str, Any]]:
    return [{**record, "seconds": None} for record in records(folder, kind)]


def in_step(number: int, rank: int, do: Callable[[], Any]) -> Callable[[], None]:
    def before() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        when(Learner, "learn", lambda: do() if os.environ["RANK"] == str(rank) else None, call=number)

    return before


PHASES: list[tuple[Callable[[], None], int, int]] = [  # what ends it, the status it leaves, steps that are kept
    (in_step(2, 0, lambda: os.kill(os.getppid(), signal.SIGTERM)), 143, 2),
    (in_step(1, 1, lambda: os.killpg(os.getpgid(os.getppid()), signal.SIGINT)), 130, 3),
    (in_step(2, 1, lambda: os.kill(os.getpid(), signal.SIGKILL)), 137, 4),  # at an even step there is a checkpoint
]


def test_a_command_of_two_processes_goes_on_whatever_has_ended_it(
    small_run: Callable[..., list[str]],
    tmp_path: Path,
    forked: Callable[..., Forked],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(launcher, "START", "fork")
    words = small_run(
        "learn=[moving_grasp]", "processes=2", "training.max_steps=6", "training.batch_size=8", "resume=true"
    )
    folder = StageFolder(tmp_path / "outputs" / "smoke" / "stage1_moving_grasp")
    for before, status, step in PHASES:
        running = forked("kuavo_train", *words, before=before)
        done = running.wait()
        assert done.returncode == status, done
        assert done.stdout.count("interrupted: ") == (status != 137), done
        assert ("was ended by SIGKILL" in done.stderr) == (status == 137), done
        assert "Traceback" not in done.stderr, done
        assert not living_like(folder), done
        assert folder.checkpoints.latest().step == step
    done = forked("kuavo_train", *words, before=lambda: AcceleratorState._reset_state(reset_partial_state=True)).wait()
    assert done.returncode == 0, done
    assert done.stdout.count("finished stage 1") == 1
    assert json.loads((folder.path / "replay_audit.json").read_text())["total_frames"] == 6 * 8


def living_like(folder: StageFolder) -> bool:
    """Whether a process still holds the stage."""
    return folder.status == "running"
