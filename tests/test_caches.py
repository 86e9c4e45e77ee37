"""`python -m kuavo_train.cache`: what a stage reads is there before it begins, and what nothing reads is removed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import Here
from pictures_shown import pictures_shown

from kuavo_train.data.images.part import Part

FROZEN = "training.freeze_first_stage=[vision,connector,vlm_text]"
FIRST, SECOND = "task=tasks/task1_moving_grasp", "task=tasks/task2_weighing"


@pytest.fixture
def words(small_run_in: Callable[..., list[str]], tmp_path: Path) -> list[str]:
    """Of a run whose image encoder is frozen from the first stage on."""
    more = [f"data.cache_root={tmp_path / 'cache'}", FROZEN, "allow_random_frozen_vlm=true", "training.max_steps=1"]
    return small_run_in(tmp_path / "outputs", *more)


@pytest.fixture
def embedded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return pictures_shown(monkeypatch)


def run(here: Here, module: str, *words: str) -> str:
    done = here(module, *words)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def caches(tmp_path: Path) -> list[str]:
    return sorted(str(path.parent.relative_to(tmp_path / "cache")) for path in tmp_path.rglob("cache/*/*/key.json"))


def test_a_stage_computes_only_what_no_machine_has_computed_ahead(
    here: Here, words: list[str], tmp_path: Path, embedded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead = run(here, "kuavo_train.cache", FIRST, "shard=1/3", *words)
    assert "stage 1 (moving_grasp), shard 1/3" in ahead
    assert "of shard 1/3 to be computed now" in ahead
    elsewhere = f"data.cache_root={tmp_path / 'elsewhere'}"
    run(here, "kuavo_train.cache", FIRST, "shard=2/3", *words, elsewhere)
    shutil.copytree(tmp_path / "elsewhere", tmp_path / "cache", dirs_exist_ok=True)
    first = sum(embedded)
    written: list[str] = []
    write = Part.write
    monkeypatch.setattr(Part, "write", lambda part, *about: (written.append(part.path.name), write(part, *about))[1])
    assert "all of shard 2/3 there" in run(here, "kuavo_train.cache", FIRST, "shard=2/3", *words)
    assert (sum(embedded), written) == (first, [])
    run(here, "kuavo_train", FIRST, *words)
    assert not any("-of-" in name for name in written)
    assert 0 < sum(embedded) - first < first
    stage = json.loads((tmp_path / "outputs/smoke/stage1_moving_grasp/stage.json").read_text())
    assert sorted(stage["caches"]) == sorted({name.partition(".")[0] for name in caches(tmp_path)})


def test_what_a_stage_would_compute_along_is_filled_ahead_too(
    here: Here, words: list[str], embedded: list[int]
) -> None:
    run(here, "kuavo_train.cache", FIRST, *words, "data.feature_fill=along")
    ahead = sum(embedded)
    assert "all of it there" in run(here, "kuavo_train", FIRST, *words, "data.feature_fill=along")
    assert sum(embedded) == ahead > 0


def test_a_later_stage_is_filled_ahead_where_no_stage_before_it_trains_the_encoder(
    here: Here, words: list[str], embedded: list[int]
) -> None:
    assert "stage 2 (weighing)" in run(here, "kuavo_train.cache", SECOND, *words, "training.freeze=[vision,connector]")
    refused = here("kuavo_train.cache", SECOND, *words, "training.freeze_first_stage=[vision]")
    assert refused.returncode == 2
    assert "must follow a finished stage 1 (moving_grasp), got absent" in refused.stderr


def test_only_caches_of_datasets_and_encoders_that_are_gone_are_removed(
    here: Here, words: list[str], tmp_path: Path, datasets: Path
) -> None:
    shutil.copytree(datasets / "moving_grasp", tmp_path / "data" / "moving_grasp")
    shutil.copytree(datasets / "weighing", tmp_path / "data" / "weighing")
    words = [*words, f"data.root={tmp_path / 'data'}"]
    run(here, "kuavo_train.cache", FIRST, *words)
    kept = caches(tmp_path)
    run(here, "kuavo_train.cache", FIRST, *words, "seed=1")
    run(here, "kuavo_train.cache", FIRST, *words, "data.feature_cache=false")
    others = set(caches(tmp_path)) - set(kept)
    (tmp_path / "cache" / "features" / "notes-0123456789abcdef").mkdir()
    (tmp_path / "cache" / "features" / "notes-0123456789abcdef" / "key.json").write_text('{"dataset": "mine"}')
    shown = run(here, "kuavo_train.cache", "prune=list", *words)
    unused = {name for name in others if not name.startswith("frames/")}
    assert unused
    for name in unused:
        assert f"  {name}: " in shown
    assert "KiB; no run below outputs and no stage of this configuration has the encoder" in shown
    assert set(caches(tmp_path)) == {*kept, *others, "features/notes-0123456789abcdef"}
    shutil.rmtree(tmp_path / "data" / "weighing")
    removed = run(here, "kuavo_train.cache", "prune=true", *words)
    assert f"its dataset {tmp_path / 'data/weighing'} is gone" in removed
    left = {name for name in [*kept, *others] if "moving_grasp" in name} - unused
    assert set(caches(tmp_path)) == {*left, "features/notes-0123456789abcdef"}
    assert "nothing below" in run(here, "kuavo_train.cache", "prune=true", *words)
