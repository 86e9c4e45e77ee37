"""The whole way from a vision-language model and a policy that are stored in bfloat16, as the hub stores them."""

import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from forked import interrupted_in_step
from lerobot.scripts import lerobot_eval
from safetensors.torch import load_file
from stand_in_hub import write_smolvla
from torch import nn

from kuavo_train.compose import compose_run
from kuavo_train.config import RunConfig
from kuavo_train.runs.run_folder import stage_folder
from kuavo_train.stage.findings import Findings
from kuavo_train.stage.stage import run_stage
from kuavo_train.strategies.importance import Importance
from lerobot_policy_smolvla_memory.tiny_vlm import make_tiny_vlm

Overrides = Callable[..., list[str]]
EXPERT, VLM = "model.vlm_with_expert.lm_expert.", "model.vlm_with_expert.vlm."
FROZEN = "[vision,connector,vlm_text]"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy in LeRobot's types on a VLM in bfloat16; `vlm` beside it."""
    folder = tmp_path_factory.mktemp("bfloat16")
    sizes = {"text_hidden": 48, "text_layers": 2, "vision_hidden": 48, "vision_layers": 1, "image_size": 32}
    instructions = [config.stage.instruction for config in compose_run()]
    make_tiny_vlm(folder / "vlm", dtype="bfloat16", corpus=instructions, **sizes)
    write_smolvla(folder / "base", folder / "vlm", num_vlm_layers=2, expert_width_multiplier=0.75)
    return folder / "base"


@pytest.fixture(scope="module")
def robot_in(small_run_in: Overrides, base: Path) -> Overrides:
    """The robot profile's recipe, in the sizes of the small run: from that base, the VLM frozen, in bf16."""

    def overrides(outputs: Path, *more: str) -> list[str]:
        return small_run_in(
            outputs,
            "learn=[moving_grasp,weighing]",
            "tiny_vlm=null",
            f"policy.vlm_model_name={base.with_name('vlm')}",
            f"policy.pretrained_path={base}",
            "policy.load_vlm_weights=true",
            f"training.freeze_first_stage={FROZEN}",
            f"training.freeze={FROZEN}",
            "training.mixed_precision=bf16",
            "training.lr=2e-5",
            "training.decay_lr=1e-6",
            "training.warmup_steps=0",
            "validation.result=last",
            *more,
        )

    return overrides


@pytest.fixture(autouse=True)
def _any_precision() -> Iterator[None]:
    """A process has one precision in accelerate, which the first stage decides; here it may be another afterwards."""
    yield
    AcceleratorState._reset_state()


def run(configs: list[RunConfig], place: int, **changed: Any) -> int:
    AcceleratorState._reset_state()
    return run_stage(replace(configs[place], **changed), [config.stage for config in configs])


def weights(config: RunConfig, name: str = "best") -> dict[str, torch.Tensor]:
    return load_file(stage_folder(config).checkpoints.at(name).pretrained_model / "model.safetensors")


@pytest.fixture(scope="module")
def finished(robot_in: Overrides, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[RunConfig]]:
    """Two stages with elastic weight consolidation and merging, the first interrupted and resumed."""
    folder = tmp_path_factory.mktemp("robot")
    ways = ("strategy=ewc", "ewc.batches=1", "merge={alphas: [0.5]}")
    configs = compose_run(robot_in(folder / "outputs", *ways))
    with interrupted_in_step(2):
        assert run(configs, 0) == 128 + signal.SIGTERM
    assert run(configs, 0, resume=True) == 0
    assert run(configs, 1) == 0
    return configs


def test_a_trained_group_that_is_not_float32_is_refused_and_memory_counted_by_type(configs: list[RunConfig]) -> None:
    findings, policy = Findings(), nn.ModuleDict({name: nn.Linear(2, 2) for name in ("head", "body", "eyes")})
    for name in ("body", "eyes"):
        policy[name].to(torch.bfloat16)
    policy["eyes"].requires_grad_(False)
    findings.look_at_policy(configs[0], policy, {})
    (problem,) = findings.problems
    assert problem.startswith("parameter group body is trained and must be float32, got bfloat16, which rounds")
    assert problem.endswith("(training.freeze=[body])")
    counted = {"weights": 6 * (4 + 2 + 2), "gradients": 6 * (4 + 2), "optimizer": 2 * 6 * (4 + 2)}
    assert findings.facts["memory_bytes"].items() >= counted.items()


def test_every_weight_that_learns_moves_and_all_that_is_frozen_stays_bfloat16(
    finished: list[RunConfig], base: Path
) -> None:
    before, after = load_file(base / "model.safetensors"), weights(finished[0])
    assert {value.dtype for name, value in after.items() if name.startswith(VLM)} == {torch.bfloat16}
    assert all(torch.equal(after[name], value) for name, value in before.items() if name.startswith(VLM))
    learnt = [name for name in before if name.startswith(EXPERT) and ".layers." in name]
    assert {after[name].dtype for name in learnt} == {torch.float32}
    moved = [(after[name] != before[name].float()).float().mean().item() for name in learnt]
    assert min(moved) > 0.95  # of their weights, after four steps of at most 2e-5


def test_an_interrupted_stage_resumes_to_bit_identical_weights_and_every_group_has_its_type(
    finished: list[RunConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = [replace(config, outputs=str(tmp_path)) for config in finished]
    assert run(whole, 0) == 0
    resumed = weights(finished[0], "last")
    assert all(torch.equal(resumed[name], value) for name, value in weights(whole[0], "last").items())
    table = capsys.readouterr().out
    rows = [line.split() for line in table.splitlines()]
    assert {row[0]: row[3] for row in rows if row[2:3] in (["trained"], ["frozen"])} == {
        **dict.fromkeys(("vision", "connector", "vlm_text"), "bfloat16"),
        **dict.fromkeys(("expert", "state_proj", "action_proj", "memory"), "float32"),
    }
    assert "note: expert was stored in bfloat16: taken over as it is, and float32 from here on" in table
    assert "embeddings by the frozen encoder" in table


def test_merging_and_anchors_round_nothing(finished: list[RunConfig]) -> None:
    old, new, merged = weights(finished[0]), weights(finished[1], "last"), weights(finished[1])
    anchors = Importance.load(stage_folder(finished[0]).importance)
    assert all(torch.equal(merged[name], torch.lerp(old[name], new[name], 0.5)) for name in anchors.weights)
    assert not any(torch.equal(old[name], new[name]) for name in anchors.weights if name.startswith(EXPERT))
    assert {value.dtype for value in [*anchors.fisher.values(), *anchors.weights.values()]} == {torch.float32}
    assert all(torch.equal(value, old[name]) for name, value in anchors.weights.items())


def test_lerobots_evaluator_opens_what_came_out(
    finished: list[RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = f"--policy.path={stage_folder(finished[1]).checkpoints.at('best').pretrained_model}"
    world = ["--env.type=kuavo_sim", "--env.task=weighing", "--env.renderer=none", "--env.episode_length=2"]
    few = ["--eval.n_episodes=1", "--eval.batch_size=1", "--policy.device=cpu", f"--output_dir={tmp_path}"]
    monkeypatch.setattr(sys, "argv", ["lerobot-eval", policy, *world, *few])
    lerobot_eval.main()
    assert (tmp_path / "eval_info.json").is_file()


def test_adapters_are_merged_into_float32_and_keep_all_that_they_learnt(robot_in: Overrides, tmp_path: Path) -> None:
    configs = compose_run(robot_in(tmp_path, "training.lora={rank: 2, alpha: 2}", "training.mixed_precision=no"))
    assert run(configs, 0) == 0
    checkpoint = stage_folder(configs[0]).checkpoints.at("last")
    stored, state = weights(configs[0], "last"), checkpoint.training_state()["adapted"]
    assert state
    for name, layer in state.items():
        base = layer["base_layer.weight"]
        assert base.dtype == torch.float32
        learnt = layer["lora_B.default.weight"] @ layer["lora_A.default.weight"]
        assert torch.equal(stored[f"{name}.weight"], base + learnt)
