"""Kuavo's data as it is, cameras of 480×640 and depth columns: preflight, training, rollouts and inspection take it."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from kuavo_sim import ENVIRONMENT_IDS
from kuavo_sim.record import RecordSettings, record
from kuavo_train.compose import compose_run
from kuavo_train.data.images.frames import DecodedFrames
from kuavo_train.data.inspection import save_sheet
from kuavo_train.data.task import open_task
from kuavo_train.evaluation.environment import Environment, evaluation_seeds
from kuavo_train.evaluation.rollout import roll_out
from kuavo_train.runs.run_folder import stage_folder
from kuavo_train.stage.description import describe
from kuavo_train.stage.preflight import examine_stage
from kuavo_train.stage.stage import run_stage
from kuavo_train.wrapper.policy.smolvla import SmolVLAPolicyWrapper

HEAD = "observation.images.head_cam_h"


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a dataset as the robot records it; sorting, which moves its base."""
    root = tmp_path_factory.mktemp("kuavo")
    record(RecordSettings("sorting", 2, image_size=(480, 640), depth=True), root / "sorting", progress=False)
    return root


@pytest.mark.slow  # the rays of 800 pictures
@pytest.mark.parametrize("cameras", [{}, {"observation.depth_h": HEAD}], ids=["pictures", "depth as a camera"])
def test_a_recording_as_on_the_robot_goes_all_the_way(
    recording: Path, small_run: Callable[..., list[str]], tmp_path: Path, cameras: dict[str, str]
) -> None:
    config = compose_run(
        small_run(f"data.root={recording}", "data.held_out_episodes=1", "training.max_steps=2", "learn=null")
    )[3]
    config = replace(config, stage=replace(config.stage, cameras=cameras, replay={"sorting": 1.0}))
    findings = examine_stage(config, [config.stage])
    assert findings.problems == []
    assert describe(findings).count("480×640") == 3
    unused = (HEAD, "observation.depth_l") if cameras else ("observation.depth_h", "observation.depth_l")
    assert f"sorting: {', '.join(unused)}, observation.depth_r not used" in findings.notes
    assert run_stage(config, [config.stage]) == 0
    assert len(stage_folder(config).validations.read()) > 0
    assert json.loads((stage_folder(config).path / "stage.json").read_text())["status"] == "finished"
    assert_drives_robots_with_such_cameras(stage_folder(config).checkpoints.at("best").pretrained_model)
    task = open_task(config.stage, config.data)
    sheet = save_sheet(task, DecodedFrames(task, image_size=None, video_backend="pyav"), 0, tmp_path / "sheet.png")
    with Image.open(sheet) as picture:
        assert min(picture.size) > 500


def assert_drives_robots_with_such_cameras(checkpoint: Path) -> None:
    """For a few steps, two of them at a time."""
    where = Environment(f"kuavo_sim:{ENVIRONMENT_IDS['sorting']}", "sorting", {"image_size": (480, 640)}, max_steps=5)
    policy = SmolVLAPolicyWrapper.from_pretrained(checkpoint, device="cpu", seed=0)
    rollouts = roll_out(policy, where, evaluation_seeds(2), workers=1, progress=False)
    assert rollouts.failures == []
    assert [episode.steps for episode in rollouts.played] == [5, 5]
