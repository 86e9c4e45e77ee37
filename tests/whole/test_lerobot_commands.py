"""LeRobot's own commands on our checkpoints and simulation: they work, and its evaluator finds what we find."""

import json
import logging
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.envs import make_env
from lerobot.envs.configs import EnvConfig
from lerobot.policies import make_policy, make_pre_post_processors
from lerobot.scripts import lerobot_eval, lerobot_rollout, lerobot_train
from safetensors.torch import load_file

from kuavo_sim import EVALUATION_SEED_START
from kuavo_sim.lerobot import KuavoSimEnvConfig, KuavoSimRobot, KuavoSimRobotConfig
from kuavo_sim.robot import BASE_NAMES
from kuavo_train.evaluation.rollout import Environment, roll_out
from kuavo_train.wrapper.policy.smolvla import SmolVLAPolicyWrapper

STEPS = 12


def command(checkpoint: Path, *more: str) -> list[str]:
    policy = f"--policy.path={checkpoint / 'pretrained_model'}"
    fast = ["--env.renderer=none", f"--env.episode_length={STEPS}", f"--seed={EVALUATION_SEED_START}"]
    return ["lerobot-eval", policy, "--policy.device=cpu", "--env.type=kuavo_sim", "--eval.n_episodes=2", *fast, *more]


@pytest.mark.parametrize(("task", "dimensions"), [("weighing", 16), ("sorting", 20)])
def test_the_evaluator_works_without_further_flags(
    small_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str, dimensions: int
) -> None:
    monkeypatch.setattr(sys, "argv", command(small_checkpoint, f"--env.task={task}", f"--output_dir={tmp_path}"))
    lerobot_eval.main()
    found = json.loads((tmp_path / "eval_info.json").read_text())
    assert found["overall"]["n_episodes"] == 2
    assert found["overall"]["pc_success"] == 0.0  # it has been trained for one step


@pytest.fixture
def _own_handlers() -> Iterator[None]:
    """Signals mean afterwards what they meant before: a command that is called in this process takes them over."""
    before = {
        number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
    }
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


RTC = ["--inference.type=rtc", "--inference.rtc.execution_horizon=4", "--inference.queue_threshold=4"]


@pytest.mark.usefixtures("_own_handlers")
@pytest.mark.parametrize("task", ["weighing", "sorting"])
@pytest.mark.parametrize(
    "inference", [["--fps=100", "--duration=0.5"], [*RTC, "--fps=5", "--duration=2.5"]], ids=["sync", "rtc"]
)
def test_the_rollout_command_drives_the_simulated_robot(
    small_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    task: str,
    inference: list[str],
) -> None:
    """Also one of 16 dimensions, whom real-time chunking sends the 20 of a policy that has learnt to drive as well."""
    robot = ["--robot.type=kuavo_sim", f"--robot.task={task}", "--robot.renderer=none"]
    short = ["--task=do it", "--return_to_initial_position=false", *inference]
    policy = [f"--policy.path={small_checkpoint / 'pretrained_model'}", "--policy.device=cpu"]
    monkeypatch.setattr(sys, "argv", ["lerobot-rollout", *policy, *robot, *short])
    monkeypatch.setattr(lerobot_rollout, "init_logging", lambda: None)
    sent: list[int] = []
    send = KuavoSimRobot.send_action
    monkeypatch.setattr(
        KuavoSimRobot, "send_action", lambda self, action: sent.append(len(action)) or send(self, action)
    )
    with caplog.at_level(logging.INFO):
        lerobot_rollout.main()
    assert f"{task}: not done, sub-goals reached: none" in caplog.messages  # it has been trained for one step
    assert set(sent) == {20}
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_the_robot_does_what_it_is_sent() -> None:
    robot = KuavoSimRobot(KuavoSimRobotConfig(task="sorting", renderer="none", image_size=16))
    robot.connect()
    assert list(robot.get_observation()) == list(robot.observation_features)
    before = robot.get_observation()
    sent = robot.send_action({**before, "zarm_l4_link.pos": before["zarm_l4_link.pos"] + 0.2})
    assert list(sent) == list(robot.action_features)
    assert [sent[f"{name}.pos"] for name in BASE_NAMES] == [0, 0, 0, 0]
    moved = {name: abs(robot.get_observation()[name] - before[name]) for name in sent if name in before}
    assert max(moved, key=moved.__getitem__) == "zarm_l4_link.pos"
    robot.disconnect()
    assert not robot.is_connected


def test_lerobot_trains_on_from_a_checkpoint(
    small_checkpoint: Path, datasets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = {
        "policy.path": small_checkpoint / "pretrained_model",
        "policy.device": "cpu",
        "policy.push_to_hub": "false",
        "dataset.repo_id": "local/sorting",
        "dataset.root": datasets / "sorting",
        "dataset.video_backend": "pyav",
        "batch_size": 2,
        "num_workers": 0,
        "persistent_workers": "false",
        "steps": 2,
        "save_freq": 2,
        "output_dir": tmp_path / "trained",
    }
    monkeypatch.setattr(sys, "argv", ["lerobot-train", *(f"--{key}={value}" for key, value in arguments.items())])
    lerobot_train.main()
    before = load_file(small_checkpoint / "pretrained_model" / "model.safetensors")
    trained = tmp_path / "trained" / "checkpoints" / "last" / "pretrained_model"
    after = load_file(trained / "model.safetensors")
    assert before.keys() == after.keys()
    assert not torch.equal(before["model.action_out_proj.weight"], after["model.action_out_proj.weight"])
    assert PreTrainedConfig.from_pretrained(trained).num_mem_tokens > 0


class Recorded:
    """A policy whose actions are kept."""

    def __init__(self, policy: SmolVLAPolicyWrapper):
        self.policy, self.actions = policy, []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.policy, name)

    def select_action(self, observation: Any) -> np.ndarray:
        self.actions.append(self.policy.select_action(observation))
        return self.actions[-1]


def test_both_evaluators_agree_on_the_same_seeds_without_noise(small_checkpoint: Path) -> None:
    settings = {"image_size": 24, "renderer": "rays"}  # the size of training, which needs no resizing
    seeds = [EVALUATION_SEED_START, EVALUATION_SEED_START + 1]

    env_config = KuavoSimEnvConfig(task="weighing", action_dim=20, episode_length=STEPS, **settings)
    config = PreTrainedConfig.from_pretrained(small_checkpoint / "pretrained_model")
    config.pretrained_path, config.device = small_checkpoint / "pretrained_model", "cpu"
    config.sampling_temperature = 0.0  # no noise, which each would draw in its own way
    policy = make_policy(config, env_cfg=env_config)
    processors = make_pre_post_processors(config, pretrained_path=str(config.pretrained_path))
    ((env,),) = (envs.values() for envs in make_env(env_config, n_envs=2).values())
    pipelines = (*env_config.get_env_processors(), *processors)
    theirs = lerobot_eval.rollout(env, policy, *pipelines, seeds=seeds)
    per_episode = lerobot_eval.eval_policy(env, policy, *pipelines, n_episodes=2, start_seed=seeds[0])["per_episode"]
    env.close()

    ours = Recorded(SmolVLAPolicyWrapper.from_pretrained(small_checkpoint, device="cpu"))
    ours.policy.sampling_temperature = 0.0
    environment = Environment("kuavo_sim:kuavo_sim/Weighing-v0", "weighing", settings, max_steps=STEPS)
    episodes = roll_out(ours, environment, seeds, parallel=2, workers=1, progress=False).episodes

    np.testing.assert_allclose(np.stack(ours.actions, axis=1), theirs["action"].numpy(), atol=1e-5)
    assert [episode.steps for episode in episodes] == [STEPS, STEPS] == [theirs["done"].shape[1]] * 2
    assert [(e.seed, e.success, e.reward) for e in episodes] == [
        (each["seed"], each["success"], pytest.approx(each["sum_reward"])) for each in per_episode
    ]


def test_the_environment_is_found_by_its_name_and_refuses_what_it_does_not_know() -> None:
    assert EnvConfig.get_choice_class("kuavo_sim") is KuavoSimEnvConfig
    assert KuavoSimEnvConfig().action_dim == 16
    assert KuavoSimEnvConfig(task="sorting").action_dim == 20
    with pytest.raises(ValueError, match=r"task must be one of moving_grasp, .*, got 'juggling'"):
        KuavoSimEnvConfig(task="juggling")
    with pytest.raises(ValueError, match=r"action_dim must be at least the 20 of sorting, got 16"):
        KuavoSimEnvConfig(task="sorting", action_dim=16)
