"""Low-rank adapters on the expert: little is trained, and a checkpoint is a plain policy all the same."""

import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from forked import interrupted_in_step
from safetensors.torch import load_file
from stages import run
from torch import nn

from kuavo_train.config import LoraConfig, RunConfig
from kuavo_train.errors import ConfigError
from kuavo_train.runs.run_folder import StageFolder, stage_folder
from kuavo_train.stage.preflight import examine_stage
from kuavo_train.training.lora import adapted_state, adapters_merged, add_adapters, merge_adapters, restore_adapted
from kuavo_train.training.parameter_groups import parameter_counts

Configs = Callable[..., list[RunConfig]]
RANK = 2
EXPERT = "model.vlm_with_expert.lm_expert."


class Arm(nn.Module):
    """An expert of one layer, and a head beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.expert = nn.Sequential(nn.Linear(3, 5), nn.Tanh())
        self.head = nn.Linear(5, 2)

    def parameter_groups(self) -> dict[str, list[str]]:
        names = [name for name, _ in self.named_parameters()]
        return {group: [name for name in names if name.startswith(group)] for group in ("expert", "head")}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.expert(x))


@pytest.fixture
def adapted() -> Arm:
    arm = Arm()
    add_adapters(arm, LoraConfig(rank=RANK, alpha=4))
    return arm


def train(arm: Arm) -> None:
    optimizer = torch.optim.SGD([each for each in arm.parameters() if each.requires_grad], lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        arm(torch.ones(4, 3)).square().mean().backward()
        optimizer.step()


def test_fresh_adapters_change_nothing_and_leave_the_rest_trainable() -> None:
    arm, x = Arm(), torch.randn(4, 3)
    before = arm(x)
    add_adapters(arm, LoraConfig(rank=RANK, alpha=4))
    assert torch.equal(arm(x), before)
    assert parameter_counts(arm) == [
        {"group": "expert", "parameters": 3 * 5 + 5, "trainable": False, "dtype": "float32"},
        {"group": "head", "parameters": 5 * 2 + 2, "trainable": True, "dtype": "float32"},
        {"group": "lora", "parameters": RANK * (3 + 5), "trainable": True, "dtype": "float32"},
    ]


def test_merged_it_is_a_plain_policy_of_the_same_outputs_and_its_adapters_come_back(adapted: Arm) -> None:
    train(adapted)
    x, kept = torch.randn(4, 3), {name: value.clone() for name, value in adapted.state_dict().items()}
    outputs = adapted(x)
    with adapters_merged(adapted):
        assert set(adapted.state_dict()) == set(Arm().state_dict())
        assert torch.allclose(adapted(x), outputs, atol=1e-6)
    assert all(torch.equal(value, kept[name]) for name, value in adapted.state_dict().items())


def test_what_is_merged_for_good_is_open_to_training(adapted: Arm) -> None:
    merge_adapters(adapted)
    assert adapted.expert[0].weight.requires_grad
    assert adapted_state(adapted) == {}


def test_other_adapters_than_a_stage_began_with_are_refused(adapted: Arm) -> None:
    other = Arm()
    add_adapters(other, LoraConfig(rank=RANK + 1))
    with pytest.raises(
        ConfigError, match=r"must be as when the stage began, with 1 adapted layers of rank 2, got .* rank 3"
    ):
        restore_adapted(other, adapted_state(adapted))
    with pytest.raises(ConfigError, match="with 1 adapted layers of rank 2, got 0 adapted layers"):
        restore_adapted(Arm(), adapted_state(adapted))


@pytest.fixture
def lora_run(small_configs: Configs) -> list[RunConfig]:
    """A stage of 4 steps on all of the task, adapters on the expert."""
    words = ("finetune=lora", f"training.lora.rank={RANK}")
    freeze = ["vision", "connector", "vlm_text"]
    return small_configs(*words, allow_random_frozen_vlm=True, training={"freeze": freeze})


def weights(folder: StageFolder) -> dict[str, torch.Tensor]:
    return load_file(folder.checkpoints.at("best").pretrained_model / "model.safetensors")


def test_a_stage_moves_the_expert_by_no_more_than_the_rank_and_the_next_goes_on_from_there(
    lora_run: list[RunConfig],
) -> None:
    assert run(lora_run, 0) == 0
    assert run(lora_run, 1) == 0
    card = stage_folder(lora_run[1]).checkpoints.at("best").pretrained_model / "README.md"
    assert f"adapters of rank {RANK} on the action expert, merged into its weights" in card.read_text()
    before, after = (weights(stage_folder(config)) for config in lora_run[:2])
    assert set(before) == set(after)
    assert not any("lora" in name.split(".") or "base_layer" in name for name in after)
    moved = {name: after[name] - before[name] for name in after if not torch.equal(after[name], before[name])}
    assert any(name.startswith(EXPERT) for name in moved)
    for name, by in moved.items():
        if name.startswith(EXPERT):
            strengths = torch.linalg.svdvals(by.double())
            assert strengths[RANK:].max() < 1e-4 * strengths[0], name
    assert "model.action_out_proj.weight" in moved  # trained beside the adapters, all of it


def test_an_interrupted_stage_resumes_to_bit_identical_weights(
    lora_run: list[RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(lora_run, 0) == 0
    cut = [replace(config, outputs=str(tmp_path / "cut")) for config in lora_run]
    with interrupted_in_step(3):
        assert run(cut, 0) == 128 + signal.SIGTERM
    assert run(cut, 0, resume=True) == 0
    whole, resumed = (weights(stage_folder(configs[0])) for configs in (lora_run, cut))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_frozen_expert_a_policy_without_one_and_ewc_are_refused(small_configs: Configs) -> None:
    frozen = small_configs("training.lora={}", training={"freeze_first_stage": ["expert"]})
    problems = examine_stage(frozen[0], [config.stage for config in frozen]).problems
    assert any("training.lora must have an expert to adapt, got a frozen one" in problem for problem in problems)
    with pytest.raises(ConfigError, match="an expert to adapt, got a policy without one"):
        add_adapters(nn.Sequential(nn.Linear(2, 2)), LoraConfig())
    with pytest.raises(ConfigError, match=r"training\.lora must be null with ewc"):
        small_configs("training.lora={}", "strategy=ewc")
    with pytest.raises(ConfigError, match=r"training\.lora\.rank must be at least 1, got 0"):
        small_configs("training.lora={rank: 0}")
