"""`make base` in its smallest size: skills recorded, learnt, handed out, and a stage that starts from it."""

import hashlib
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from lerobot.configs import PreTrainedConfig
from lerobot.policies.factory import get_policy_class

from kuavo_sim.skills import SKILLS
from kuavo_train.runs.run_folder import StageFolder

Here = Callable[..., subprocess.CompletedProcess[str]]


@pytest.mark.parametrize("memory", [False, True])
def test_a_base_is_recorded_pretrained_and_handed_out_and_a_stage_starts_from_it(
    here: Here, tmp_path: Path, memory: bool
) -> None:
    outputs, policy = tmp_path / "outputs", "smolvla_memory" if memory else "smolvla"
    small = ["profile=smoke", f"outputs={outputs}", "simulation.episodes=2", "data.held_out_episodes=1"]
    short = ["rollout.episodes=0", "training.max_steps=2"]
    made = here("kuavo_train.base", *small, *short, f"policy={policy}")
    assert made.returncode == 0, made.stderr
    folder, sha256 = re.findall(r"^base: (\S+), sha256 of its weights (\w{64})$", made.stdout, re.MULTILINE)[-1]
    assert hashlib.sha256((Path(folder) / "model.safetensors").read_bytes()).hexdigest() == sha256
    recorded = {path.name for path in (outputs / "data_smoke").iterdir() if not path.name.startswith(".")}
    assert recorded == set(SKILLS)
    config = PreTrainedConfig.from_pretrained(folder)
    assert (config.num_mem_tokens > 0) == memory
    assert get_policy_class(config.type).from_pretrained(folder, config=config, strict=True)

    jobs = ["task=tasks/task1_moving_grasp", "learn=[moving_grasp]", "run=from_it", f"data.root={tmp_path / 'jobs'}"]
    start = [f"policy.pretrained_path={folder}", f"base_sha256={sha256}", "data.normalization=pretrained"]
    trained = here(
        "kuavo_train", *small, *short, *jobs, *start, "tiny_vlm.corpus=words", "tiny_vlm.vocabulary_size=1024"
    )
    assert trained.returncode == 0, trained.stderr
    assert StageFolder(outputs / "from_it" / "stage1_moving_grasp").status == "finished"
    other = here("kuavo_train", *small, *short, *jobs, *start[:1], "base_sha256=" + 64 * "0", "run=refused")
    assert other.returncode == 2
    assert "base_sha256" in other.stderr
