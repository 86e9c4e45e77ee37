"""Frames and image embeddings are computed once, kept, and never taken for those of other data or weights."""

import errno
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lerobot.configs.video import RGBEncoderConfig
from small_datasets import write_dataset

from benchmarks.data_path import open_written
from benchmarks.video_dataset import write_dataset as write_videos
from kuavo_train.config import DataConfig, RunConfig
from kuavo_train.data.images import frames as frames_module
from kuavo_train.data.images import part, plan
from kuavo_train.data.images.features import CachedFeatures, Encoder
from kuavo_train.data.images.forms import FORMS
from kuavo_train.data.images.frames import CachedFrames, DecodedFrames, fill_frames, frame_cache
from kuavo_train.data.images.part import WHOLE, Shard
from kuavo_train.data.images.plan import Images, plan_images
from kuavo_train.data.task import Task, open_task
from kuavo_train.errors import ConfigError


@pytest.fixture
def config(configs: list[RunConfig], tmp_path: Path) -> DataConfig:
    return replace(configs[0].data, cache_root=str(tmp_path))


@pytest.fixture
def task(configs: list[RunConfig], config: DataConfig) -> Task:
    return open_task(configs[1].stage, config)


@pytest.fixture
def decoded(task: Task) -> DecodedFrames:
    return DecodedFrames(task, image_size=None, video_backend="pyav")


class Counted:
    """An encoder of 4 × 8 embeddings, or a source, that remembers what it was asked."""

    def __init__(self, source: Callable[..., torch.Tensor] | None = None):
        self.source, self.asked, self.fail_at = source, [], -1

    def __call__(self, *about: Any) -> torch.Tensor:
        if len(self.asked) == self.fail_at:
            raise KeyboardInterrupt
        self.asked.append(about)
        if self.source is not None:
            return self.source(*about)
        return about[0].mean(dim=(1, 2, 3))[:, None, None] * torch.linspace(0.1, 1, 32).view(1, 4, 8)


def encoder(embed: Callable[..., torch.Tensor], weights: str = "first", together: int = 14) -> Encoder:
    """As a rule it is shown all frames of an episode at once."""
    key = "features of {}".format
    return Encoder(embed, {"weights": weights}, key, torch.device("cpu"), together)


def planned(
    config: DataConfig,
    decoded: DecodedFrames,
    chosen: Encoder | None,
    episodes: Sequence[int] = (),
    shard: Shard = WHOLE,
) -> Images:
    name = decoded.task.name
    return plan_images(config, {name: decoded}, {name: list(episodes) or [0, 1, 2, 3, 4]}, chosen, shard=shard)


@pytest.mark.parametrize("videos", [True, False], ids=["video", "images"])
def test_cached_frames_are_the_decoded_ones(
    configs: list[RunConfig], config: DataConfig, tmp_path: Path, *, videos: bool
) -> None:
    root = write_dataset(tmp_path / "data", episodes=3, length=70, size=24, videos=videos)
    stage = replace(configs[1].stage, root=str(root))
    task = open_task(stage, replace(config, held_out_episodes=1))
    assert bool(task.recording.video_keys) == videos
    for size in (None, [16, 20]):
        decoded = DecodedFrames(task, image_size=size, video_backend="pyav")
        cache = frame_cache(decoded, config.cache_folder)
        fill_frames(cache, decoded, [0, 2], progress=False)
        cached = CachedFrames(cache)
        rows = np.array([3, 69, 140, 209, 3])
        for camera in task.cameras:
            assert torch.equal(decoded(camera, rows), cached(camera, rows))
            assert cached(camera, rows).shape == (5, 3, *(size or [24, 24]))
            assert cached(camera, rows).dtype == torch.uint8


def test_an_episode_that_was_not_filled_is_not_read(decoded: DecodedFrames, tmp_path: Path) -> None:
    cache = frame_cache(decoded, tmp_path)
    fill_frames(cache, decoded, [1], progress=False)
    cache.read("observation.images.head_cam_h", np.arange(*decoded.task.bounds[1]))
    with pytest.raises(RuntimeError, match="must hold episode 2 before it is read"):
        cache.read("observation.images.head_cam_h", decoded.task.bounds[1:3, 0])


def test_features_are_the_encoders_output_as_bfloat16(config: DataConfig, decoded: DecodedFrames) -> None:
    embed = Counted()
    images = planned(config, decoded, encoder(embed))
    assert isinstance(images.sources["weighing"], CachedFeatures)
    images.fill(progress=False)
    rows = np.array([30, 2, 30, 69])
    for camera in decoded.task.cameras:
        assert images.image_key(camera) == f"features of {camera}"
        expected = embed(decoded(camera, rows).float() / 255).bfloat16()
        assert torch.equal(images.sources["weighing"](camera, rows), expected)


def test_with_a_feature_stride_only_every_nth_frame_of_an_episode_is_embedded_and_read(
    config: DataConfig, decoded: DecodedFrames
) -> None:
    thinned = DecodedFrames(replace(decoded.task, feature_stride=3), image_size=None, video_backend="pyav")
    whole, embed = planned(config, decoded, encoder(Counted())), Counted()
    images = planned(config, thinned, encoder(embed, together=5))
    assert "4 × 8 bfloat16 per camera, of one frame in 3 (data.feature_stride); " in images.description
    cache, of_all = images.embeddings["weighing"], whole.embeddings["weighing"]
    assert (cache.size([0, 1]), of_all.size([0, 1])) == (2 * 5 * cache.row_bytes, 2 * 14 * cache.row_bytes)
    embed.asked.clear()
    for each in (images, whole):
        each.fill(progress=False)
    assert sum(len(pictures) for (pictures,) in embed.asked) == 3 * 5 * 5  # cameras, episodes, frames of 14
    assert cache.missing(range(5)) == []
    rows = np.array([42, 3, 42, 69 - 1, 28])  # frames 0, 3, 0, 12, 0
    for camera in decoded.task.cameras:
        assert torch.equal(images.sources["weighing"](camera, rows), whole.sources["weighing"](camera, rows))
    with pytest.raises(RuntimeError, match="holds one frame in 3 of an episode, got frame 1"):
        cache.read(camera, np.array([42, 43]))


def test_caches_of_another_feature_stride_are_others_and_that_of_every_frame_is_named_as_ever(
    config: DataConfig, decoded: DecodedFrames
) -> None:
    plans = [
        planned(
            config,
            DecodedFrames(replace(decoded.task, feature_stride=n), image_size=None, video_backend="pyav"),
            encoder(Counted()),
        )
        for n in (1, 2, 3)
    ]
    caches = [images.embeddings["weighing"] for images in plans]
    assert len({cache.path for cache in caches}) == 3
    assert caches[0].key == {**decoded.key, "encoder": {"weights": "first"}}


def test_features_of_int8_take_half_the_room_and_are_as_near_as_a_scale_per_token_allows(
    config: DataConfig, decoded: DecodedFrames
) -> None:
    embed, exact = Counted(), planned(config, decoded, encoder(Counted()))
    images = planned(replace(config, feature_dtype="int8"), decoded, encoder(embed))
    assert "4 × 8 int8 with a scale per token per camera" in images.description
    assert images.look == exact.look == 3 * 4 * 8 * 2  # as handed over: bfloat16
    for each in (exact, images):
        each.fill(progress=False)
    assert images.embeddings["weighing"].row_bytes == 3 * 4 * (8 + 4)
    assert images.embeddings["weighing"].path != exact.embeddings["weighing"].path
    rows = np.array([30, 2, 30, 69])
    for camera in decoded.task.cameras:
        given = images.sources["weighing"](camera, rows)
        expected = embed(decoded(camera, rows).float() / 255)
        assert given.dtype == torch.bfloat16
        largest = expected.abs().amax(dim=-1, keepdim=True)
        assert ((given.float() - expected).abs() <= largest * (0.5 / 127 + 2**-8) + 1e-9).all()
        assert torch.equal(exact.sources["weighing"](camera, rows), expected.bfloat16())


def test_a_token_of_zeros_stays_so_and_one_that_is_not_finite_is_not_hidden() -> None:
    embeddings = torch.tensor([[[0.0, 0.0], [float("nan"), 1.0], [1e-30, -1e-30], [3.0, -5.0]]])
    zeros, broken, least, plain = FORMS["int8"].load(FORMS["int8"].store(embeddings)).float()[0]
    assert torch.equal(zeros, torch.zeros(2))
    assert broken.isnan().all()
    assert least == pytest.approx([1e-30, -1e-30], rel=0.01)
    assert plain == pytest.approx([3.0, -5.0], rel=0.01)


def test_a_cut_off_computation_keeps_what_is_done_and_goes_on_with_the_rest(
    config: DataConfig, decoded: DecodedFrames
) -> None:
    embed = Counted()
    images = planned(config, decoded, encoder(embed))
    embed.fail_at = len(embed.asked) + 7  # in the third of five episodes of three cameras
    with pytest.raises(KeyboardInterrupt):
        images.fill(progress=False)
    again = Counted()
    images = planned(config, decoded, encoder(again))
    again.asked.clear()
    images.fill(progress=False)
    assert len(again.asked) == 3 * 3
    whole = planned(replace(config, cache_root=f"{config.cache_root}/whole"), decoded, encoder(Counted()))
    whole.fill(progress=False)
    for camera in decoded.task.cameras:
        rows = np.arange(len(decoded.task.state))
        assert torch.equal(images.sources["weighing"](camera, rows), whole.sources["weighing"](camera, rows))
    again.asked.clear()
    images.fill(progress=False)
    assert again.asked == []


@pytest.mark.parametrize("at_once", [False, True], ids=["in turn", "at once"])
def test_processes_share_the_work_and_fill_one_cache(
    config: DataConfig, decoded: DecodedFrames, *, at_once: bool
) -> None:
    embeds = [Counted(), Counted()]
    plans = [planned(config, decoded, encoder(embed)) for embed in embeds]
    for embed in embeds:
        embed.asked.clear()
    with ThreadPoolExecutor(2 if at_once else 1) as pool:
        list(pool.map(lambda rank: plans[rank].fill(process=rank, processes=2, progress=False), range(2)))
    assert [len(embed.asked) for embed in embeds] == [3 * 3, 2 * 3]  # episodes × cameras
    alone = planned(replace(config, cache_root=f"{config.cache_root}/alone"), decoded, encoder(Counted()))
    alone.fill(progress=False)
    for camera in decoded.task.cameras:
        rows = np.arange(len(decoded.task.state))
        for images in plans:
            assert torch.equal(images.sources["weighing"](camera, rows), alone.sources["weighing"](camera, rows))
    assert [path.name for path in (config.cache_folder / "features").iterdir() if path.name.startswith(".")] == []


def filled_apart(config: DataConfig, decoded: DecodedFrames, shard: str) -> list[Any]:
    """Fill a shard on a machine with a disk of its own, and copy it here; what its encoder was given."""
    apart, embed = replace(config, cache_root=f"{config.cache_root}/{shard.replace('/', '-')}"), Counted()
    images = planned(apart, decoded, encoder(embed), shard=Shard.parse(shard))
    embed.asked.clear()
    images.fill(progress=False)
    shutil.copytree(apart.cache_folder, config.cache_folder, dirs_exist_ok=True)
    return embed.asked


def test_shards_of_machines_that_overlap_or_lack_one_are_read_together_and_the_rest_is_computed(
    config: DataConfig, decoded: DecodedFrames
) -> None:
    done = [len(filled_apart(config, decoded, shard)) for shard in ("1/3", "1/2", "3/3")]  # 0 and 3; 0, 2 and 4; 2
    assert done == [2 * 3, 3 * 3, 1 * 3]
    embed = Counted()
    images = planned(config, decoded, encoder(embed))
    embed.asked.clear()
    images.fill(progress=False)
    assert len(embed.asked) == 3  # episode 1
    alone = planned(replace(config, cache_root=f"{config.cache_root}/alone"), decoded, encoder(Counted()))
    alone.fill(progress=False)
    for camera in decoded.task.cameras:
        rows = np.random.default_rng(0).permutation(len(decoded.task.state))
        assert torch.equal(images.sources["weighing"](camera, rows), alone.sources["weighing"](camera, rows))


def test_a_shard_holds_the_rows_of_its_episodes_alone_and_is_not_computed_twice(
    config: DataConfig, decoded: DecodedFrames
) -> None:
    filled_apart(config, decoded, "2/2")
    (folder,) = (config.cache_folder / "features").iterdir()
    assert folder.name.endswith(".2-of-2")
    assert {np.load(file, mmap_mode="r").shape for file in folder.glob("*.npy")} == {(2 * 14, 4, 8)}
    embed = Counted()
    images = planned(config, decoded, encoder(embed), shard=Shard(2, 2))
    assert "all of shard 2/2 there" in images.description
    embed.asked.clear()
    images.fill(progress=False)
    assert embed.asked == []


def test_a_part_that_was_not_copied_to_its_end_is_named(config: DataConfig, decoded: DecodedFrames) -> None:
    filled_apart(config, decoded, "1/2")
    file = next((config.cache_folder / "features").rglob("*.npy"))
    os.truncate(file, file.stat().st_size - 10)
    with pytest.raises(ConfigError, match=r"features/weighing-.*1-of-2 must be whole, got .*; copy it again"):
        planned(config, decoded, encoder(Counted()))


@pytest.mark.parametrize("text", ["0/2", "3/2", "2", "1/0", "a/b"])
def test_a_shard_is_one_of_so_many(text: str) -> None:
    with pytest.raises(ConfigError, match="shard must be i/n with 1 <= i <= n, such as 2/8"):
        Shard.parse(text)


def test_only_episodes_that_are_read_are_computed(config: DataConfig, decoded: DecodedFrames) -> None:
    few, all_of_them = Counted(), Counted()
    planned(config, decoded, encoder(few), episodes=[3]).fill(progress=False)
    planned(config, decoded, encoder(all_of_them)).fill(progress=False)
    shapes = 3  # each plan asks every camera once for the shape
    assert (len(few.asked) - shapes, len(all_of_them.asked) - shapes) == (3, 12)


def test_other_weights_are_another_cache_and_the_old_one_is_named_with_its_size(
    config: DataConfig, decoded: DecodedFrames
) -> None:
    first = planned(config, decoded, encoder(Counted()))
    first.fill(progress=False)
    assert "to be deleted" not in first.description
    changed = Counted()
    second = planned(config, decoded, encoder(changed, "second"))
    changed.asked.clear()
    second.fill(progress=False)
    assert len(changed.asked) == 15
    (old,) = (source.cache.path for source in first.sources.values())
    assert old.is_dir()
    assert "of other weights or settings, to be deleted if no other run needs them" in second.description
    assert f"(python -m kuavo_train.cache prune=list): {old.name}" in second.description


def test_whatever_decides_a_picture_is_in_the_key(task: Task, datasets: Path) -> None:
    def key(task: Task = task, image_size: Sequence[int] | None = None, video_backend: str = "pyav") -> dict[str, Any]:
        return DecodedFrames(task, image_size=image_size, video_backend=video_backend).key

    head, left, right = task.cameras
    others = [
        key(image_size=[16, 16]),
        key(video_backend="torchcodec"),
        key(replace(task, cameras={head: right, left: left, right: head})),
        key(replace(task, recording=replace(task.recording, root=datasets / "placement"))),
    ]
    assert all(other != key() for other in others)
    assert key(replace(task, name="renamed")) == key()


def test_frames_that_are_cached_already_are_not_decoded_again(
    config: DataConfig, decoded: DecodedFrames, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = planned(config, decoded, None)
    frames.fill(progress=False)
    asked: list[Any] = []
    monkeypatch.setattr(frames_module, "decode_video_frames", lambda *given, **_: asked.append(given))
    planned(config, decoded, encoder(Counted())).fill(progress=False)
    assert asked == []


def test_features_fill_without_a_frame_cache(config: DataConfig, decoded: DecodedFrames) -> None:
    planned(config, decoded, encoder(Counted())).fill(progress=False)
    assert not (config.cache_folder / "frames").exists()


RULES: list[tuple[dict[str, Any], bool, type, str]] = [  # config, encoder frozen?, source, told
    ({}, True, CachedFeatures, "embeddings by the frozen encoder, 4 × 8 bfloat16 per camera; 13.1 KiB in"),
    ({}, False, CachedFrames, "frames (no embeddings: the image encoder is trained); 0.6 MiB in"),
    ({"augmentation": object()}, True, CachedFrames, "no embeddings: data.augmentation changes the pictures"),
    ({"feature_cache": False}, True, CachedFrames, "no embeddings: data.feature_cache=false"),
    (
        {"feature_cache_limit_gib": 1e-6},
        True,
        CachedFrames,
        "no embeddings: they would take 13.1 KiB, over data.feature_cache_limit_gib=1e-06",
    ),
    ({"frame_cache": False}, True, CachedFeatures, "embeddings by the frozen encoder"),
    ({"frame_cache": False}, False, DecodedFrames, "decoded anew for every batch, data.frame_cache=false"),
]


@pytest.mark.parametrize(("changes", "frozen", "source", "description"), RULES)
def test_what_images_come_from_follows_a_rule_and_is_told(
    config: DataConfig, decoded: DecodedFrames, changes: dict[str, Any], source: type, description: str, *, frozen: bool
) -> None:
    images = planned(replace(config, **changes), decoded, encoder(Counted()) if frozen else None)
    assert isinstance(images.sources["weighing"], source)
    assert description in images.description
    assert list(config.cache_folder.iterdir()) == []  # nothing is written before it has been told


@pytest.mark.parametrize(("frozen", "key"), [(True, "feature_cache"), (False, "frame_cache")])
def test_a_disk_that_cannot_hold_it_is_a_problem_before_anything_is_computed(
    config: DataConfig, decoded: DecodedFrames, monkeypatch: pytest.MonkeyPatch, key: str, *, frozen: bool
) -> None:
    chosen = encoder(Counted()) if frozen else None
    assert planned(config, decoded, chosen).problems == []
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda _: SimpleNamespace(free=2000))
    (problem,) = planned(config, decoded, chosen).problems
    assert problem.startswith(f"data.{key} needs ")
    assert f"set data.cache_root to another disk, or data.{key}=false" in problem
    monkeypatch.undo()
    planned(config, decoded, chosen).fill(progress=False)
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    assert planned(config, decoded, chosen).problems == []  # all there: nothing more is needed


def test_a_disk_that_fills_up_is_an_error_with_words_and_loses_nothing(
    config: DataConfig, decoded: DecodedFrames, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes = []

    def full(descriptor: int) -> None:
        writes.append(descriptor)
        if len(writes) > 6:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    images = planned(config, decoded, encoder(Counted()))
    monkeypatch.setattr(part.os, "fsync", full)
    with pytest.raises(ConfigError, match=r"data.cache_root must be a folder that can be written.*No space left"):
        images.fill(progress=False)
    monkeypatch.undo()
    again = Counted()
    images = planned(config, decoded, encoder(again))
    again.asked.clear()
    images.fill(progress=False)
    assert len(again.asked) == 4 * 3


def test_a_folder_that_cannot_be_made_is_an_error_with_words(config: DataConfig, decoded: DecodedFrames) -> None:
    (Path(str(config.cache_root)) / "file").touch()
    with pytest.raises(ConfigError, match=r"data.cache_root must be a folder that can be written, got .*/file/frames"):
        planned(replace(config, cache_root=f"{config.cache_root}/file"), decoded, None).fill(progress=False)


def test_a_video_that_does_not_decode_is_named(configs: list[RunConfig], config: DataConfig, tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "data", episodes=2)
    stage = replace(configs[1].stage, root=str(root))
    task = open_task(stage, replace(config, held_out_episodes=1))
    decoded = DecodedFrames(task, image_size=None, video_backend="pyav")
    assert decoded.shapes
    video = next(root.rglob("*.mp4"))
    video.write_bytes(b"no video")
    with pytest.raises(
        ConfigError, match=r"weighing: video .* must decode, got an error at frame \d+ of episode \d.*; copy the file"
    ):
        planned(config, decoded, None, episodes=[0, 1]).fill(progress=False)


@pytest.mark.parametrize(("keyframes", "pieces"), [(2, [1, 2, 1]), (50, [4])])
def test_frames_far_apart_are_sought_and_not_decoded_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keyframes: int, pieces: list[int]
) -> None:
    encoder = RGBEncoderConfig(vcodec="h264", g=keyframes)
    task = open_written(write_videos(tmp_path, height=32, width=32, episodes=2, frames=40, encoder=encoder))
    decoded, (camera, *_) = DecodedFrames(task, image_size=None, video_backend="pyav"), task.cameras
    whole = decoded(camera, np.arange(80))
    decoded_at_once: list[int] = []
    decode = frames_module.decode_video_frames

    def counted(path: Path, times: list[float], *rest: Any, **named: Any) -> torch.Tensor:
        decoded_at_once.append(len(times))
        return decode(path, times, *rest, **named)

    monkeypatch.setattr(frames_module, "decode_video_frames", counted)
    rows = np.array([39, 18, 3, 20])
    assert torch.equal(decoded(camera, rows), whole[rows])
    assert decoded_at_once == pieces


@pytest.mark.parametrize("stated", [None, "auto", 0, -1])
def test_a_dataset_that_states_no_number_of_frames_between_keyframes_decodes_all_the_same(
    task: Task, stated: object
) -> None:
    decoded, (camera, *_) = DecodedFrames(task, image_size=None, video_backend="pyav"), task.cameras
    rows = np.arange(*task.bounds[0])
    expected = decoded(camera, rows)
    task.recording.features[task.cameras[camera]].setdefault("info", {})["video.g"] = stated
    assert torch.equal(decoded(camera, rows), expected)
    assert len(decoded._pieces(task.cameras[camera], rows[[0, -1]])) == 1
