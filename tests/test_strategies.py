"""Parts of the strategies: importance, the elastic penalty, merged weights. Whole runs: whole/test_strategy_runs.py."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

from kuavo_train.config import MergeConfig, RunConfig
from kuavo_train.strategies.alphas import choose_alphas, module_of_parameters, set_merged_weights
from kuavo_train.strategies.ewc import ElasticPenalty
from kuavo_train.strategies.importance import Importance, measure_importance


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


class Jointed(nn.Module):
    """A policy of five trained groups of one weight each, and a frozen one."""

    GROUPS = ("expert", "state_proj", "action_proj", "memory", "connector")

    def __init__(self) -> None:
        super().__init__()
        for group in (*self.GROUPS, "vision"):
            self.register_parameter(group, nn.Parameter(torch.tensor([0.5]), requires_grad=group != "vision"))

    def parameter_groups(self) -> dict[str, list[str]]:
        return {name: [name] for name, _ in self.named_parameters()}

    def at(self, value: float) -> dict[str, torch.Tensor]:
        return {group: torch.tensor([value]) for group in self.GROUPS}


MODULES = ("expert", "projections", "memory", "connector")


def test_merging_with_alpha_0_and_1_gives_exactly_the_old_and_the_new_weights() -> None:
    policy = Jointed()
    old, new = ({name: torch.rand_like(value) for name, value in policy.at(0.0).items()} for _ in range(2))
    for alpha, expected in ((0.0, old), (1.0, new)):
        set_merged_weights(policy, old, new, dict.fromkeys(MODULES, alpha))
        assert all(torch.equal(getattr(policy, name), value) for name, value in expected.items())
        assert policy.vision.item() == 0.5  # frozen: not touched
    set_merged_weights(policy, old, new, dict.fromkeys(MODULES, 0.25))
    assert torch.allclose(policy.expert, 0.75 * old["expert"] + 0.25 * new["expert"])


def test_every_module_is_merged_by_its_own_alpha_and_both_projections_by_one() -> None:
    policy = Jointed()
    assert set(module_of_parameters(policy).values()) == set(MODULES)
    set_merged_weights(policy, policy.at(0.0), policy.at(1.0), dict(zip(MODULES, (0.1, 0.2, 0.3, 0.4), strict=True)))
    merged = {group: getattr(policy, group).item() for group in Jointed.GROUPS}
    expected = {"expert": 0.1, "state_proj": 0.2, "action_proj": 0.2, "memory": 0.3, "connector": 0.4}
    assert merged == pytest.approx(expected)


GRID = [0.0, 0.2, 0.4, 0.6, 1.0]


def choose(policy: Jointed, measured: list[dict[str, float]], **settings: Any) -> dict[str, Any]:
    """Where an earlier task wants memory and expert back, and the new one wants what it has learnt."""

    def measure() -> Mapping[str, float]:
        at = {group: getattr(policy, group).item() for group in Jointed.GROUPS}
        measured.append(at)
        return {"earlier": 1 + at["expert"] + (at["memory"] - 0.2) ** 2, "new": 3 * (at["expert"] - 0.6) ** 2}

    return choose_alphas(policy, policy.at(0.0), policy.at(1.0), MergeConfig(alphas=GRID, **settings), measure)


def test_one_alpha_for_all_is_the_one_with_the_least_mean_loss_over_the_tasks_seen() -> None:
    policy, measured = Jointed(), list[dict[str, float]]()
    merge = choose(policy, measured, per_module=False)
    (swept,) = merge["rounds"]
    assert (swept["modules"], swept["chosen"]) == ("all", 0.4)
    assert [entry["alpha"] for entry in swept["sweep"]] == GRID
    assert swept["sweep"][2]["loss"] == pytest.approx((1.4 + 0.04 + 3 * 0.04) / 2)
    assert swept["sweep"][2]["losses"] == pytest.approx({"earlier": 1.44, "new": 0.12})
    assert merge["chosen"] == dict.fromkeys(MODULES, 0.4)
    assert policy.memory.item() == policy.expert.item() == pytest.approx(0.4)
    assert len(measured) == len(GRID)


def test_alphas_apart_are_found_one_module_after_another_and_no_point_is_measured_twice() -> None:
    policy, measured = Jointed(), list[dict[str, float]]()
    merge = choose(policy, measured)
    assert merge["chosen"] == {"expert": 0.4, "projections": 0.4, "memory": 0.2, "connector": 0.4}
    assert [swept["modules"] for swept in merge["rounds"]] == ["all", *MODULES]
    least = [min(entry["loss"] for entry in swept["sweep"]) for swept in merge["rounds"]]
    assert least == sorted(least, reverse=True)
    assert least[-1] < least[0]
    assert policy.memory.item() == pytest.approx(0.2)
    assert len(measured) == len({tuple(at.values()) for at in measured}) == len(GRID) + len(MODULES) * (len(GRID) - 1)


def test_a_module_on_which_nothing_depends_stays_where_all_were_best() -> None:
    merge = choose(Jointed(), [])
    assert next(swept for swept in merge["rounds"] if swept["modules"] == "connector")["chosen"] == 0.4


def test_with_a_single_alpha_nothing_is_measured_or_set_apart(configs: list[RunConfig]) -> None:
    def measure() -> Mapping[str, float]:
        raise AssertionError("there is nothing to choose")

    policy, fixed = Jointed(), MergeConfig(alphas=[0.25])
    merge = choose_alphas(policy, policy.at(0.0), policy.at(1.0), fixed, measure)
    assert merge == {"chosen": dict.fromkeys(MODULES, 0.25), "rounds": []}
    assert policy.expert.item() == 0.25
    config = replace(configs[0], mixture="own_task", strategy="merge", merge=fixed)
    assert config.choosing_episodes == 0
    assert replace(config, merge=MergeConfig(alphas=[0.5, 1.0])).choosing_episodes == 2  # as many as are held out
    assert replace(config, merge=MergeConfig(alphas=[0.5, 1.0], episodes=1)).choosing_episodes == 1
