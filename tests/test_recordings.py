"""Datasets as they are found: files missing or damaged, episodes that are not theirs, and never a word to the hub."""

import json
import shutil
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets as hf_datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants
from small_datasets import write_dataset

from kuavo_train.config import RunConfig
from kuavo_train.data.images.frames import DecodedFrames
from kuavo_train.data.recordings.checks import check_rows, check_segments, claw_factor, little_used
from kuavo_train.data.recordings.recording import open_recording
from kuavo_train.data.task import Task, open_task
from kuavo_train.errors import ConfigError

Opened = Callable[..., Task]
HEAD, LEFT = "observation.images.head_cam_h", "observation.images.wrist_cam_l"
EPISODES, DATA = "meta/episodes/chunk-000/file-000.parquet", "data/chunk-000/file-000.parquet"


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's library would ask it, and whatever asks fails the test with what no `except Exception` takes."""

    def asked(*address: object, **_: object) -> None:
        pytest.fail(f"asked the network for {address}")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, asked)
    monkeypatch.setattr(socket.socket, "connect", asked)


@pytest.fixture
def root(configs: list[RunConfig], tmp_path: Path) -> Path:
    """A dataset of five episodes of 14 frames, to spoil."""
    return shutil.copytree(configs[0].stage.root, tmp_path / "moving_grasp")


@pytest.fixture
def opened(configs: list[RunConfig], root: Path) -> Opened:
    def open_it(**stage: Any) -> Task:
        return open_task(replace(configs[0].stage, root=str(root), **stage), configs[0].data)

    return open_it


def edit_table(path: Path, change: Callable[[pd.DataFrame], Any]) -> None:
    table = pd.read_parquet(path)
    table.pipe(change)
    table.to_parquet(path)


def edit_info(root: Path, **changes: Any) -> None:
    path = root / "meta" / "info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    "file", ["meta/info.json", "meta/tasks.parquet", EPISODES, DATA, f"videos/{LEFT}/chunk-000/file-000.mp4"]
)
def test_a_file_that_is_missing_is_named(opened: Opened, root: Path, file: str) -> None:
    (root / file).unlink()
    with pytest.raises(ConfigError, match=f"{file}; copy what is missing|does not exist; record it"):
        opened()


@pytest.mark.parametrize("file", ["meta/tasks.parquet", EPISODES, DATA])
def test_a_table_that_was_cut_off_is_named(opened: Opened, root: Path, file: str) -> None:
    (root / file).write_bytes((root / file).read_bytes()[:-50])
    with pytest.raises(ConfigError, match=f"{file} must .*, got .*; copy the file again"):
        opened()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fps": None}, r"info.json must give fps, the frames per second, as a number above 0, got None"),
        ({"fps": "10"}, r"must give fps, .* got '10'"),
        ({"features": None}, r"info.json must hold the dataset's features, got"),
        ({"features": {"action": None}}, r"info.json must hold the dataset's features, got"),
        ({"features": {HEAD: {"dtype": "video"}}}, r"got .*head_cam_h: shape None, not \[height, width, channels\]"),
        ({"data_path": "data/{episode_chunk}.parquet"}, r"must give data_path with chunk_index, file_index and"),
        ({"total_episodes": 7}, r"each of the 7 episodes that meta/info.json counts once, got episodes 5, 6 not"),
    ],
)
def test_an_info_that_says_the_impossible_is_refused(
    configs: list[RunConfig], opened: Opened, root: Path, changes: dict[str, Any], message: str
) -> None:
    edit_info(root, **changes)
    with pytest.raises(ConfigError, match=message):
        open_task(replace(configs[0].stage, root=str(root)), replace(configs[0].data, cameras=[HEAD]))
    (root / "meta" / "info.json").write_text('{"fps": 1')
    with pytest.raises(
        ConfigError, match=r"a meta/info.json that can be read, got JSONDecodeError.*; copy the file again"
    ):
        opened()


def test_videos_of_cameras_and_episodes_that_are_not_used_may_be_missing(
    configs: list[RunConfig], opened: Opened, root: Path
) -> None:
    shutil.rmtree(root / "videos" / LEFT)
    depth = {"dtype": "video", "shape": [48, 64, 1], "names": None, "info": {"is_depth_map": True, "video.codec": "?"}}
    features = json.loads((root / "meta" / "info.json").read_text())["features"]
    edit_info(root, features={**features, "observation.depth_h": depth, "observation.depth_l": {"dtype": "uint16"}})
    with pytest.raises(ConfigError, match=f"lacks videos/{LEFT}"):
        opened()
    stage = replace(configs[0].stage, root=str(root))
    data = replace(configs[0].data, cameras=[HEAD])
    task = open_task(stage, data)
    assert task.unused == (LEFT, "observation.images.wrist_cam_r", "observation.depth_h", "observation.depth_l")
    assert DecodedFrames(task, image_size=None, video_backend="pyav").checked_shapes() == {HEAD: (3, 32, 32)}
    segment(HEAD, 4, 0, 1.4)(root)
    put(EPISODES, {(4, f"videos/{HEAD}/file_index"): 1})(root)  # which is not there
    with pytest.raises(ConfigError, match=f"lacks videos/{HEAD}/chunk-000/file-001.mp4"):
        open_task(stage, data)
    assert open_task(replace(stage, episodes=[0, 3]), data).recording.lengths.tolist() == [14] * 5


@pytest.mark.parametrize("videos", [True, False], ids=["video", "images"])
def test_a_depth_map_among_the_cameras_is_refused_and_left_out_it_hinders_nothing(
    configs: list[RunConfig], tmp_path: Path, *, videos: bool
) -> None:
    root = write_dataset(tmp_path / "moving_grasp", episodes=3, length=4, videos=videos, depth_camera=True)
    stage, data = replace(configs[0].stage, root=str(root)), replace(configs[0].data, held_out_episodes=1)
    bits = r", more than 8 bits \(gray12le\)" if videos else ""
    for key, reason in (
        ("observation.images.depth_h", rf"a depth map, shape \[32, 32, 1\]{bits}"),
        ("action", "numbers of dtype float32"),
    ):
        said = rf"stage 1 .*dataset {root}: cameras must be 8-bit pictures .*, got {key}: {reason}; leave it"
        with pytest.raises(ConfigError, match=said):
            open_task(stage, replace(data, cameras=[*data.cameras, key]))
    task = open_task(stage, data)
    assert task.unused == ("observation.images.depth_h",)
    shapes = DecodedFrames(task, image_size=None, video_backend="pyav").checked_shapes()
    assert shapes == dict.fromkeys(data.cameras, (3, 32, 32))


def test_depth_in_pictures_that_are_said_to_have_three_channels_is_refused_when_it_is_read(
    configs: list[RunConfig], tmp_path: Path
) -> None:
    root = write_dataset(tmp_path / "moving_grasp", episodes=3, length=4, videos=False, depth_camera=True)
    features = json.loads((root / "meta" / "info.json").read_text())["features"]
    features["observation.images.depth_h"] |= {"shape": [32, 32, 3], "info": None}
    edit_info(root, features=features)
    data = replace(configs[0].data, held_out_episodes=1, cameras=["observation.images.depth_h"])
    task = open_task(replace(configs[0].stage, root=str(root)), data)
    with pytest.raises(
        ConfigError, match=r"depth_h in .* must have 8 bits, got I;16 at frame 0 of episode 0; leave it"
    ):
        DecodedFrames(task, image_size=None, video_backend="pyav").checked_shapes()


def test_wrist_cameras_of_another_rate_than_the_dataset_are_named_together_and_may_be_left_out(
    configs: list[RunConfig], tmp_path: Path
) -> None:
    root, faster = (
        write_dataset(tmp_path / name, episodes=3, length=4, fps=fps)
        for name, fps in (("moving_grasp", 10), ("faster", 15))
    )
    wrists = ["observation.images.wrist_cam_l", "observation.images.wrist_cam_r"]
    features, others = (
        json.loads((folder / "meta" / "info.json").read_text())["features"] for folder in (root, faster)
    )
    for wrist in wrists:
        shutil.copytree(faster / "videos" / wrist, root / "videos" / wrist, dirs_exist_ok=True)
    edit_info(root, features={**features, **{wrist: others[wrist] for wrist in wrists}})
    stage, data = replace(configs[0].stage, root=str(root)), replace(configs[0].data, held_out_episodes=1)
    said = (
        rf"dataset {root}: cameras .* at the dataset's 10 fps, .*got {wrists[0]}: 15 fps; {wrists[1]}: 15 fps; "
        r"leave them out of data.cameras, or convert the recording again, .* every camera at 10 fps"
    )
    with pytest.raises(ConfigError, match=said):
        open_task(stage, data)
    task = open_task(stage, replace(data, cameras=[HEAD]))
    assert task.unused == tuple(wrists)
    assert DecodedFrames(task, image_size=None, video_backend="pyav").checked_shapes() == {HEAD: (3, 32, 32)}


def test_nothing_is_copied_when_pictures_are_stored_in_the_tables(
    configs: list[RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_dataset(tmp_path / "moving_grasp", episodes=3, length=5, videos=False)
    monkeypatch.setattr(hf_datasets.config, "HF_DATASETS_CACHE", tmp_path / "home")
    task = open_task(replace(configs[0].stage, root=str(root)), replace(configs[0].data, held_out_episodes=1))
    frames = DecodedFrames(task, image_size=None, video_backend="pyav")
    pictures = frames(HEAD, np.array([14, 0, 7]))
    single = [frames(HEAD, np.array([row]))[0] for row in (14, 0, 7)]
    assert all((one == other).all() for one, other in zip(pictures, single, strict=True))
    assert len({int(picture[0, 0, 0]) for picture in pictures}) == 3
    assert not (tmp_path / "home").exists()


# ----------------------------------------------------------------------------------- episodes, their rows and segments


def put(file: str, cells: dict[tuple[int, str], float]) -> Callable[[Path], None]:
    """Write values at (row, column) of a table."""

    def change(table: pd.DataFrame) -> None:
        for (row, column), value in cells.items():
            table.loc[row, column] = value

    return lambda root: edit_table(root / file, change)


def segment(key: str, episode: int, start: float, end: float) -> Callable[[Path], None]:
    times = {"from": start, "to": end}
    return put(EPISODES, {(episode, f"videos/{key}/{which}_timestamp"): time for which, time in times.items()})


def shift(root: Path) -> None:
    edit_table(root / EPISODES, lambda table: table.__setitem__("dataset_from_index", table["dataset_from_index"] + 5))


SPOILT: list[tuple[str, Callable[[Path], None], str]] = [
    (
        "the segment of another episode",
        segment(LEFT, 1, 2.8, 4.2),
        r"segment in observation.images.wrist_cam_l of episode 1 must be its own, got 2.80 to 4.20 s of videos/.*mp4 "
        r"\(from_timestamp, to_timestamp\), where that of episode 2 is",
    ),
    (
        "a segment that is too long",
        segment(HEAD, 3, 4.2, 5.8),
        r"segment in .*head_cam_h of episode 3 must be as long as its 14 frames, 1.40 s, got 4.20 to 5.80 s",
    ),
    ("a segment without an end", segment(HEAD, 3, 4.2, np.nan), r"of episode 3 must be as long as its 14 frames"),
    (
        "a segment beyond the file",
        segment(HEAD, 4, 6.6, 8),
        r"segment in .*head_cam_h of episode 4 must lie in its file, of 7.00 s, got 6.60 to 8.00 s",
    ),
    (
        "all rows shifted",
        shift,
        r"rows of episode 0 must begin at 0, got 5 \(dataset_from_index\) \(and episodes 1, 2, 3, 4\); record",
    ),
    (
        "a length that is not that of the rows",
        put(EPISODES, {(2, "length"): 13}),
        r"rows of episode 2 must be as many as its 13 frames, got 28 to 42 \(dataset_to_index\)",
    ),
    ("an episode twice", put(EPISODES, {(2, "episode_index"): 1}), r"got episode 1 twice; episode 2 not at all"),
    (
        "a row of another episode",
        put(DATA, {(20, "episode_index"): 3}),
        r"rows of episode 1 must have episode_index 1 at row 20, got 3",
    ),
    (
        "a frame twice",
        put(DATA, {(20, "frame_index"): 5}),
        r"rows of episode 1 must have frame_index 6 at row 20, got 5",
    ),
    ("rows out of order", put(DATA, {(20, "index"): 21}), r"rows of episode 1 must have index 20 at row 20, got 21"),
    (
        "rows that are missing",
        lambda root: pq.write_table(pq.read_table(root / DATA).slice(0, 65), root / DATA),
        r"rows of all tables must be the 70 of meta/episodes, got 65",
    ),
]


@pytest.mark.parametrize(("what", "spoil", "message"), SPOILT, ids=[what for what, *_ in SPOILT])
def test_episodes_whose_rows_or_pictures_are_not_theirs_are_named(
    opened: Opened, root: Path, what: str, spoil: Callable[[Path], None], message: str
) -> None:
    spoil(root)
    with pytest.raises(ConfigError, match=message):
        opened()


def test_what_is_wrong_with_segments_of_episodes_that_are_not_used_does_not_matter(opened: Opened, root: Path) -> None:
    segment(LEFT, 0, 1.4, 2.8)(root)
    with pytest.raises(ConfigError, match=r"wrist_cam_l of episode 1 must be its own"):
        opened(episodes=[1, 4])  # 0 or 1, one of them has the other's
    assert opened(episodes=[2, 4]).held_out_episodes


def test_segments_in_another_order_than_the_episodes_are_told(opened: Opened, root: Path) -> None:
    segment(LEFT, 1, 2.8, 4.2)(root)
    segment(LEFT, 2, 1.4, 2.8)(root)
    (note,) = opened().notes
    assert "wrist_cam_l/chunk-000/file-000.mp4 the pictures of episode 2 lie before those of episode 1, as" in note


def test_two_thousand_episodes_are_looked_at_at_once(root: Path, opened: Opened) -> None:
    """By columns: a loop that read the dataset's rows one by one would take a minute."""
    one = open_recording(root, "dataset")
    count, length = 2000, 300
    starts = np.arange(count) * length
    episodes = {
        "length": np.full(count, length),
        "dataset_from_index": starts,
        "dataset_to_index": starts + length,
        **{f"videos/{HEAD}/{place}_index": np.zeros(count, np.int64) for place in ("chunk", "file")},
        f"videos/{HEAD}/from_timestamp": starts / 10,
        f"videos/{HEAD}/to_timestamp": (starts + length) / 10,
    }
    many = replace(one, episodes=episodes)
    rows = np.arange(count * length)
    columns = {"index": rows, "episode_index": rows // length, "frame_index": rows % length}
    check_rows(many, columns, "dataset")
    with pytest.raises(ConfigError, match=r"of episode 1 must lie in its file, of 7.00 s, got .* \(and episodes 2, 3"):
        check_segments(many, HEAD, range(1, count), "dataset")


def test_timestamps_that_are_not_even_are_told_and_do_not_matter(opened: Opened, root: Path) -> None:
    assert opened().notes == ()
    put(DATA, {(21, "timestamp"): 0.6})(root)
    assert (
        opened()
        .notes[0]
        .startswith(
            "timestamps of episode 1 are not frame_index / fps (frame 7 at 0.60 s, expected 0.70 s): frames are taken"
        )
    )


# ------------------------------------------------------------------------------------------------------------ values


def test_a_column_that_the_tables_lost_is_told_from_one_that_never_was(opened: Opened, root: Path) -> None:
    edit_table(root / DATA, lambda table: table.drop(columns="action", inplace=True))
    with pytest.raises(ConfigError, match=r"must have the column action, which meta/info.json lists, .*; copy"):
        opened()


def test_a_clock_that_stands_still_is_refused_by_episode_and_frame(opened: Opened, root: Path) -> None:
    edit_table(root / DATA, lambda table: table.update({"timestamp": np.zeros(len(table), np.float32)}))
    with pytest.raises(
        ConfigError, match=r"timestamps of episode 0 must span the 1.30 s from its frame 0 to frame 13, got 0 and"
    ):
        opened()


def test_a_clock_may_be_slow_by_a_half_but_must_tell_numbers(opened: Opened, root: Path) -> None:
    edit_table(root / DATA, lambda table: table.update(table[["timestamp"]] * 1.2))
    assert opened().notes[0].startswith("timestamps of episodes 0, 1, 2, 3, 4 are not frame_index / fps")
    edit_table(root / DATA, lambda table: table.update(table[["timestamp"]] * 1.4))
    with pytest.raises(ConfigError, match=r"timestamps of episode 0 must span .*, got 0 and 2.184 s \(and episodes"):
        opened()
    edit_table(root / DATA, lambda table: table.update(table[["timestamp"]] / 1.68))
    put(DATA, {(27, "timestamp"): float("nan")})(root)
    with pytest.raises(ConfigError, match=r"timestamps of episode 1 must span .*, got 0 and nan s;"):
        opened()
    assert opened(episodes=[2, 4]).notes == ()  # the clock of an episode that is not used tells nothing


def test_rows_of_a_task_that_the_table_lacks_are_told_to_be_wrong(opened: Opened, root: Path) -> None:
    put(DATA, {(row, "task_index"): 7 for row in range(14, 28)})(root)
    (note,) = opened().notes
    assert note.startswith(
        "rows of episode 1 have the task_index 7, which meta/tasks.parquet does not have (0); correct"
    )
    with pytest.raises(ConfigError, match=r"rows of episode 1 have the task_index 7, .*; correct the rows"):
        opened(instruction="dataset")


def test_columns_are_read_whatever_they_are_stored_as(opened: Opened, root: Path) -> None:
    before = opened()
    table = pq.read_table(root / DATA)
    state = np.stack(table["observation.state"].to_pylist()).astype(np.float64)
    kinds: list[pa.Array] = [
        pa.array(state[:, None].tolist(), pa.list_(pa.list_(pa.float64()))),  # [N, 1, 16]
        pa.array(state.tolist(), pa.large_list(pa.float64())),
        pa.FixedSizeListArray.from_arrays(pa.array(state.ravel()), 16),
    ]
    place = table.column_names.index("observation.state")
    for kind in kinds:
        pq.write_table(table.set_column(place, "observation.state", kind), root / DATA)
        assert np.array_equal(opened().state, before.state)
    uneven = pa.array([row[: 15 if number == 20 else 16] for number, row in enumerate(state.tolist())])
    pq.write_table(table.set_column(place, "observation.state", uneven), root / DATA)
    with pytest.raises(ConfigError, match=r"observation.state in .* must have as many values in every row, got "):
        opened()


def test_a_dataset_in_several_tables_is_one(configs: list[RunConfig], opened: Opened, root: Path) -> None:
    before, table = opened(), pq.read_table(root / DATA)
    pq.write_table(table.slice(0, 28), root / DATA)
    pq.write_table(table.slice(28), root / "data" / "chunk-000" / "file-001.parquet")
    edit_table(root / EPISODES, lambda t: t.__setitem__("data/file_index", [0, 0, 1, 1, 1]))
    assert np.array_equal(opened().action, before.action)
    (root / "data" / "chunk-000" / "file-001.parquet").unlink()
    with pytest.raises(ConfigError, match=r"lacks data/chunk-000/file-001.parquet; copy what is missing"):
        opened()


@pytest.mark.parametrize(
    ("least", "most", "factor"),
    [
        (0, 2, 0.5),
        (0, 1.93, 0.5),
        (0, 100, 0.01),
        (20, 93, 0.01),
        (0, 140, 1 / 140),
        (0, 131, 1 / 140),
        (0, 250, 1 / 255),
        (0, 57, 1 / 57),
        (-100, 0, -0.01),
        (-1, 1, None),
    ],
)
def test_the_factor_named_for_claws_is_one_that_fits_them(least: float, most: float, factor: float | None) -> None:
    assert claw_factor(least, most, (0.0, 1.0)) == (None if factor is None else pytest.approx(factor))


def test_a_claw_or_an_arm_that_hardly_moves_is_told() -> None:
    names = ["zarm_l1_link", "zarm_l2_link", "zarm_r1_link", "left_claw", "right_claw"]
    values = np.linspace(0, 1, 11)[:, None] * [0.02, 1.5, 0.01, 0.08, 0.5]
    assert little_used("action", names, values, (0.0, 1.0)) == [
        "action of left_claw uses 8.0% of [0.0, 1.0]; is its scale right?",
        "action of the right_arm moves by 0.01 rad at most; is its unit right?",
    ]
    assert len(little_used("action", names, values, None)) == 1
    assert little_used("state", names, values, (0.0, 1.0), resting=["left_claw", "zarm_r1_link"]) == []
    assert little_used("action", names, values * 0, (0.0, 1.0)) == []  # which is told in other words
