"""Opening datasets: splits, features by name, shared statistics, and what is refused."""

import json
import runpy
import shlex
import shutil
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from small_datasets import ARM_NAMES, write_dataset

from kuavo_train.config import RunConfig
from kuavo_train.data.feature_space import FeatureSpace
from kuavo_train.data.images.frames import DecodedFrames
from kuavo_train.data.normalization import STD_FLOOR, Normalization, fit_normalization
from kuavo_train.data.split import split_episodes
from kuavo_train.data.task import Task, open_task
from kuavo_train.errors import ConfigError
from kuavo_train.runs.files import write_json

OpenKuavoTask = Callable[..., Task]


@pytest.fixture
def tasks(configs: list[RunConfig]) -> list[Task]:
    return [open_task(config.stage, config.data) for config in configs]


def test_splits_are_disjoint_complete_and_stable(tasks: list[Task], configs: list[RunConfig]) -> None:
    for task, config in zip(tasks, configs, strict=True):
        assert set(task.train_episodes) & set(task.held_out_episodes) == set()
        assert set(task.train_episodes) | set(task.held_out_episodes) == set(range(5))
        assert open_task(config.stage, config.data).held_out_episodes == task.held_out_episodes
    assert split_episodes("a", range(100), 20, 0) != split_episodes("b", range(100), 20, 0)
    assert split_episodes("a", range(100), 20, 0) != split_episodes("a", range(100), 20, 1)


def test_more_episodes_hardly_change_which_are_held_out() -> None:
    _, before = split_episodes("a", range(100), 20, 0)
    _, after = split_episodes("a", range(110), 20, 0)
    assert len(set(before) & set(after)) >= 15


def test_statistics_are_those_of_the_training_frames_alone(tasks: list[Task]) -> None:
    statistics = fit_normalization(tasks, "joint").statistics["action"]
    pooled = np.concatenate([task.action[task.train_rows, 2] for task in tasks])
    assert statistics["mean"][2] == pytest.approx(pooled.mean(), abs=1e-6)
    assert statistics["std"][2] == pytest.approx(pooled.std(), rel=1e-5)
    base = tasks[3].action[tasks[3].train_rows, 17]
    assert statistics["mean"][17] == pytest.approx(base.mean(), abs=1e-6)
    assert statistics["count"][0] == sum(len(task.train_rows) for task in tasks)
    assert statistics["count"][17] == len(tasks[3].train_rows)


def test_held_out_frames_do_not_enter_the_statistics(tasks: list[Task]) -> None:
    before = fit_normalization(tasks, "joint").hash
    spoilt = tasks[0].action.copy()
    spoilt[tasks[0].rows_of(tasks[0].held_out_episodes)] = 1e6
    assert fit_normalization([replace(tasks[0], action=spoilt), *tasks[1:]], "joint").hash == before


def test_statistics_of_many_frames_need_little_more_than_a_column_at_a_time(tasks: list[Task]) -> None:
    many = np.tile(tasks[0].train_rows, 2_000)
    task = replace(tasks[0])
    task.__dict__["train_rows"] = many  # as of a dataset of so many frames
    tracemalloc.start()
    fit_normalization([task], "joint")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    column = many.size * np.dtype(np.float64).itemsize
    assert peak < 4 * column  # in both precisions, and what the standard deviation takes
    assert len(task.state_names) > 4


def test_a_joint_that_never_moves_gets_the_floor(tasks: list[Task]) -> None:
    still = tasks[0].state.copy()
    still[:, 0] = 0.3
    normalization = fit_normalization([replace(tasks[0], state=still)], "first_stage")
    assert normalization.statistics["observation.state"]["std"][0] == STD_FLOOR


def test_a_normalization_file_that_was_edited_is_refused(tasks: list[Task], tmp_path: Path) -> None:
    path = tmp_path / "normalization.json"
    write_json(path, fit_normalization(tasks, "joint").to_json())
    assert Normalization.load(path).hash == fit_normalization(tasks, "joint").hash
    stored = json.loads(path.read_text())
    stored["statistics"]["action"]["mean"][0] += 1
    path.write_text(json.dumps(stored))
    with pytest.raises(ConfigError, match=r"content must have the hash .*; restore it from a copy, or choose another"):
        Normalization.load(path)


def test_a_dimension_without_statistics_is_refused(tasks: list[Task]) -> None:
    first = fit_normalization(tasks[:1], "first_stage")
    first.check_covers(tasks[1])
    with pytest.raises(ConfigError, match="must cover every dimension of sorting's action, missing cmd_pos_x"):
        first.check_covers(tasks[3])


def test_features_meet_by_name_not_by_place(tasks: list[Task]) -> None:
    names = list(reversed(tasks[1].action_names))
    turned = replace(tasks[1], action_names=tuple(names), action=tasks[1].action[:, ::-1])
    space = FeatureSpace.of([tasks[0], turned])
    assert space.action_names == tasks[0].action_names
    assert list(space.action_columns(turned)) == list(range(15, -1, -1))
    assert {group: len(columns) for group, columns in FeatureSpace.of(tasks).action_groups().items()} == {
        "left_arm": 7,
        "claws": 2,
        "right_arm": 7,
        "base_position": 2,
        "base_yaw": 1,
        "base_mode": 1,
    }


def edit_info(change: Callable[[dict], None]) -> Callable[[Path], None]:
    def edit(root: Path) -> None:
        path = root / "meta" / "info.json"
        info = json.loads(path.read_text())
        change(info)
        path.write_text(json.dumps(info))

    return edit


def spoil_action(root: Path) -> None:
    path = next((root / "data").rglob("*.parquet"))
    table = pd.read_parquet(path)
    spoilt = table["action"][17].copy()
    spoilt[3] = np.nan
    table.at[17, "action"] = spoilt
    table.to_parquet(path)


BAD_DATASETS: list[tuple[str, Callable[[Path], None], str]] = [
    ("no folder", shutil.rmtree, r"dataset .* does not exist; record it .*, or set stage.root or data.root"),
    (
        "20 names for 16 dimensions",
        edit_info(lambda info: info["features"]["observation.state"].update(names=[*ARM_NAMES, "a", "b", "c", "d"])),
        r"observation.state must name each of its 16 dimensions once, got 20 names",
    ),
    (
        "a name twice",
        edit_info(lambda info: info["features"]["action"].update(names=[*ARM_NAMES[:15], ARM_NAMES[0]])),
        r"action must name each of its 16 dimensions once",
    ),
    (
        "an older format",
        edit_info(lambda info: info.update(codebase_version="v2.1")),
        r"must be of LeRobot's format v3.0, got v2.1; convert it .*convert_dataset_v21_to_v30 --repo-id=local/moving",
    ),
    (
        "no tables",
        lambda root: shutil.rmtree(root / "data"),
        r"dataset .*moving_grasp lacks data/chunk-000/file-000.parquet; copy what is missing from where",
    ),
    (
        "a value that is no number",
        spoil_action,
        r"action must be finite, got nan for zarm_l4_link in episode 1, frame 3 .*episodes: \[first, last\] in",
    ),
]


@pytest.mark.parametrize(("what", "spoil", "message"), BAD_DATASETS, ids=[item[0] for item in BAD_DATASETS])
def test_a_bad_dataset_is_refused(
    configs: list[RunConfig], tmp_path: Path, what: str, spoil: Callable[[Path], None], message: str
) -> None:
    root = tmp_path / "moving_grasp"
    shutil.copytree(configs[0].stage.root, root)
    spoil(root)
    with pytest.raises(ConfigError, match=message):
        open_task(replace(configs[0].stage, root=str(root)), configs[0].data)


def test_a_missing_camera_is_named_and_may_be_mapped(configs: list[RunConfig], tmp_path: Path) -> None:
    write_dataset(tmp_path / "moving_grasp", cameras=("front", "wrist_cam_l", "wrist_cam_r"), episodes=3)
    stage = replace(configs[0].stage, root=str(tmp_path / "moving_grasp"))
    data = replace(configs[0].data, held_out_episodes=1)
    fix = r"cameras: \{observation.images.front: observation.images.head_cam_h\} in the task's file"
    with pytest.raises(ConfigError, match=rf"cameras must include observation.images.head_cam_h, got .*front.*{fix}"):
        open_task(stage, data)
    mapped = replace(stage, cameras={"observation.images.front": "observation.images.head_cam_h"})
    task = open_task(mapped, data)
    assert list(task.cameras) == data.cameras
    assert task.cameras["observation.images.head_cam_h"] == "observation.images.front"


def test_a_camera_mapped_to_one_that_the_policy_does_not_have_is_refused(configs: list[RunConfig]) -> None:
    typo = replace(configs[0].stage, cameras={"observation.images.head_cam_h": "observation.images.head_cam"})
    with pytest.raises(
        ConfigError, match=r"cameras must map to data.cameras \(.*\), got 'observation.images.head_cam'"
    ):
        open_task(typo, configs[0].data)


def test_the_command_named_for_an_older_dataset_converts_it(
    kuavo_task: OpenKuavoTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_v21_dataset(tmp_path / "moving_grasp")
    with pytest.raises(ConfigError, match=r"must be of LeRobot's format v3\.0, got v2\.1") as refused:
        kuavo_task()
    command = str(refused.value).partition("python -m ")[2].partition(" (")[0]
    monkeypatch.setattr("sys.argv", shlex.split(command))
    runpy.run_module(shlex.split(command)[0], run_name="__main__")
    task = kuavo_task()
    assert np.diff(task.bounds).tolist() == [[4], [4], [4]]
    shapes = DecodedFrames(task, image_size=None, video_backend="pyav").checked_shapes()
    assert list(shapes.values()) == [(3, 32, 32)] * 3


def write_v21_dataset(root: Path, *, episodes: int = 3, length: int = 4) -> None:
    """As LeRobot 0.1 to 0.3 wrote it, and Kuavo's earlier converters: a table and a video per episode."""
    (root / "meta").mkdir(parents=True)
    (root / "data" / "chunk-000").mkdir(parents=True)
    about: dict[str, list[dict[str, Any]]] = {"episodes": [], "episodes_stats": []}
    for episode in range(episodes):
        single = write_dataset(root.parent / f"single{episode}", episodes=1, length=length, seed=episode)
        table = pd.read_parquet(single / "data" / "chunk-000" / "file-000.parquet")
        table["episode_index"], table["index"] = episode, table["index"] + episode * length
        table.to_parquet(root / "data" / "chunk-000" / f"episode_{episode:06d}.parquet")
        for video in (single / "videos").rglob("*.mp4"):
            folder = root / "videos" / "chunk-000" / video.relative_to(single / "videos").parts[0]
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(video, folder / f"episode_{episode:06d}.mp4")
        statistics = json.loads((single / "meta" / "stats.json").read_text())
        about["episodes"].append({"episode_index": episode, "tasks": [single.name], "length": length})
        about["episodes_stats"].append({"episode_index": episode, "stats": statistics})
        info = json.loads((single / "meta" / "info.json").read_text())
    about["tasks"] = [{"task_index": 0, "task": root.name}]
    for name, lines in about.items():
        (root / "meta" / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    info |= {
        "codebase_version": "v2.1",
        "total_episodes": episodes,
        "total_frames": episodes * length,
        "total_chunks": 1,
        "total_videos": 3 * episodes,
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    }
    (root / "meta" / "info.json").write_text(json.dumps(info))


def test_a_part_of_the_episodes_may_be_used(configs: list[RunConfig]) -> None:
    config = configs[0]
    task = open_task(replace(config.stage, episodes=[1, 3]), config.data)
    assert set(task.train_episodes) | set(task.held_out_episodes) == {1, 2, 3}
    with pytest.raises(ConfigError, match=r"episodes must end before 5, .* got \[1, 5\]"):
        open_task(replace(config.stage, episodes=[1, 5]), config.data)


def test_episodes_to_choose_by_are_taken_from_the_training_episodes_alone(configs: list[RunConfig]) -> None:
    whole = open_task(configs[0].stage, configs[0].data)
    task = whole.with_choosing_episodes(1, 0)
    assert task.held_out_episodes == whole.held_out_episodes
    assert sorted((*task.train_episodes, *task.choosing_episodes)) == sorted(whole.train_episodes)
    assert len(task.choosing_episodes) == 1
    assert not set(task.train_rows) & set(task.rows_of(task.choosing_episodes))
    more = whole.with_choosing_episodes(2, 0)
    assert set(task.choosing_episodes) < set(more.choosing_episodes)
    with pytest.raises(
        ConfigError, match=r"merge.episodes must be less than the 3 training episodes of moving_grasp, got 3"
    ):
        whole.with_choosing_episodes(3, 0)


def test_too_many_held_out_episodes_are_refused(configs: list[RunConfig]) -> None:
    with pytest.raises(ConfigError, match="must be less than the 5 episodes of moving_grasp, got 5"):
        open_task(configs[0].stage, replace(configs[0].data, held_out_episodes=5))


@pytest.fixture
def kuavo_task(configs: list[RunConfig], tmp_path: Path) -> OpenKuavoTask:
    """Task 1, opened on a dataset of its own."""
    root = tmp_path / "moving_grasp"

    def opened(stage: dict[str, Any] | None = None, **dataset: Any) -> Task:
        if not root.exists():
            write_dataset(root, episodes=3, length=4, **dataset)
        changes = {"root": str(root)} | (stage or {})
        return open_task(replace(configs[0].stage, **changes), replace(configs[0].data, held_out_episodes=1))

    return opened


def test_a_recording_as_the_kuavo_makes_it_opens(kuavo_task: OpenKuavoTask) -> None:
    task = kuavo_task(size=(480, 640), depth=True)
    assert task.camera_size("observation.images.head_cam_h") == (480, 640)
    assert task.unused == ("observation.depth_h", "observation.depth_l")
    shapes = DecodedFrames(task, image_size=None, video_backend="pyav").checked_shapes()
    assert list(shapes.values()) == [(3, 480, 640)] * 3


def test_a_depth_video_is_used_only_where_it_is_mapped_to_a_camera(kuavo_task: OpenKuavoTask) -> None:
    mapped = {"observation.depth_h": "observation.images.head_cam_h"}
    task = kuavo_task({"cameras": mapped}, depth=True)
    assert task.unused == ("observation.images.head_cam_h", "observation.depth_l")
    frames = DecodedFrames(task, image_size=None, video_backend="pyav")
    assert frames("observation.images.head_cam_h", np.array([0])).float().mean() == pytest.approx(200, abs=3)
    with pytest.raises(ConfigError, match=r"cameras must .*got observation.depth_l: numbers of dtype uint16; "):
        kuavo_task({"cameras": {"observation.depth_l": "observation.images.wrist_cam_l"}})


def test_claws_of_another_scale_are_refused_until_they_are_scaled(kuavo_task: OpenKuavoTask) -> None:
    message = (
        r"claws must be in \[0.0, 1.0\] \(open to closed\), got action.left_claw from .* to 1\d\d.*"
        r"scale: \{action.left_claw: 0.00714286, action.right_claw: 0.00714286\}"
    )
    with pytest.raises(ConfigError, match=message):
        kuavo_task(claw_scale=140)
    scaled = kuavo_task({"scale": {"action.left_claw": 1 / 140, "action.right_claw": 1 / 140}})
    assert 0 <= scaled.action[:, 7].min() <= scaled.action[:, 7].max() <= 1
    assert scaled.action[:, 15].max() > 0.5
    with pytest.raises(ConfigError, match=r"scale must name dimensions of action .*, got middle_claw"):
        kuavo_task({"scale": {"action.middle_claw": 0.1}})


def test_joints_in_degrees_are_refused_until_they_are_scaled(kuavo_task: OpenKuavoTask) -> None:
    degrees = {f"action.{name}": 57.3 for name in ARM_NAMES[:7]}
    with pytest.raises(
        ConfigError, match=r"must be in rad.* got action.zarm_l1_link .*: 0.0174533.*, action.zarm_l7_link"
    ):
        kuavo_task({"scale": degrees})
    assert abs(kuavo_task().action[:, :7]).max() <= 1


def test_the_claws_of_a_converter_that_calls_them_grippers_are_claws(kuavo_task: OpenKuavoTask, tmp_path: Path) -> None:
    write_dataset(tmp_path / "moving_grasp", episodes=3, length=4, claw_scale=255)
    edit_info(
        lambda info: info["features"]["action"].update(
            names={"action_names": [*ARM_NAMES[:7], "gripper_l", *ARM_NAMES[8:15], "gripper_r"]}
        )
    )(tmp_path / "moving_grasp")
    with pytest.raises(ConfigError, match=r"claws must be in .* got action.gripper_l from .*, action.gripper_r from"):
        kuavo_task()


def test_what_is_wrong_with_episodes_that_are_not_used_does_not_matter(
    configs: list[RunConfig], tmp_path: Path
) -> None:
    root = shutil.copytree(configs[0].stage.root, tmp_path / "moving_grasp")
    spoil_action(root)  # in episode 1
    part = replace(configs[0].stage, root=str(root), episodes=[2, 4])
    assert set(open_task(part, configs[0].data).train_episodes) <= {2, 3, 4}


def test_twenty_names_for_sixteen_dimensions_can_be_put_right_in_the_task_file(
    kuavo_task: OpenKuavoTask, tmp_path: Path
) -> None:
    write_dataset(tmp_path / "moving_grasp", episodes=3, length=4)
    edit_info(lambda info: info["features"]["observation.state"].update(names=[*ARM_NAMES, "a", "b", "c", "d"]))(
        tmp_path / "moving_grasp"
    )
    fix = rf"set state_names: \[{', '.join(ARM_NAMES)}\] in the task's file if the first 16 are those"
    with pytest.raises(ConfigError, match=rf"got 20 names: .*, right_claw, a, b, c, d; correct .* or {fix}"):
        kuavo_task()
    assert kuavo_task({"state_names": ARM_NAMES}).state_names == tuple(ARM_NAMES)


def test_everything_wrong_with_a_dataset_is_told_at_once(kuavo_task: OpenKuavoTask) -> None:
    wrong = {"cameras": {"observation.images.front": "observation.images.head_cam_h"}, "episodes": [0, 9]}
    with pytest.raises(ConfigError) as refused:
        kuavo_task({**wrong, "state_names": ["a"]}, claw_scale=255)
    for problem in (
        "observation.state must name each",
        "claws must be in",
        "cameras must include",
        "must end before 3",
    ):
        assert problem in str(refused.value)


def test_a_dataset_that_the_hub_does_not_give_says_what_was_tried(configs: list[RunConfig], tmp_path: Path) -> None:
    stage = replace(configs[0].stage, root=str(tmp_path / "moving_grasp"), repo_id="nobody/nothing")
    message = r"must be there or be had from the hub as nobody/nothing, got OfflineModeIsEnabled: .*; set offline=false"
    with pytest.raises(ConfigError, match=message):
        open_task(stage, configs[0].data)
