"""What is kept of a finished cell: enough to be counted, nothing of the machine it was made on."""

import json
import tarfile
from pathlib import Path

import pytest

from benchmarks.cell_records import main

RUN = "mine-replay-s0"


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """study.json of one cell that is finished and one that is not; the working folder is that of the outputs."""
    monkeypatch.chdir(tmp_path)
    outputs = tmp_path / "outputs"
    cells = [
        {"run": run, "folder": str(outputs / run), "status": status}
        for run, status in ((RUN, "finished"), ("mine-replay-s1", "running"))
    ]
    for cell in cells:
        stage = outputs / cell["run"] / "stage1_moving_grasp"
        (stage / "checkpoints" / "best").mkdir(parents=True)
        (stage / "config.yaml").write_text(f"policy:\n  pretrained_path: {tmp_path}/models/base\n")
        (stage / "stage.json").write_text('{"status": "finished"}')
        (stage / "checkpoints" / "best" / "config.json").write_text("{}")
        (stage / "weights.npz").write_bytes(b"0" * 100)
    path = outputs / "mine-study" / "study.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"cells": cells}))
    return path


def records_of(study: Path, folder: str = "records") -> Path:
    assert main([f"pack={study}", f"into={folder}"]) == 0
    return Path(folder)


def test_finished_cells_are_packed_without_weights_and_without_the_machines_paths(study: Path) -> None:
    records = records_of(study)
    assert [path.name for path in records.iterdir()] == [f"{RUN}.tar.xz"]
    with tarfile.open(records / f"{RUN}.tar.xz") as archive:
        held = {entry.name: archive.extractfile(entry).read().decode() for entry in archive}  # type: ignore[union-attr]
    assert set(held) == {f"{RUN}/stage1_moving_grasp/{name}" for name in ("config.yaml", "stage.json")}
    assert "pretrained_path: models/base\n" in held[f"{RUN}/stage1_moving_grasp/config.yaml"]


def test_the_same_cell_is_the_same_bytes(study: Path) -> None:
    first, second = (records_of(study, folder) / f"{RUN}.tar.xz" for folder in ("one", "two"))
    assert first.read_bytes() == second.read_bytes()


def test_unpacking_leaves_alone_what_is_there(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = records_of(study)
    here = study.parent.parent / RUN / "stage1_moving_grasp" / "stage.json"
    here.write_text("mine")
    for into in ("outputs", "elsewhere"):
        assert main([f"unpack={records}", f"into={into}"]) == 0
    assert here.read_text() == "mine"
    assert capsys.readouterr().out.splitlines()[1:] == [f"elsewhere/{RUN}"]
    assert (Path("elsewhere") / RUN / "stage1_moving_grasp" / "stage.json").read_text() == '{"status": "finished"}'


def test_what_cannot_be_packed_or_unpacked_is_refused_in_one_line(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = records_of(study) / "broken.tar.xz"
    broken.write_bytes(b"no archive")
    refused = (
        ["into=x"],
        ["into=x", f"pack={study}", "unpack=records"],
        ["into=x", "pack=absent"],
        ["into=x", "unpack=outputs"],
        ["into=x", "unpack=records"],
    )
    for words in refused:
        assert main(words) == 2, words
        assert capsys.readouterr().err.count("must") == 1, words
