"""What LeRobot's commands find by themselves, in a Python that has imported nothing of ours yet."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

FORKS = """
import os, sys
import lerobot.scripts.lerobot_eval  # and torch with it: seconds, which each of the programs would take

assert not {"kuavo_sim", "kuavo_train", "lerobot_policy_smolvla_memory", "mujoco"} & set(sys.modules)
for number, program in enumerate(sys.argv[3:]):
    process = os.fork()
    if process == 0:
        os.dup2(os.open(f"{sys.argv[1]}/{number}.out", os.O_WRONLY | os.O_CREAT), 1)
        os.dup2(os.open(f"{sys.argv[1]}/{number}.err", os.O_WRONLY | os.O_CREAT), 2)
        exec(program, {"checkpoint": sys.argv[2], "folder": sys.argv[1]})
        sys.exit()
    os.waitpid(process, 0)
"""

ROBOT = """
import sys
from lerobot.configs import PreTrainedConfig
from lerobot.envs.configs import EnvConfig
from lerobot.robots import RobotConfig
from lerobot.utils.import_utils import register_third_party_plugins

sys.path.insert(0, folder + "/without_mujoco")
register_third_party_plugins()  # what each of LeRobot's commands begins with
policy = PreTrainedConfig.from_pretrained(checkpoint + "/pretrained_model")
print(policy.type, *(config.get_choice_class("kuavo_sim").__name__ for config in (EnvConfig, RobotConfig)))

from kuavo_train.wrapper.policy.smolvla import SmolVLAPolicyWrapper
print(*(task.name for task in SmolVLAPolicyWrapper.from_pretrained(checkpoint, device="cpu").known.tasks))
"""

EVALUATOR = """
import sys
from lerobot.scripts.lerobot_eval import main

sys.argv = [
    "lerobot-eval",
    "--policy.path=" + checkpoint + "/pretrained_model",
    "--policy.device=cpu",
    "--env.type=kuavo_sim",
    "--env.task=weighing",
    "--output_dir=" + folder + "/evaluated",
    "--env.renderer=none",
    "--env.episode_length=2",
    "--eval.n_episodes=1",
    "--eval.batch_size=1",
]
main()
"""


@dataclass
class Fresh:
    """What the two programs left, each in a process that had imported LeRobot and nothing of ours."""

    folder: Path

    def printed(self, program: int, stream: str) -> str:
        return (self.folder / f"{program}.{stream}").read_text()


@pytest.fixture(scope="module")
def fresh(small_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Fresh:
    folder = tmp_path_factory.mktemp("fresh")
    (folder / "without_mujoco").mkdir()
    (folder / "without_mujoco" / "mujoco.py").write_text("raise ImportError('there is no MuJoCo on this robot')\n")
    subprocess.run([sys.executable, "-c", FORKS, folder, small_checkpoint, ROBOT, EVALUATOR], check=True)
    return Fresh(folder)


def test_a_process_that_drives_a_robot_needs_no_mujoco(fresh: Fresh) -> None:
    printed = fresh.printed(0, "out").splitlines()
    assert len(printed) == 2, fresh.printed(0, "err")
    registered, known = printed
    assert registered == "smolvla_memory KuavoSimEnvConfig KuavoSimRobotConfig"
    assert known.split() == ["moving_grasp", "weighing", "placement", "sorting"]
    assert "MuJoCo" not in fresh.printed(0, "err")  # LeRobot logs what it could not import, and goes on


def test_lerobot_eval_finds_the_policy_and_the_environment(fresh: Fresh) -> None:
    found = fresh.folder / "evaluated" / "eval_info.json"
    assert found.is_file(), fresh.printed(1, "err")[-3000:]
    assert json.loads(found.read_text())["overall"]["n_episodes"] == 1
