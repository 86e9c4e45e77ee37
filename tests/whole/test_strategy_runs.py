"""Whole runs of each strategy: the same exposure to new data in each, and what each keeps."""

import json
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import interrupted_in_step
from safetensors.torch import load_file
from stages import changed, run

from kuavo_sim import ENVIRONMENT_IDS
from kuavo_train.compose import compose_run, stages_to_run
from kuavo_train.config import CONFIG_FOLDER, EwcConfig, LoraConfig, MergeConfig, ReplayConfig, RunConfig
from kuavo_train.curriculum import train_all_stages
from kuavo_train.data.mixture import mixture_of
from kuavo_train.errors import ConfigError
from kuavo_train.evaluation.checkpoints import Contestant
from kuavo_train.evaluation.options import Options
from kuavo_train.reporting.run_analysis import analyse
from kuavo_train.runs.run_folder import stage_folder
from kuavo_train.runs.stored_run import StoredRun
from kuavo_train.runs.trained_run import TrainedRun, load_policy
from kuavo_train.strategies.alphas import ONE_MODULE
from kuavo_train.strategies.importance import Importance

Overrides = Callable[..., list[str]]
STRATEGIES: dict[str, dict[str, Any]] = {
    "replay": {},
    "sequential": {"mixture": "own_task"},
    "joint": {"mixture": "all_tasks"},
    "ewc": {"mixture": "own_task", "ewc": EwcConfig(strength=1e6, batches=1)},
    "merge": {"mixture": "own_task", "merge": MergeConfig(alphas=[0.5, 1.0], episodes=1)},
}
EPOCHS = {"moving_grasp": 4, "weighing": 1, "placement": 2}


@pytest.fixture(scope="module")
def runs(datasets: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, list[RunConfig]]]:
    """A finished run of each strategy, of few, whole epochs."""
    outputs = tmp_path_factory.mktemp("strategies") / "outputs"
    composed = compose_run(
        [
            "profile=smoke",
            "learn=[moving_grasp,weighing,placement]",
            "simulation=null",
            "rollout.episodes=0",
            f"outputs={outputs}",
            f"data.root={datasets}",
            "tiny_vlm.image_size=32",
            "policy.resize_imgs_with_padding=[32,32]",
            "policy.chunk_size=6",
            "policy.n_action_steps=4",
            "policy.mem_backprop_depth=2",
            "training.max_steps=null",
            "training.batch_size=16",
            "validation.every_epochs=2",
        ]
    )
    finished = {}
    for strategy, settings in STRATEGIES.items():
        finished[strategy] = [
            changed(c, strategy=strategy, run=strategy, training={"epochs": EPOCHS[c.stage.name]}, **settings)
            for c in composed
        ]
        assert train_all_stages(finished[strategy]) == 0
    yield finished
    shutil.rmtree(outputs)


def audits(configs: list[RunConfig]) -> list[dict[str, Any]]:
    return [
        json.loads((stage_folder(config).path / "replay_audit.json").read_text()) for config in stages_to_run(configs)
    ]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "pretrained_model" / "model.safetensors")


def test_every_strategy_passes_as_often_over_the_new_tasks_frames(runs: dict[str, list[RunConfig]]) -> None:
    for strategy, configs in runs.items():
        passes: dict[str, float] = {}
        for audit, config in zip(audits(configs), stages_to_run(configs), strict=True):
            passes |= {task: audit["passes"][task] for task in mixture_of(config).learns}
        for task, epochs in EPOCHS.items():
            frames = 14 * (3 if strategy != "merge" else 2)  # where an episode is set apart
            assert epochs - 0.06 < passes[task] < epochs * (1 + 16 / frames) + 0.06, (strategy, task)  # whole batches


def test_a_joint_run_is_one_stage_that_sees_all_tasks_and_forgets_none(runs: dict[str, list[RunConfig]]) -> None:
    (stage,) = stages_to_run(runs["joint"])
    folder = stage_folder(stage)
    assert [path.name for path in sorted(stage.run_folder.glob("stage*"))] == ["stage1_joint"]
    assert set(audits(runs["joint"])[0]["drawn"]) == set(EPOCHS)
    ends = [record for record in folder.validations.read() if record["kind"] == "end"]
    assert [(record["task"], record["seen"]) for record in ends] == [(task, True) for task in EPOCHS]
    assert json.loads((stage.run_folder / "run.json").read_text())["strategy"] == "joint"
    jointly = StoredRun.open(stage.run_folder)
    matrix = analyse(jointly).matrix
    assert not matrix["partial"]
    assert {verdict["state"] for verdict in matrix["verdicts"]} == {"learnt last"}
    apart = analyse(StoredRun.open(runs["replay"][0].run_folder), joint=jointly).matrix
    assert set(apart["matrices"]["loss"]["metrics"]["intransigence by task"]["value"]) == set(EPOCHS)


def test_runs_of_all_strategies_begin_with_the_same_policy_and_normalization(
    runs: dict[str, list[RunConfig]],
) -> None:
    starts, hashes = set(), set()
    for configs in runs.values():
        records = stage_folder(stages_to_run(configs)[0]).validations.read()
        starts.add(tuple(record["loss"] for record in records if record["kind"] == "start"))
        hashes.add(json.loads((configs[0].run_folder / "normalization.json").read_text())["hash"])
    assert len(starts) == len(hashes) == 1
    assert len(starts.pop()) == len(EPOCHS)


def test_a_joint_run_knows_every_task_as_its_own_and_takes_nothing_over_from_the_first(
    runs: dict[str, list[RunConfig]],
) -> None:
    run = TrainedRun.open(runs["joint"][0].run_folder)
    assert run.curriculum == [config.stage for config in runs["joint"]]
    result = stage_folder(stages_to_run(runs["joint"])[0]).path / "checkpoints" / "best"
    contestant, request = Contestant.open("joint", str(result)), Options({"joint": str(result)})
    played = {task: contestant.environment(task, request).id for task in EPOCHS}
    assert played == {task: f"kuavo_sim:{ENVIRONMENT_IDS[task]}" for task in EPOCHS}
    with pytest.raises(ConfigError, match=r"task must be one of the run's \(moving_grasp, .*\), got 'joint'"):
        run.recipe("joint")


def test_a_joint_stage_says_nothing_of_the_first_tasks_data() -> None:
    first, *_ = compose_run(["strategy=joint"])
    special = replace(first.stage, environment="a:b", scale={"action.left_claw": 0.5}, cameras={"there": "here"})
    (joint,) = stages_to_run([replace(first, stage=special)])
    own = ("simulation_task", "environment", "episodes", "repo_id", "state_names", "action_names")
    assert [getattr(joint.stage, name) for name in own] == [None] * len(own)
    assert (joint.stage.scale, joint.stage.cameras, joint.stage.environment_settings) == ({}, {}, {})


def test_ewc_holds_weights_nearer_to_where_they_were_than_learning_without_it(
    runs: dict[str, list[RunConfig]],
) -> None:
    moved = {}
    for strategy in ("sequential", "ewc"):
        first, second = (stage_folder(config).checkpoints.at("best").folder for config in runs[strategy][:2])
        before, after = weights(first), weights(second)
        importance = Importance.load(stage_folder(runs["ewc"][0]).importance)
        moved[strategy] = sum(
            float((fisher * (after[name] - before[name]) ** 2).sum()) for name, fisher in importance.fisher.items()
        )
    assert moved["ewc"] < 0.9 * moved["sequential"]
    assert all("penalty" not in record for record in stage_folder(runs["ewc"][0]).metrics.read())
    assert all(record["penalty"] >= 0 for record in stage_folder(runs["ewc"][1]).metrics.read())


def test_ewc_keeps_its_importance_with_every_stage_and_lets_none_of_it_go(runs: dict[str, list[RunConfig]]) -> None:
    kept = [Importance.load(stage_folder(config).importance) for config in runs["ewc"]]
    groups = json.loads((stage_folder(runs["ewc"][1]).path / "parameters.json").read_text())["groups"]
    assert any(not group["trainable"] for group in groups)
    for earlier, later, config in zip(kept, kept[1:], runs["ewc"][1:], strict=False):
        result = weights(stage_folder(config).checkpoints.at("best").folder)
        assert earlier.fisher.keys() == later.fisher.keys()
        assert all((later.fisher[name] >= value).all() for name, value in earlier.fisher.items())
        assert all(torch.equal(later.weights[name], result[name]) for name in later.weights if name in result)


def test_ewc_without_what_the_stage_before_kept_is_refused(runs: dict[str, list[RunConfig]], tmp_path: Path) -> None:
    configs = [replace(config, outputs=str(tmp_path)) for config in runs["ewc"]]
    shutil.copytree(runs["ewc"][0].run_folder, tmp_path / "ewc", symlinks=True)
    shutil.rmtree(stage_folder(configs[1]).path)
    stage_folder(configs[0]).importance.unlink()
    with pytest.raises(ConfigError, match=r"ewc.safetensors must be there for ewc; delete .*stage1_moving_grasp"):
        run(configs, 1)


def test_a_merged_stage_ends_in_weights_between_its_first_and_its_last(runs: dict[str, list[RunConfig]]) -> None:
    assert not (stage_folder(runs["merge"][0]).path / "merge.json").exists()  # nothing to go back to
    for before, config in zip(runs["merge"], runs["merge"][1:], strict=False):
        folder = stage_folder(config)
        merge = json.loads((folder.path / "merge.json").read_text())
        best = folder.checkpoints.at("best")
        groups = load_policy(best.pretrained_model, torch.device("cpu"))[0].parameter_groups()
        module_of = {name: ONE_MODULE.get(group, group) for group, names in groups.items() for name in names}
        assert [swept["modules"] for swept in merge["rounds"]] == ["all", *merge["chosen"]]
        assert {"expert", "projections", "memory"} <= set(merge["chosen"])
        for swept in merge["rounds"]:
            assert [set(entry["losses"]) for entry in swept["sweep"]] == [set(list(EPOCHS)[: config.stage.index])] * 2
        assert best.folder.name.startswith("merged-")
        assert best.manifest["merged"]["alphas"] == merge["chosen"]
        assert best.hash == folder.about["checkpoint_hash"]
        old = weights(stage_folder(before).checkpoints.at("best").folder)
        new = weights(folder.checkpoints.at(best.step).folder)
        for name, value in weights(best.folder).items():
            alpha = merge["chosen"].get(module_of.get(name))  # None of what no training moves
            between = new[name] if alpha is None else torch.lerp(old[name], new[name], alpha)
            assert torch.equal(value, between), name
        ends = {r["task"]: r["loss"] for r in folder.validations.read() if r["kind"] == "end" and r["seen"]}
        assert folder.about["best"]["loss"] == pytest.approx(sum(ends.values()) / len(ends))


def test_alphas_are_chosen_on_episodes_that_are_neither_trained_on_nor_reported(
    runs: dict[str, list[RunConfig]],
) -> None:
    run = StoredRun.open(runs["merge"][0].run_folder)
    for task in run.tasks:
        data = task.dataset
        parts = [set(data.train_episodes), set(data.held_out_episodes), set(data.choosing_episodes)]
        assert [len(part) for part in parts] == [2, 2, 1]
        assert len(set.union(*parts)) == 5
        assert all(
            {each.episode for each in line.held_out.episodes} == parts[1]
            for stage in run.stages
            for line in stage.validations
            if line.task == task.name
        )
    checks = {check["name"]: check["passed"] for check in analyse(run).matrix["checks"]}
    assert checks["Training and held-out episodes are disjoint"]
    last = json.loads((stage_folder(runs["merge"][-1]).path / "merge.json").read_text())["rounds"][0]["sweep"]
    ends = {line.task: line.held_out.loss for line in run.stages[-1].validations if line.kind == "end"}
    assert all(ends[task] not in [entry["losses"][task] for entry in last] for task in EPOCHS)


def test_a_merge_killed_after_its_result_is_concluded_to_the_same(
    runs: dict[str, list[RunConfig]], tmp_path: Path
) -> None:
    configs = [replace(config, outputs=str(tmp_path)) for config in runs["merge"]]
    shutil.copytree(runs["merge"][0].run_folder, tmp_path / "merge", symlinks=True)
    for config in configs[2:]:
        shutil.rmtree(stage_folder(config).path)
    folder = stage_folder(configs[1])
    about = folder.about
    folder.write(status="running")
    assert run(configs, 1, resume=True) == 0
    assert folder.about["best"] == about["best"]
    assert folder.about["checkpoint_hash"] == about["checkpoint_hash"]


def test_merging_goes_with_replay_a_buffer_adapters_an_average_and_the_gate_and_resumes_to_the_same_bits(
    runs: dict[str, list[RunConfig]], tmp_path: Path
) -> None:
    """Of the buffer no episode is one that is set apart; what is merged are the averaged weights with adapters in."""
    merge = MergeConfig(alphas=[0.5, 1.0], episodes=1)
    both = [
        changed(
            config,
            run="both",
            outputs=str(tmp_path / "whole"),
            strategy="merge",
            merge=merge,
            replay=ReplayConfig(buffer=0.5),
            forgetting={"budget": 0.5},
            training={"epochs": 1, "lora": LoraConfig(rank=2, alpha=2), "ema": 0.5, "max_steps": 4},
        )
        for config in runs["replay"][:2]
    ]
    assert train_all_stages(both) == 0
    folder = stage_folder(both[1])
    merged = json.loads((folder.path / "merge.json").read_text())
    assert set(merged["chosen"]) >= {"expert", "projections", "memory"}
    task = StoredRun.open(both[0].run_folder).tasks[0].dataset
    assert {line["task"] for line in folder.gate.read()} == {"moving_grasp"}
    kept = json.loads(stage_folder(both[0]).buffer.read_text())
    assert set(kept["episodes"]) < set(task.train_episodes)
    assert json.loads((folder.path / "replay_audit.json").read_text())["declared"]["moving_grasp"] == 0.2
    cut = [replace(config, outputs=str(tmp_path / "cut")) for config in both]
    shutil.copytree(tmp_path / "whole", tmp_path / "cut", symlinks=True)
    shutil.rmtree(stage_folder(cut[1]).path)
    with interrupted_in_step(3):
        assert run(cut, 1) == 128 + signal.SIGTERM
    assert run(cut, 1, resume=True) == 0
    assert json.loads((stage_folder(cut[1]).path / "merge.json").read_text()) == merged
    one, other = (weights(stage_folder(configs[1]).checkpoints.at("best").folder) for configs in (both, cut))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_strategies_may_be_combined() -> None:
    config = compose_run(["strategy=ewc", "mixture=replay"])[1]
    assert config.ewc is not None
    assert mixture_of(config).shares({"weighing": 1}) == {"moving_grasp": 0.2, "weighing": 0.8}


def test_a_runs_strategy_and_its_settings_stay(runs: dict[str, list[RunConfig]], tmp_path: Path) -> None:
    configs = [replace(config, outputs=str(tmp_path)) for config in runs["merge"]]
    shutil.copytree(runs["merge"][0].run_folder, tmp_path / "merge", symlinks=True)
    shutil.rmtree(stage_folder(configs[2]).path)
    assert configs[2].merge is not None
    with pytest.raises(ConfigError, match=r"run merge must keep .*: merge.alphas \(was \[.*\], is \[0.3\]\);"):
        run(configs, 2, merge=replace(configs[2].merge, alphas=[0.3]))


SIXTH = """
from dataclasses import dataclass

from kuavo_train.strategies.strategy import Strategy
from kuavo_train.training.extra_loss import NoExtraLoss


@dataclass(frozen=True)
class Settings:
    weight: float = 1.0


class SmallOutputs(NoExtraLoss):
    def __init__(self, policy, weight):
        self.policy, self.weight, self.batches = policy, weight, 0

    def of_batch(self, prepared, outputs, batch):
        self.batches += batch.size
        return self.weight * self.policy.model.action_out_proj.weight.square().sum()

    def add_gradient(self):
        return {"samples_seen": float(self.batches)}


class Decay(Strategy):
    Settings = Settings

    def shares(self, config, frames):
        return {"moving_grasp": 0.5, config.stage.name: 0.5} if config.stage.index > 1 else {config.stage.name: 1.0}

    def extra_loss(self, view):
        return SmallOutputs(view.policy, self.settings.weight)

    def end(self, view):
        (view.folder.path / "decay.txt").write_text(f"{len(view.earlier)} before, weight {self.settings.weight:g}")
"""


def test_a_sixth_strategy_is_one_file_and_one_yaml(
    small_run: Overrides, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "decay_strategy.py").write_text(SIXTH)
    monkeypatch.syspath_prepend(tmp_path)
    folder = tmp_path / "configs"
    shutil.copytree(CONFIG_FOLDER, folder)
    (folder / "strategy" / "decay.yaml").write_text(
        "# @package _global_\nstrategy: decay_strategy:Decay\nmixture: replay\nstrategy_settings: {weight: 0.25}\n"
    )
    words = small_run("strategy=decay", "learn=[moving_grasp,weighing]", "run=decay", "training.log_every=1")
    configs = compose_run(words, folder=folder)
    assert train_all_stages(configs) == 0
    stage = stage_folder(configs[1])
    audit = json.loads((stage.path / "replay_audit.json").read_text())
    assert audit["declared"] == {"moving_grasp": 0.5, "weighing": 0.5}
    assert (stage.path / "decay.txt").read_text() == "1 before, weight 0.25"
    assert [line["samples_seen"] for line in stage.metrics.read()][:2] == [4.0, 8.0]
    message = r"strategy_settings.wight of strategy=decay_strategy:Decay must be one of weight"
    with pytest.raises(ConfigError, match=message):
        run(compose_run([*words, "run=other", "strategy_settings={wight: 1}"], folder=folder), 0)
    with pytest.raises(ConfigError, match=r"strategy must be .*, got 'decay_strategy:Nothing'"):
        run([replace(config, run="other", strategy="decay_strategy:Nothing") for config in configs], 0)
