"""The tutorials, as somebody types them: their files are written and their commands run in an empty folder."""

import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

import pytest
from commands import Here

TUTORIALS = Path(__file__).resolve().parents[2] / "docs" / "tutorials"
FILE = re.compile(r'^```\w+ title="([^"]+)"\n(.*?)^```$', re.MULTILINE | re.DOTALL)


def write_files(tutorial: str) -> None:
    for name, content in FILE.findall(tutorial):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(content)


def run_commands(tutorial: str, here: Here, *, skip: str | None = None, more: Sequence[str] = ()) -> list[str]:
    """What each command printed. `more` is added to the words of those that compose a configuration."""
    printed = []
    for line in re.findall(r"^\$ python -m (.*)$", tutorial.replace("\\\n", " "), re.MULTILINE):
        module, *words = shlex.split(line)
        if module == skip:
            continue
        done = here(module, *words, *([] if module == "kuavo_train.report" else more))
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
        printed.append(done.stdout)
    return printed


def own_two_tasks(here: Here, *, skip: str | None = None) -> None:
    tutorial = (TUTORIALS / "two_tasks.md").read_text()
    write_files(tutorial)
    *_, preflight, _trained, report = run_commands(tutorial, here, skip=skip)
    assert "no problems" in preflight
    assert "the dataset says" in preflight
    assert "weigh_parcel" in report
    assert Path("outputs/mine/stage2_place_bottle/checkpoints/best").is_dir()


def test_two_tasks_of_ones_own_are_trained_from_an_empty_folder(
    datasets: Path, here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my_data").symlink_to(datasets)  # recordings that are there already: the page's take a minute
    own_two_tasks(here, skip="kuavo_sim.record")


@pytest.mark.slow
def test_two_tasks_of_ones_own_are_recorded_and_trained_from_an_empty_folder(
    here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    own_two_tasks(here)


def own_strategy(here: Here, folder: Path, monkeypatch: pytest.MonkeyPatch, more: Sequence[str] = ()) -> None:
    monkeypatch.chdir(folder)
    tutorial = (TUTORIALS / "own_strategy.md").read_text()
    write_files(tutorial)
    study, report = run_commands(tutorial, here, more=more)
    assert "stay_near" in study
    assert Path("outputs/smoke-study/report/comparison.html").is_file()
    assert "weighing" in report
    steps = Path("outputs/smoke-stay_near-s0/stage2_placement/metrics.jsonl").read_text().splitlines()
    moved = [json.loads(line)["distance"] for line in steps if "distance" in line]
    assert moved
    assert min(moved) >= 0 < max(moved)


def test_a_strategy_of_ones_own_is_compared_from_an_empty_folder(
    datasets: Path, here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_simulation = ["simulation=null", "rollout.episodes=0", f"data.root={datasets}"]
    own_strategy(here, tmp_path, monkeypatch, no_simulation)


@pytest.mark.slow
def test_a_strategy_of_ones_own_is_recorded_for_and_compared_from_an_empty_folder(
    here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_strategy(here, tmp_path, monkeypatch)
