"""Embeddings that are computed while training goes on: right at any moment, and never computed twice."""

import errno
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kuavo_train.config import AugmentationConfig, DataConfig, RunConfig
from kuavo_train.data.batch import Batch
from kuavo_train.data.dataset import MixedDataset
from kuavo_train.data.images import part
from kuavo_train.data.images.features import Encoder
from kuavo_train.data.images.forms import FORMS
from kuavo_train.data.images.frames import DecodedFrames
from kuavo_train.data.images.part import FILLED_ROWS, Part
from kuavo_train.data.images.plan import Images, plan_images
from kuavo_train.data.normalization import Normalization, fit_normalization
from kuavo_train.data.sampler import Draw
from kuavo_train.data.task import Task, open_task
from kuavo_train.errors import ConfigError

TRAINED, HELD_OUT = [0, 1, 2], [3, 4]
CAMERAS = 3


@pytest.fixture(params=["bfloat16", "int8"])
def config(configs: list[RunConfig], tmp_path: Path, request: pytest.FixtureRequest) -> DataConfig:
    return replace(configs[0].data, cache_root=str(tmp_path), feature_fill="along", feature_dtype=request.param)


@pytest.fixture
def tasks(configs: list[RunConfig], config: DataConfig) -> list[Task]:
    return [open_task(configs[place].stage, config) for place in (0, 1)]


@pytest.fixture
def normalization(tasks: list[Task]) -> Normalization:
    return fit_normalization(tasks, "joint")


@dataclass
class Stage:
    """Of two tasks. `shown` is how many pictures, but for blank ones, its encoder was shown, call by call."""

    images: Images
    dataset: MixedDataset
    shown: list[int]

    @property
    def path(self) -> Path:
        """Of the first task's cache."""
        return self.images.caches[0].path


@pytest.fixture
def stage(config: DataConfig, tasks: list[Task], normalization: Normalization) -> Any:
    def begun(**changes: Any) -> Stage:
        shown: list[int] = []

        def embed(pictures: torch.Tensor) -> torch.Tensor:
            assert len(pictures) == 4
            shown.append(int(pictures.flatten(1).any(dim=1).sum()))
            return pictures.mean(dim=(1, 2, 3))[:, None, None] * torch.linspace(0.1, 1, 32).view(1, 4, 8)

        encoder = Encoder(embed, {}, "features of {}".format, torch.device("cpu"), together=4)
        decoded = {task.name: DecodedFrames(task, image_size=None, video_backend="pyav") for task in tasks}
        read, trained = ({name: list(of) for name in decoded} for of in ([*TRAINED, *HELD_OUT], TRAINED))
        images = plan_images(replace(config, **changes), decoded, read, encoder, trained=trained)
        images.fill(progress=False)
        sources = [images.sources[task.name] for task in tasks]
        how = {"image_key": images.image_key, "complete": images.complete}
        return Stage(images, MixedDataset(tasks, sources, normalization, actions=range(6), **how), shown)

    return begun


@pytest.fixture
def filled(stage: Any, tmp_path: Path) -> Stage:
    """With all embeddings, of before training."""
    return stage(feature_fill="before", cache_root=str(tmp_path / "before"))


DRAWS = [Draw(0, 3), Draw(1, 20), Draw(0, 41), Draw(0, 3), Draw(1, 0), Draw(0, 60)]  # the last one is held out


def assert_equal(one: Batch, other: Batch) -> None:
    assert one.inputs.keys() == other.inputs.keys()
    for key, value in one.inputs.items():
        assert torch.equal(value, other.inputs[key]), key
    assert one.lacking is None is other.lacking


def test_a_batch_is_what_it_would_be_with_all_embeddings_there_when_first_seen_and_later(
    stage: Any, filled: Stage
) -> None:
    along = stage()
    along.shown.clear()
    expected = filled.dataset.fetch(DRAWS)
    assert_equal(along.dataset.fetch(DRAWS), expected)
    assert sum(along.shown) == CAMERAS * 5
    along.images.wait()
    along.shown.clear()
    assert_equal(along.dataset.fetch(DRAWS), expected)
    assert along.shown == []


def test_a_batch_may_have_some_embeddings_and_lack_others_and_a_row_reads_alike_among_any(
    stage: Any, filled: Stage
) -> None:
    along = stage()
    along.dataset.fetch(DRAWS[:2])
    along.images.wait()
    along.shown.clear()
    assert_equal(along.dataset.fetch(DRAWS[::-1]), filled.dataset.fetch(DRAWS[::-1]))
    assert sum(along.shown) == CAMERAS * 2  # rows 41 and 0: the others are there, or held out


def test_held_out_frames_are_embedded_before_training_and_others_left_to_its_steps(stage: Any) -> None:
    along = stage()
    assert sum(along.shown) == 2 * CAMERAS * len(HELD_OUT) * 14
    along.shown.clear()
    held_out = along.dataset.tasks[0].rows_of(HELD_OUT)
    along.dataset.fetch([Draw(place, row) for place in (0, 1) for row in held_out.tolist()])
    assert along.shown == []


def test_what_is_computed_now_and_what_along_is_said_before(stage: Any) -> None:
    along = stage()
    size = 4 * (16 if along.images.caches[0].dtype == np.uint16 else 12)
    now, later = (f"{2 * CAMERAS * len(of) * 14 * size / 1024:.1f} KiB" for of in (HELD_OUT, TRAINED))
    said = f"{now} of it to be computed now, {later} in the steps that first need it (data.feature_fill=along)"
    assert said in along.images.description
    assert f"0 bytes of it to be computed now, {later} in the steps" in stage().images.description
    along.dataset.fetch([Draw(place, row) for place in (0, 1) for row in range(42)])
    along.images.wait()
    assert "all of it there" in stage().images.description


def test_another_run_finds_what_was_stored_along_whether_it_fills_along_or_before(stage: Any) -> None:
    along = stage()
    along.dataset.fetch([Draw(0, row) for row in range(14 + 3)])
    along.images.wait()
    again = stage()
    again.shown.clear()
    again.dataset.fetch(DRAWS)
    assert sum(again.shown) == CAMERAS * 3
    again.images.wait()
    before = stage(feature_fill="before")
    assert sum(before.shown) == CAMERAS * (2 + 3) * 14  # the episodes of which a row was lacking


def test_a_cache_of_whole_episodes_is_gone_on_with(stage: Any, filled: Stage, tmp_path: Path) -> None:
    assert not (filled.path / FILLED_ROWS).exists()
    along = stage(cache_root=str(tmp_path / "before"))
    assert_equal(along.dataset.fetch(DRAWS), filled.dataset.fetch(DRAWS))
    assert sum(along.shown) == 0


def test_a_kill_between_writing_and_marking_leaves_a_cache_that_is_right(
    stage: Any, filled: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    along, write, written = stage(), Part._write_at, []

    def killed(self: Part, name: str, pieces: Any) -> None:
        written.append(name)
        if name == FILLED_ROWS:
            raise KeyboardInterrupt
        broken = [
            (offset, b"\xff" * memoryview(content).nbytes) for offset, content in pieces
        ]  # half of it came through
        write(self, name, broken)

    with monkeypatch.context() as patch:
        patch.setattr(Part, "_write_at", killed)
        along.dataset.fetch(DRAWS)
        with pytest.raises(KeyboardInterrupt):
            along.images.wait()
    assert [name == FILLED_ROWS for name in written] == [False] * CAMERAS + [True]
    after = stage()
    after.shown.clear()
    assert_equal(after.dataset.fetch(DRAWS), filled.dataset.fetch(DRAWS))
    assert sum(after.shown) == CAMERAS * 5
    after.images.wait()
    assert_equal(stage().dataset.fetch(DRAWS), filled.dataset.fetch(DRAWS))


def test_processes_store_and_mark_other_rows_of_the_same_files_at_the_same_time(stage: Any, filled: Stage) -> None:
    stages, rows = [stage(), stage()], np.random.default_rng(0).permutation(42).tolist()

    def train(number: int) -> None:
        for first in range(number, 42, 6):
            stages[number % 2].dataset.fetch([Draw(0, row) for row in rows[first : first + 6 : 2]])
        stages[number % 2].images.wait()

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(train, range(2)))
    after = stage()
    after.shown.clear()
    draws = [Draw(0, row) for row in range(42)]
    assert_equal(after.dataset.fetch(draws), filled.dataset.fetch(draws))
    assert after.shown == []


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_hand_over_pictures_of_what_is_not_there_and_the_trainer_completes_them_in_order(
    stage: Any, filled: Stage, workers: int
) -> None:
    class Drawn:
        order = type("Order", (), {"clip": 1})

        def __iter__(self) -> Iterator[list[Draw]]:
            yield from [[Draw(0, row), Draw(1, 41 - row)] for row in range(20)]

        def __len__(self) -> int:
            return 20

    along = stage()
    along.shown.clear()
    one, other = (
        each.dataset.batches(Drawn(), num_workers=workers, pin_memory=False)  # type: ignore[arg-type]
        for each in (along, filled)
    )
    for batch, expected in zip(one, other, strict=True):
        assert_equal(batch, expected)
    assert sum(along.shown) == CAMERAS * 40  # here, not in a worker


def test_room_for_batches_on_their_way_is_reckoned_with_their_pictures(stage: Any, filled: Stage) -> None:
    along = stage()
    lacking = along.dataset.gather([Draw(0, 41)]).lacking
    assert along.images.look == filled.images.look + sum(frames.nbytes for frames in lacking.pictures.values())


def test_a_disk_that_fills_up_on_the_way_is_an_error_with_words(stage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    along = stage()

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(part.os, "fsync", full)
    with pytest.raises(ConfigError, match=r"data.cache_root must be a folder that can be written.*No space left"):
        [along.dataset.fetch([Draw(0, row)]) for row in range(6)]
    monkeypatch.undo()
    assert not along.images.caches[0].holds(np.arange(6)).any()


def test_marks_that_were_not_copied_to_their_end_are_named(stage: Any) -> None:
    os.truncate(stage().path / FILLED_ROWS, 7)
    with pytest.raises(ConfigError, match=r"must be whole, got filled_rows of 7 rows; copy it again"):
        stage()


@pytest.mark.parametrize("changes", [{"feature_cache": False}, {"augmentation": AugmentationConfig()}])
def test_it_is_refused_where_pictures_are_read(configs: list[RunConfig], changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"data.feature_fill must be before where pictures are read.*, got 'along'"):
        replace(configs[0].data, feature_fill="along", **changes)
    with pytest.raises(ConfigError, match=r"data.feature_fill must be .*before, along.*, got 'later'"):
        replace(configs[0].data, feature_fill="later")


def test_a_stage_whose_encoder_learns_says_that_it_has_nothing_to_do(config: DataConfig, tasks: list[Task]) -> None:
    decoded = {tasks[0].name: DecodedFrames(tasks[0], image_size=None, video_backend="pyav")}
    images = plan_images(config, decoded, {tasks[0].name: TRAINED}, None)
    assert "the image encoder is trained; so data.feature_fill=along has nothing to do" in images.description


def test_an_embedding_is_the_same_in_any_company() -> None:
    sizes = []

    def embed(pictures: torch.Tensor) -> torch.Tensor:
        sizes.append(len(pictures))
        return pictures.mean(dim=(1, 2, 3))[:, None, None] * torch.ones(1, 4, 8)

    encoder, form = Encoder(embed, {}, str, torch.device("cpu"), together=4), FORMS["bfloat16"]
    frames = torch.randint(256, (9, 3, 8, 8), dtype=torch.uint8)
    whole = encoder.stored(frames, form)
    assert whole.shape == (9, 4, 8)
    for count in (1, 4, 5):
        assert np.array_equal(encoder.stored(frames[:count], form), whole[:count])
    assert set(sizes) == {4}
