"""A stage that embeds frames in the step that first needs them learns what it learns from all embeddings before."""

import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState
from forked import fork, interrupted_in_step, when
from pictures_shown import pictures_shown
from stages import assert_equal_weights, changed, run, weights
from together import together

from kuavo_train.config import RunConfig
from kuavo_train.data.images.part import Part
from kuavo_train.runs.run_folder import StageFolder, stage_folder
from kuavo_train.stage import stage
from kuavo_train.stage.parts import Stage

FROZEN = {"freeze_first_stage": ["vision", "connector", "vlm_text"], "max_steps": 8, "log_every": 1, "save_every": 3}
Started = Callable[..., list[RunConfig]]


@pytest.fixture(scope="module")
def started(small_configs_in: Callable[..., list[RunConfig]], tmp_path_factory: pytest.TempPathFactory) -> Started:
    """A run of a frozen encoder, without keys and values, in a folder and with caches of its own."""

    def configs(name: str, fill: str = "along", **changes: Any) -> list[RunConfig]:
        folder = tmp_path_factory.mktemp(name)
        data = {"cache_root": str(folder / "cache"), "context_cache_limit_gib": 0.0, "feature_fill": fill}
        how = {"data": data, "training": FROZEN, "allow_random_frozen_vlm": True}
        return [changed(config, **changes) for config in small_configs_in(folder / "outputs", **how)]

    return configs


@pytest.fixture(scope="module")
def before(started: Started) -> StageFolder:
    """A stage with all embeddings there before its first step."""
    configs = started("before", "before")
    assert run(configs) == 0
    return stage_folder(configs[0])


def assert_same(one: StageFolder, other: StageFolder) -> None:
    """To the bit."""
    for read in (lambda folder: folder.metrics.read(), lambda folder: folder.validations.read()):
        assert [line["loss"] for line in read(one)] == [line["loss"] for line in read(other)]
    assert_equal_weights(weights(one), weights(other))


@pytest.mark.parametrize("workers", [0, 2])
def test_losses_and_weights_are_those_of_embeddings_before_and_another_run_finds_them(
    started: Started,
    before: StageFolder,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    workers: int,
) -> None:
    shown = pictures_shown(monkeypatch)
    configs = [changed(config, data={"num_workers": workers}) for config in started("along")]
    assert run(configs) == 0
    assert "in the steps that first need it (data.feature_fill=along)" in capsys.readouterr().out
    assert_same(stage_folder(configs[0]), before)
    held_out, drawn = 2 * 2 * 14, 8 * 4
    assert 0 < sum(shown) - 3 * held_out <= 3 * drawn  # frames that no step needed are not embedded
    shown.clear()
    assert run(configs, run="again") == 0
    assert sum(shown) == 0
    assert_same(stage_folder(changed(configs[0], run="again")), before)


def test_an_interrupted_stage_goes_on_to_the_same_bits(started: Started, before: StageFolder) -> None:
    configs = started("interrupted")
    with interrupted_in_step(5):
        assert run(configs) == 143
    assert run(configs, resume=True) == 0
    assert_same(stage_folder(configs[0]), before)


@pytest.mark.parametrize("write", [1, 3, 4], ids=["before its first camera", "before its last", "before it marks them"])
def test_a_stage_killed_while_it_stores_goes_on_to_the_same_bits(
    started: Started, before: StageFolder, tmp_path: Path, write: int
) -> None:
    configs = started("killed")

    def dies_storing() -> int:
        dies = partial(os.kill, os.getpid(), signal.SIGKILL)
        when(Part, "store_rows", lambda: when(Part, "_write_at", dies, call=write), call=5)
        return run(configs)

    assert fork(dies_storing, tmp_path).wait().returncode == -signal.SIGKILL
    assert run(configs, resume=True) == 0
    assert_same(stage_folder(configs[0]), before)


def test_all_of_it_is_on_the_disk_when_training_ends(started: Started, monkeypatch: pytest.MonkeyPatch) -> None:
    store, stored, at_the_end = Part.store_rows, [], []

    def slow(part: Part, *of: Any) -> None:
        time.sleep(1.0)  # longer than the last validation
        store(part, *of)
        stored.append(of)

    def concluded(ended: Stage) -> None:
        at_the_end.append(len(stored))
        ended.opened.images.wait()
        at_the_end.append(len(stored))

    monkeypatch.setattr(Part, "store_rows", slow)
    monkeypatch.setattr(stage, "conclude", concluded)
    run(started("slow", training={"max_steps": 2}))
    assert at_the_end == [2, 2]


def test_two_processes_store_each_their_own_in_one_cache(started: Started) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    found = []
    for fill in ("before", "along"):
        configs = started(f"two_{fill}", fill, processes=2, training={"batch_size": 8})
        assert together(lambda configs=configs: run(configs)) == [0, 0]
        found.append(stage_folder(configs[0]))
    assert_same(*found)
