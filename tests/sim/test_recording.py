"""A recording is whole, repeatable and LeRobot's, or it is not there."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest

import kuavo_sim.record as record_module
from kuavo_sim import EVALUATION_SEED_START
from kuavo_sim.expert import demonstrate
from kuavo_sim.record import (
    RecordSettings,
    content_hash,
    demonstration_of,
    ensure_all_recorded,
    ensure_recorded,
    main,
    record,
)

SETTINGS = RecordSettings(task="sorting", episodes=2, image_size=32)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return record(SETTINGS, tmp_path_factory.mktemp("data") / "sorting", workers=1, progress=False)


def side_data(root):
    return [json.loads(line) for line in (root / "kuavo_sim_episodes.jsonl").read_text().splitlines()]


def test_lerobot_opens_the_recording_and_finds_kuavos_features(dataset):
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    opened = LeRobotDataset("kuavo_sim/sorting", root=dataset, video_backend="pyav")
    assert opened.num_episodes == 2
    assert opened.fps == 10
    assert len(opened) == sum(line["length"] for line in side_data(dataset))
    frame = opened[len(opened) - 1]
    assert frame["task"].startswith("Move from the starting point to the rack")
    assert frame["observation.state"].shape == (16,)
    assert frame["action"].shape == (20,)
    assert opened.meta.features["action"]["names"][-4:] == ["cmd_pos_x", "cmd_pos_y", "cmd_pos_yaw", "ctrl_change_cmd"]
    demonstration = demonstration_of(SETTINGS, seed=1)
    np.testing.assert_allclose(frame["action"].numpy(), demonstration.actions[-1])
    for camera, pictures in demonstration.pictures.items():
        seen = frame[f"observation.images.{camera}"].permute(1, 2, 0).numpy() * 255
        assert np.abs(seen - pictures[-1]).mean() < 12  # h264 halves the resolution of colours


def test_a_recording_as_on_the_robot_is_wide_and_has_depth_columns(tmp_path):
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    settings = RecordSettings(task="placement", episodes=1, image_size=(48, 64), depth=True)
    root = record(settings, tmp_path / "placement", workers=1, progress=False)
    opened = LeRobotDataset("kuavo_sim/placement", root=root, video_backend="pyav")
    demonstration = demonstration_of(settings, seed=0)
    frame = opened[40]
    assert frame["observation.images.wrist_cam_l"].shape == (3, 48, 64)
    for name, depths in demonstration.depths.items():
        recorded = frame[f"observation.{name}"].numpy() * 255
        assert recorded.shape == (3, 48, 64)
        assert np.abs(recorded - depths[40]).mean() < 3  # cm
    assert ensure_recorded(settings, root) is False


def test_every_video_frame_stands_alone(dataset):
    """Otherwise the compression could carry a cue over to frames that no longer show it."""
    import av

    for path in (dataset / "videos").rglob("*.mp4"):
        with av.open(str(path)) as video:
            assert all(frame.key_frame for frame in video.decode(video=0))


def test_side_data_tells_seed_cue_and_frames(dataset):
    for episode, line in enumerate(side_data(dataset)):
        assert line["episode_index"] == line["seed"] == line["cue"] == episode
        (decision,) = line["decision_frames"]
        frames = list(line["subgoal_frames"].values())
        assert frames == sorted(frames)
        assert frames[1] < decision < line["length"]


def test_a_recording_does_not_depend_on_the_number_of_workers(dataset, tmp_path):
    parallel = record(SETTINGS, tmp_path / "sorting", workers=2, progress=False)
    assert content_hash(parallel) == content_hash(dataset)


def test_datasets_recorded_side_by_side_are_those_recorded_alone(dataset, tmp_path):
    wanted = {
        tmp_path / "weighing": RecordSettings("weighing", episodes=1, image_size=16),
        tmp_path / "sorting": SETTINGS,
    }
    assert ensure_all_recorded(wanted, workers=2) == list(wanted)
    assert content_hash(tmp_path / "sorting") == content_hash(dataset)
    assert ensure_all_recorded(wanted, workers=2) == []


def test_a_dataset_that_is_another_is_refused_before_any_is_recorded(dataset, tmp_path):
    wanted = {tmp_path / "sorting": SETTINGS, dataset: dataclasses.replace(SETTINGS, seed=3)}
    with pytest.raises(ValueError, match="recorded with seed=0, wanted is 3"):
        ensure_all_recorded(wanted)
    assert list(tmp_path.iterdir()) == []


def test_what_stops_one_of_several_recordings_stops_all_and_leaves_nothing(tmp_path):
    (tmp_path / "file").touch()
    wanted = {
        tmp_path / "sorting": dataclasses.replace(SETTINGS, episodes=1000),
        tmp_path / "file" / "sorting": SETTINGS,
    }
    with pytest.raises(FileExistsError):
        ensure_all_recorded(wanted, workers=2)
    assert {path.name for path in tmp_path.iterdir()} <= {".sorting.lock", "file"}


def test_appending_an_episode_copies_no_more_than_a_short_video(dataset):
    info = json.loads((dataset / "meta" / "info.json").read_text())
    assert info["video_files_size_in_mb"] == 1


def test_statistics_do_not_depend_on_the_interpreters_hash_seed(dataset):
    statistics = json.loads((dataset / "meta" / "stats.json").read_text())
    assert list(statistics) == sorted(statistics)


def test_a_recording_from_before_a_setting_came_is_kept(dataset, tmp_path):
    copy = shutil.copytree(dataset, tmp_path / "copy")
    recording = json.loads((copy / "recording.json").read_text())
    del recording["settings"]["depth"]
    (copy / "recording.json").write_text(json.dumps(recording))
    assert ensure_recorded(SETTINGS, copy) is False
    with pytest.raises(ValueError, match="recorded with depth=False, wanted is True"):
        ensure_recorded(dataclasses.replace(SETTINGS, depth=True), copy)


def test_a_complete_recording_is_kept(dataset):
    before = (dataset / "recording.json").stat().st_mtime_ns
    assert ensure_recorded(SETTINGS, dataset, progress=False) is False
    assert (dataset / "recording.json").stat().st_mtime_ns == before
    with pytest.raises(FileExistsError, match="exists already"):
        record(SETTINGS, dataset)


@pytest.mark.parametrize(
    ("key", "value"),
    [("seed", 3), ("image_size", 64), ("action_noise", 0.0), ("phase_visible", False), ("episodes", 9)],
)
def test_a_recording_under_other_settings_is_refused(dataset, key, value):
    recorded = getattr(SETTINGS, key)
    with pytest.raises(ValueError, match=f"recorded with {key}={recorded!r}, wanted is {value!r}. Remove"):
        ensure_recorded(dataclasses.replace(SETTINGS, **{key: value}), dataset)


def test_a_changed_or_foreign_folder_is_refused(dataset, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy)
    next((copy / "data").rglob("*.parquet")).write_bytes(b"")
    with pytest.raises(ValueError, match="was changed since it was recorded"):
        ensure_recorded(SETTINGS, copy)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    with pytest.raises(FileExistsError, match="holds no recording of kuavo_sim"):
        ensure_recorded(SETTINGS, foreign)


def test_a_recording_by_another_version_is_refused(dataset, monkeypatch):
    monkeypatch.setattr("kuavo_sim.__version__", "0.0-other")
    with pytest.raises(ValueError, match=r"recorded by kuavo_sim .*, this is 0\.0-other"):
        ensure_recorded(SETTINGS, dataset)


def test_an_interrupted_recording_leaves_nothing_and_leftovers_are_cleared(tmp_path, monkeypatch):
    root = tmp_path / "sorting"
    leftover = tmp_path / ".sorting.partial" / "meta"
    leftover.mkdir(parents=True)  # as after a kill

    def interrupted(env, seed, **kwargs):
        if seed == 1:
            raise KeyboardInterrupt
        return demonstrate(env, seed, **kwargs)

    monkeypatch.setattr(record_module, "demonstrate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ensure_recorded(SETTINGS, root, workers=1, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == [".sorting.lock"]


def test_failed_demonstrations_are_not_recorded(tmp_path, monkeypatch):
    def unlucky(env, seed, **kwargs):
        demonstration = demonstrate(env, seed, **kwargs)
        return dataclasses.replace(demonstration, success=seed != 0)

    monkeypatch.setattr(record_module, "demonstrate", unlucky)
    root = record(SETTINGS, tmp_path / "sorting", workers=1, progress=False)
    assert [line["seed"] for line in side_data(root)] == [1, 2]


def test_an_expert_that_keeps_failing_stops_the_recording(tmp_path, monkeypatch):
    def hopeless(env, seed, **kwargs):
        return dataclasses.replace(one, success=False)

    one = demonstration_of(SETTINGS, 0)
    monkeypatch.setattr(record_module, "demonstrate", hopeless)
    with pytest.raises(RuntimeError, match="succeeded in only 0 of 10 episodes of sorting"):
        record(SETTINGS, tmp_path / "sorting", workers=1, progress=False)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("task", "juggling"),
        ("episodes", 0),
        ("seed", -1),
        ("image_size", 33),
        ("image_size", (48, 33)),
        ("image_size", (48, 64, 3)),
        ("renderer", "none"),
        ("action_noise", 0.5),
        ("fps", 30),
    ],
)
def test_impossible_settings_name_key_rule_and_value(key, value):
    with pytest.raises(ValueError, match=f"{key} must .*got {re.escape(repr(value))}"):
        dataclasses.replace(SETTINGS, **{key: value})


def test_depth_needs_rays():
    with pytest.raises(ValueError, match="renderer must be rays with depth=true, got 'egl'"):
        dataclasses.replace(SETTINGS, depth=True, renderer="egl")


def test_no_setting_lets_demonstrations_run_into_evaluation_seeds():
    with pytest.raises(ValueError, match="seed must be in"):
        RecordSettings(task="sorting", episodes=1, seed=EVALUATION_SEED_START // 100_000)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["episode=4"], "task, episodes, root, seed"),
        (["episodes=four"], "episodes='four' cannot be read"),
        (["episodes=1", "episodes=2"], "given twice"),
        (["workers=0"], "workers must be at least 1, got 0"),
        (["task=juggling"], "task must be one of"),
        (["image_size=480*640"], "image_size='480*640' cannot be read: must be a number of pixels, or HEIGHTxWIDTH"),
    ],
)
def test_the_command_refuses_bad_arguments(words, message, capsys, tmp_path):
    assert main([*words, f"root={tmp_path}"]) == 2
    assert message in capsys.readouterr().err
