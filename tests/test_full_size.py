"""The robot profile at full size, 450 million parameters, from the hub to LeRobot's evaluator: two steps a stage."""

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from commands import REPOSITORY, command
from safetensors import safe_open
from stand_in_hub import SMOLVLA, SMOLVLA_PARAMETERS, SMOLVLM, StandInHub, write_smolvla, write_smolvlm

from kuavo_sim import EVALUATION_SEED_START
from kuavo_sim.record import RecordSettings, ensure_recorded
from kuavo_train.compose import compose_run

PEAK_MEMORY = 16 * 2**30  # bytes
TASKS = ("moving_grasp", "weighing")
SETTINGS = [  # of the robot profile, all that is not as the profile has it
    f"learn=[{','.join(TASKS)}]",
    "data.held_out_episodes=1",
    "data.num_workers=0",
    "data.feature_cache=false",  # the embeddings of all frames would take an hour
    "policy.n_action_steps=50",
    "policy.mem_backprop_depth=2",
    "training.device=cpu",
    "training.batch_size=2",
    "training.max_steps=2",
    "validation.draws=1",
    "validation.unseen_tasks=false",
]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Ten gigabytes that pytest would otherwise keep for three more sessions."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.slow
def test_two_stages_at_full_size_from_the_hub_to_lerobots_evaluator(folder: Path) -> None:
    for task in TASKS:
        ensure_recorded(RecordSettings(task, episodes=3), folder / "data" / task, workers=1)
    write_smolvlm(folder / "vlm", corpus=[config.stage.instruction for config in compose_run()])
    write_smolvla(folder / "smolvla", folder / "vlm")
    kept = ("HF_", "TRANSFORMERS_")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(kept)} | {
        "HF_HOME": str(folder / "hf"),
        "KUAVO_DATA_ROOT": str(folder / "data"),
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
        "PYTHONPATH": str(REPOSITORY),
    }

    def start(*words: str) -> subprocess.Popen[str]:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(words, cwd=folder, env=environment, text=True, **pipes)

    def call(*words: str) -> str:
        process = start(*words)
        output, errors = process.communicate(timeout=3600)
        assert process.returncode == 0, (output + errors)[-5000:]
        return output

    train = [*command("kuavo_train", "profile=robot", *SETTINGS)]
    first, second = "task=tasks/task1_moving_grasp", "task=tasks/task2_weighing"
    with StandInHub({SMOLVLM: folder / "vlm", SMOLVLA: folder / "smolvla"}) as hub:
        asked = f"hf_endpoint={hub.address}"
        preflight = command("kuavo_train.preflight", "profile=robot", first, *SETTINGS, asked, "--json")
        facts = json.loads(call(*preflight))
        assert facts["problems"] == []
        parameters = {group["group"]: group["parameters"] for group in facts["parameters"]}
        assert sum(parameters.values()) - parameters["memory"] == SMOLVLA_PARAMETERS
        assert f"/{SMOLVLA}/resolve/main/model.safetensors" in hub.asked
        call(*train, first, asked)

    second_stage = [*train, second, "offline=true", "training.save_every=1"]  # the hub is gone
    stage = folder / "outputs" / "robot" / "stage2_weighing"
    process = start(*second_stage)
    while not (stage / "checkpoints" / "000001").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.kill()
    process.communicate()
    assert "resumed at step 1" in call(*second_stage, "resume=true")
    assert json.loads((stage / "stage.json").read_text())["status"] == "finished"
    assert [json.loads(line)["step"] for line in (stage / "metrics.jsonl").read_text().splitlines()][-1] == 2

    trained = stage / "checkpoints" / "best" / "pretrained_model"
    with (
        safe_open(folder / "smolvla" / "model.safetensors", "pt") as before,
        safe_open(trained / "model.safetensors", "pt") as after,
    ):
        types = {name: after.get_slice(name).get_dtype() for name in before.keys()}  # noqa: SIM118
        same = {
            name: torch.equal(before.get_tensor(name).float(), after.get_tensor(name).float())
            for name in before.keys()  # noqa: SIM118
        }
    assert all(is_same for name, is_same in same.items() if "vlm_with_expert.vlm." in name)
    assert not any(is_same for name, is_same in same.items() if name.endswith("action_out_proj.weight"))
    assert all(dtype == ("BF16" if "vlm_with_expert.vlm." in name else "F32") for name, dtype in types.items())

    environment["HF_HUB_OFFLINE"] = "1"
    call(
        str(Path(sys.executable).with_name("lerobot-eval")),
        f"--policy.path={trained}",
        "--policy.device=cpu",
        "--env.type=kuavo_sim",
        "--env.task=weighing",
        "--env.episode_length=3",
        "--eval.n_episodes=1",
        "--eval.batch_size=1",
        f"--seed={EVALUATION_SEED_START}",
        f"--output_dir={folder / 'eval'}",
    )
    assert json.loads((folder / "eval" / "eval_info.json").read_text())["overall"]["n_episodes"] == 1
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024  # of the largest process
    print(f"peak memory {peak / 2**30:.1f} GiB")
    assert peak < PEAK_MEMORY
