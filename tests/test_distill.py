"""Distillation: the policy of before a stage as its teacher, over whole stages of a few steps."""

import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from forked import interrupted_in_step
from stages import assert_equal_weights, changed, run, weights

from kuavo_train.compose import compose_run
from kuavo_train.config import DistillConfig, RunConfig
from kuavo_train.errors import ConfigError
from kuavo_train.probing.recovery import alone
from kuavo_train.runs.run_folder import stage_folder
from kuavo_train.strategies.distill import teacher_of
from lerobot_policy_smolvla_memory.modeling_smolvla_memory import SmolVLAMemoryPolicy

Configs = Callable[..., list[RunConfig]]
BY_STEP = "training.log_every=1"
STANDS_STILL = {"lr": 1e-30, "decay_lr": 1e-30, "warmup_steps": 0}
LORA = ("finetune=lora", "training.lora.rank=2")
RECURS = "policy.mem_backprop_depth=2"


@pytest.fixture
def distilled(small_configs: Configs) -> list[RunConfig]:
    """Two stages of 4 steps, a memory trained through time, replayed frames beside the new ones."""
    return small_configs("strategy=distill", "mixture=replay", RECURS, BY_STEP)


def distances(config: RunConfig) -> list[float]:
    """From the teacher, step by step."""
    return [record["distillation"] for record in stage_folder(config).metrics.read()]


def test_the_first_stage_has_no_teacher_and_the_next_begins_as_its_own(distilled: list[RunConfig]) -> None:
    assert run(distilled, 0) == 0
    assert run(distilled, 1) == 0
    assert all("distillation" not in record for record in stage_folder(distilled[0]).metrics.read())
    first, *later = distances(distilled[1])
    assert first < 1e-12
    assert min(later) > 1e-9


@pytest.mark.parametrize("mixture", ["replay", "own_task"])
def test_a_policy_that_stands_still_stays_at_no_distance_from_its_teacher_whose_memory_goes_on_as_its_own(
    distilled: list[RunConfig], mixture: str
) -> None:
    configs = [replace(config, mixture=mixture) for config in distilled]
    assert run(configs, 0) == 0
    assert run(configs, 1, training=STANDS_STILL) == 0
    assert max(distances(configs[1])) < 1e-12


def test_the_heavier_the_loss_the_nearer_the_policy_stays_to_its_teacher(
    distilled: list[RunConfig], tmp_path: Path
) -> None:
    last = {}
    for weight in (0.0, 100.0):
        configs = [
            changed(config, outputs=str(tmp_path / f"{weight}"), distill={"weight": weight}, training={"lr": 1e-3})
            for config in distilled
        ]
        assert run(configs, 0) == 0
        assert run(configs, 1) == 0
        last[weight] = distances(configs[1])[-1]
    assert last[100.0] < 0.8 * last[0.0]


@pytest.mark.parametrize("words", [(), LORA], ids=["all of the expert", "lora"])
def test_an_interrupted_stage_resumes_to_bit_identical_weights(
    small_configs: Configs, tmp_path: Path, words: tuple[str, ...]
) -> None:
    freeze = ["vision", "connector", "vlm_text"]
    configs = small_configs(
        "strategy=distill", RECURS, BY_STEP, *words, allow_random_frozen_vlm=True, training={"freeze": freeze}
    )
    configs = [changed(config, distill={"weight": 10.0}, training={"ema": 0.9, "lr": 1e-3}) for config in configs]
    cut = [replace(config, outputs=str(tmp_path / "cut")) for config in configs]
    for each in (configs, cut):
        assert run(each, 0) == 0
    assert run(configs, 1) == 0
    with interrupted_in_step(2):
        assert run(cut, 1) == 128 + signal.SIGTERM
    assert run(cut, 1, resume=True) == 0
    assert_equal_weights(*(weights(stage_folder(each[1])) for each in (configs, cut)))
    assert distances(configs[1]) == distances(cut[1])
    assert distances(configs[1])[0] < 1e-9


def test_it_goes_with_a_penalty_a_merge_an_average_and_the_gate(small_configs: Configs) -> None:
    configs = small_configs(
        "strategy=distill",
        "mixture=replay",
        "ewc={strength: 1000, batches: 1}",
        "merge={alphas: [0.5, 1.0]}",
        "forgetting.budget=0.0",
        BY_STEP,
        training={"ema": 0.5},
    )
    assert run(configs, 0) == 0
    assert run(configs, 1) == 0
    folder = stage_folder(configs[1])
    assert {"distillation", "penalty"} <= folder.metrics.read()[-1].keys()
    assert (folder.path / "merge.json").is_file()
    assert [reading["task"] for reading in folder.gate.read()]
    assert folder.checkpoints.at("best").folder.name.startswith("merged-")


def test_teacher_and_policy_have_in_common_what_the_stage_holds_fixed_and_nothing_else(
    small_configs: Configs,
) -> None:
    configs = small_configs(*LORA, allow_random_frozen_vlm=True, training={"freeze": ["vision", "connector"]})
    assert run(configs, 0) == 0
    before = stage_folder(configs[0]).checkpoints.at("best")
    policy = SmolVLAMemoryPolicy.from_pretrained(str(before.pretrained_model)).train()
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_("vision_model" not in name)
    with torch.no_grad():  # as where a stage is resumed
        policy.model.action_out_proj.weight += 1
    teacher = teacher_of(policy, before)
    taught = dict(teacher.named_parameters())
    for name, parameter in policy.named_parameters():
        assert (parameter is taught[name]) == (not parameter.requires_grad), name
    assert torch.allclose(teacher.model.action_out_proj.weight + 1, policy.model.action_out_proj.weight)
    assert policy.training
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in taught.values())


def test_a_probe_that_learns_a_task_again_has_no_teacher(distilled: list[RunConfig]) -> None:
    assert alone(distilled[1]).distill is None


def test_settings_are_those_of_the_first_stage_and_on_record(distilled: list[RunConfig]) -> None:
    assert run(distilled, 0) == 0
    with pytest.raises(ConfigError, match=r"distill.weight \(was 1.0, is 2.0\)"):
        run(distilled, 1, distill=DistillConfig(weight=2.0))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["policy=act"], r"policy\.type must be smolvla_memory with distill, for its velocities, got 'act'"),
        (["policy.fast_forward=false"], r"policy\.fast_forward must be true with distill"),
        (["mixture=all_tasks"], r"mixture must be replay or own_task with strategy=distill, got 'all_tasks'"),
        (["distill=null"], r"distill must have settings with strategy=distill, got None"),
        (["distill.weight=-1"], r"distill\.weight must not be negative, got -1"),
    ],
    ids=lambda each: each[0] if isinstance(each, list) else "",
)
def test_what_it_cannot_do_is_refused_by_name(
    small_run: Callable[..., list[str]], words: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        compose_run(small_run("strategy=distill", *words))


def test_a_joint_stage_refuses_a_teacher(small_configs: Configs) -> None:
    with pytest.raises(ConfigError, match=r"distill must be null with strategy=joint"):
        small_configs("strategy=joint", distill=DistillConfig(weight=1.0))
