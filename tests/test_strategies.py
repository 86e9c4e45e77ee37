"""Ways of learning one task after another: the same exposure to new data in each, and what each adds."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from stages import changed, run
from torch import nn

from kuavo_sim import ENVIRONMENT_IDS
from kuavo_train.compose import compose_run, stages_to_run
from kuavo_train.config import CONFIG_FOLDER, EwcConfig, MergeConfig, RunConfig
from kuavo_train.curriculum import train_all_stages
from kuavo_train.data.mixture import mixture_of
from kuavo_train.errors import ConfigError
from kuavo_train.evaluation.checkpoints import Contestant
from kuavo_train.evaluation.options import Options
from kuavo_train.reporting.run_analysis import analyse
from kuavo_train.runs.run_folder import stage_folder
from kuavo_train.runs.stored_run import StoredRun
from kuavo_train.runs.trained_run import TrainedRun
from kuavo_train.strategies.ewc import ElasticPenalty
from kuavo_train.strategies.importance import Importance, measure_importance
from kuavo_train.strategies.merge import set_merged_weights, sweep_merges

Overrides = Callable[..., list[str]]
STRATEGIES: dict[str, dict[str, Any]] = {
    "replay": {},
    "sequential": {"mixture": "own_task"},
    "joint": {"mixture": "all_tasks"},
    "ewc": {"mixture": "own_task", "ewc": EwcConfig(strength=1e6, batches=1)},
    "merge": {"mixture": "own_task", "merge": MergeConfig(alphas=[0.5, 1.0])},
}
EPOCHS = {"moving_grasp": 4, "weighing": 1, "placement": 2}


class Toy(nn.Module):
    """loss = mean over samples of (w · x − y)²; `bias` is frozen, `idle` has no part in it."""

    def __init__(self, weight: list[float]):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))
        self.idle = nn.Parameter(torch.tensor([7.0]))
        self.bias = nn.Parameter(torch.tensor([0.5]), requires_grad=False)

    def forward(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, Any]]:
        return ((batch["x"] @ self.weight + self.bias - batch["y"]) ** 2).mean(), {}


CLIPS = [{"x": torch.tensor([[1.0, 2.0]]), "y": torch.tensor([1.5])}, {"x": torch.tensor([[3.0, -1.0]]), "y": 0.5}]


def importance_of(toy: Toy) -> Importance:
    return measure_importance(toy, cast(Any, CLIPS), forward=lambda clip: toy(cast(Any, clip))[0], seed=0)


def test_the_fisher_information_of_a_toy_model_is_the_one_worked_out_by_hand() -> None:
    toy = Toy([1.0, 1.0])
    # residuals 1 + 2 + 0.5 − 1.5 = 2 and 3 − 1 + 0.5 − 0.5 = 2; gradients 2·2·x = (4, 8) and (12, −4)
    importance = importance_of(toy)
    assert importance.fisher["weight"].tolist() == [(16 + 144) / 2, (64 + 16) / 2]
    assert importance.fisher["idle"].tolist() == [0.0]
    assert "bias" not in importance.fisher
    assert importance.weights["weight"].tolist() == [1.0, 1.0]
    assert all(parameter.grad is None for parameter in toy.parameters())


def test_measuring_importance_leaves_the_random_state_and_the_mode_alone() -> None:
    toy, state = Toy([1.0, 1.0]).train(), torch.get_rng_state()
    importance_of(toy)
    assert toy.training
    assert torch.equal(torch.get_rng_state(), state)


def test_the_elastic_penalty_is_zero_where_it_was_learnt_and_grows_with_the_square() -> None:
    toy = Toy([1.0, 1.0])
    penalty = ElasticPenalty(toy, importance_of(toy), strength=10.0)
    assert penalty().item() == 0.0
    assert penalty.add_gradient() == {"penalty": 0.0}
    assert toy.weight.grad is not None
    assert toy.weight.grad.tolist() == [0.0, 0.0]
    with torch.no_grad():
        toy.weight += torch.tensor([0.5, -0.25])
    assert penalty().item() == pytest.approx(10 / 2 * (80 * 0.5**2 + 40 * 0.25**2))


def test_the_elastic_penaltys_gradient_is_autograds() -> None:
    toy = Toy([1.0, 1.0])
    penalty = ElasticPenalty(toy, importance_of(toy), strength=3.0)
    with torch.no_grad():
        toy.weight += torch.tensor([0.5, -0.25])
    (expected,) = torch.autograd.grad(penalty(), toy.weight)
    toy.weight.grad = torch.tensor([1.0, 2.0])  # of the tasks' loss
    assert penalty.add_gradient()["penalty"] == pytest.approx(penalty().item())
    assert torch.allclose(toy.weight.grad, torch.tensor([1.0, 2.0]) + expected)


def test_importance_adds_up_over_stages_and_its_centre_moves_on(tmp_path: Path) -> None:
    toy = Toy([1.0, 1.0])
    first = importance_of(toy)
    with torch.no_grad():
        toy.weight += 1.0
    toy.idle.requires_grad_(False)
    second = importance_of(toy)
    both = second.after(first)
    assert torch.equal(both.fisher["weight"], first.fisher["weight"] + second.fisher["weight"])
    assert both.weights["weight"].tolist() == [2.0, 2.0]
    assert both.weights["idle"].tolist() == [7.0]  # kept, though the second stage did not train it
    both.save(tmp_path / "ewc.safetensors")
    loaded = Importance.load(tmp_path / "ewc.safetensors")
    assert [file.name for file in tmp_path.iterdir()] == ["ewc.safetensors"]
    for kind in ("fisher", "weights"):
        for name, value in getattr(both, kind).items():
            assert torch.equal(getattr(loaded, kind)[name], value)


def test_merging_with_alpha_0_and_1_gives_exactly_the_old_and_the_new_weights() -> None:
    toy = Toy([0.1, 0.7])
    old = {name: torch.rand_like(value) for name, value in toy.named_parameters()}
    new = {name: torch.rand_like(value) for name, value in toy.named_parameters()}
    for alpha, expected in ((0.0, old), (1.0, new)):
        set_merged_weights(toy, old, new, alpha)
        assert torch.equal(toy.weight, expected["weight"])
        assert torch.equal(toy.idle, expected["idle"])
        assert toy.bias.item() == 0.5  # frozen: not touched
    set_merged_weights(toy, old, new, 0.25)
    assert torch.allclose(toy.weight, 0.75 * old["weight"] + 0.25 * new["weight"])


def test_the_sweep_keeps_the_alpha_with_the_least_mean_loss_over_the_tasks_seen() -> None:
    toy = Toy([0.0, 0.0])
    old, new = ({"weight": torch.full((2,), value), "idle": torch.zeros(1)} for value in (0.0, 1.0))

    def validate() -> Mapping[str, float]:
        at = toy.weight[0].item()
        return {"earlier": 1 + at, "new": 3 * (at - 0.6) ** 2}

    sweep = sweep_merges(toy, old, new, [0.2, 0.4, 0.6, 1.0], validate)
    assert sweep["chosen"] == 0.4
    assert [entry["alpha"] for entry in sweep["sweep"]] == [0.2, 0.4, 0.6, 1.0]
    assert sweep["loss"] == pytest.approx((1.4 + 3 * 0.04) / 2)
    assert sweep["sweep"][1]["losses"] == pytest.approx({"earlier": 1.4, "new": 0.12})
    assert toy.weight.tolist() == pytest.approx([0.4, 0.4])


# --- whole runs -------------------------------------------------------------------------------------------------------


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
            assert epochs - 0.06 < passes[task] < epochs * (1 + 16 / 42) + 0.06, (strategy, task)  # whole batches


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
        assert [set(entry["losses"]) for entry in merge["sweep"]] == [set(list(EPOCHS)[: config.stage.index])] * 2
        best = folder.checkpoints.at("best")
        assert best.folder.name == f"merged-{merge['chosen']:g}"
        assert best.hash == folder.about["checkpoint_hash"]
        old = weights(stage_folder(before).checkpoints.at("best").folder)
        new = weights(folder.checkpoints.at(best.step).folder)
        for name, value in weights(best.folder).items():
            counts = not value.is_floating_point()  # a position, which no training moves
            between = new[name] if counts else torch.lerp(old[name], new[name], merge["chosen"])
            assert torch.equal(value, between), name
        ends = {r["task"]: r["loss"] for r in folder.validations.read() if r["kind"] == "end" and r["seen"]}
        chosen = next(entry for entry in merge["sweep"] if entry["alpha"] == merge["chosen"])
        assert ends == pytest.approx(chosen["losses"])
        assert folder.about["best"]["loss"] == pytest.approx(sum(ends.values()) / len(ends))


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

    def of_batch(self, batch, outputs):
        self.batches += len(batch["task"])
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
