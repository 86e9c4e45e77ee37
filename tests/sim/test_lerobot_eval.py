"""LeRobot's own evaluator on our checkpoints and environments: its command works, and it finds what we find."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lerobot.envs import make_env
from lerobot.envs.configs import EnvConfig
from lerobot.policies import make_policy, make_pre_post_processors
from lerobot.scripts import lerobot_eval

import lerobot_policy_smolvla_memory  # noqa: F401 - registers policy and environment
from kuavo_sim import EVALUATION_SEED_START
from kuavo_sim.lerobot import KuavoSimEnvConfig
from kuavo_train.evaluation.rollout import Environment, roll_out
from kuavo_train.trained_run import PreTrainedConfig
from kuavo_train.wrapper.policy.smolvla import SmolVLAPolicyWrapper

STEPS = 12


def command(checkpoint: Path, *more: str) -> list[str]:
    policy = f"--policy.path={checkpoint / 'pretrained_model'}"
    fast = ["--env.renderer=none", f"--env.episode_length={STEPS}", f"--seed={EVALUATION_SEED_START}"]
    return ["lerobot-eval", policy, "--policy.device=cpu", "--env.type=kuavo_sim", "--eval.n_episodes=2", *fast, *more]


@pytest.mark.parametrize(("task", "dimensions"), [("weighing", 16), ("sorting", 20)])
def test_the_command_works_without_further_flags(
    small_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str, dimensions: int
) -> None:
    monkeypatch.setattr(sys, "argv", command(small_checkpoint, f"--env.task={task}", f"--output_dir={tmp_path}"))
    lerobot_eval.main()
    found = json.loads((tmp_path / "eval_info.json").read_text())
    assert found["overall"]["n_episodes"] == 2
    assert found["overall"]["pc_success"] == 0.0  # it has been trained for one step


class Recorded:
    """A policy whose actions are kept."""

    def __init__(self, policy: SmolVLAPolicyWrapper):
        self.policy, self.actions = policy, []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.policy, name)

    def select_action(self, observation: Any) -> np.ndarray:
        self.actions.append(self.policy.select_action(observation))
        return self.actions[-1]


def test_both_evaluators_agree_on_the_same_seeds_and_noise(
    small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"image_size": 24, "renderer": "rays"}  # the size of training, which needs no resizing
    seeds = [EVALUATION_SEED_START, EVALUATION_SEED_START + 1]

    env_config = KuavoSimEnvConfig(task="weighing", action_dim=20, episode_length=STEPS, **settings)
    config = PreTrainedConfig.from_pretrained(small_checkpoint / "pretrained_model")
    config.pretrained_path, config.device = small_checkpoint / "pretrained_model", "cpu"
    policy = make_policy(config, env_cfg=env_config)
    monkeypatch.setattr(policy.model, "sample_noise", lambda shape, device: torch.zeros(shape))
    processors = make_pre_post_processors(config, pretrained_path=str(config.pretrained_path))
    ((env,),) = (envs.values() for envs in make_env(env_config, n_envs=2).values())
    pipelines = (*env_config.get_env_processors(), *processors)
    theirs = lerobot_eval.rollout(env, policy, *pipelines, seeds=seeds)
    told = lerobot_eval.eval_policy(env, policy, *pipelines, n_episodes=2, start_seed=seeds[0])["per_episode"]
    env.close()

    ours = Recorded(SmolVLAPolicyWrapper.from_pretrained(small_checkpoint, device="cpu"))
    monkeypatch.setattr(ours.policy, "_noise", lambda: torch.zeros(2, 6, ours.policy._policy.config.max_action_dim))
    environment = Environment("kuavo_sim:kuavo_sim/Weighing-v0", "weighing", settings, max_steps=STEPS)
    episodes = roll_out(ours, environment, seeds, parallel=2, workers=1, progress=False).episodes

    np.testing.assert_allclose(np.stack(ours.actions, axis=1), theirs["action"].numpy(), atol=1e-5)
    assert [episode.steps for episode in episodes] == [STEPS, STEPS] == [theirs["done"].shape[1]] * 2
    assert [(e.seed, e.success, e.reward) for e in episodes] == [
        (each["seed"], each["success"], pytest.approx(each["sum_reward"])) for each in told
    ]


def test_the_environment_is_found_by_its_name_and_refuses_what_it_does_not_know() -> None:
    assert EnvConfig.get_choice_class("kuavo_sim") is KuavoSimEnvConfig
    assert KuavoSimEnvConfig().action_dim == 16
    assert KuavoSimEnvConfig(task="sorting").action_dim == 20
    with pytest.raises(ValueError, match=r"env.task must be one of moving_grasp, .*, got 'juggling'"):
        KuavoSimEnvConfig(task="juggling")
    with pytest.raises(ValueError, match=r"env.action_dim must be at least the 20 of sorting, got 16"):
        KuavoSimEnvConfig(task="sorting", action_dim=16)
