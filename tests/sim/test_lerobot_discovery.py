"""What LeRobot's commands find by themselves, in a Python that has imported nothing of ours yet."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROBOT = """
import sys
from lerobot.configs import PreTrainedConfig
from lerobot.envs.configs import EnvConfig
from lerobot.robots import RobotConfig
from lerobot.utils.import_utils import register_third_party_plugins

register_third_party_plugins()  # what each of LeRobot's commands begins with
policy = PreTrainedConfig.from_pretrained(sys.argv[1] + "/pretrained_model")
print(policy.type, *(config.get_choice_class("kuavo_sim").__name__ for config in (EnvConfig, RobotConfig)))

from kuavo_train.wrapper.policy.smolvla import SmolVLAPolicyWrapper
print(*(task.name for task in SmolVLAPolicyWrapper.from_pretrained(sys.argv[1], device="cpu").known.tasks))
"""


def test_a_process_that_drives_a_robot_needs_no_mujoco(small_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "mujoco.py").write_text("raise ImportError('there is no MuJoCo on this robot')\n")
    done = subprocess.run(
        [sys.executable, "-c", ROBOT, str(small_checkpoint)],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    registered, known = done.stdout.splitlines()
    assert registered == "smolvla_memory KuavoSimEnvConfig KuavoSimRobotConfig"
    assert known.split() == ["moving_grasp", "weighing", "placement", "sorting"]
    assert "MuJoCo" not in done.stderr  # LeRobot logs what it could not import, and goes on


def test_lerobot_eval_finds_the_policy_and_the_environment(small_checkpoint: Path, tmp_path: Path) -> None:
    short = ["--env.renderer=none", "--env.episode_length=2", "--eval.n_episodes=1", "--eval.batch_size=1"]
    done = subprocess.run(
        [
            Path(sys.executable).with_name("lerobot-eval"),
            f"--policy.path={small_checkpoint / 'pretrained_model'}",
            "--policy.device=cpu",
            "--env.type=kuavo_sim",
            "--env.task=weighing",
            f"--output_dir={tmp_path}",
            *short,
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "eval_info.json").read_text())["overall"]["n_episodes"] == 1
