"""scripts/setup.sh, which makes .venv, where it must not or cannot."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "setup.sh"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with nothing but the script in it."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(SCRIPT, tmp_path / "scripts")
    return tmp_path


def set_up(checkout: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    script = ["bash", str(checkout / "scripts" / "setup.sh")]
    return subprocess.run(script, env={**os.environ, **environment}, capture_output=True, text=True, check=False)


def begun(checkout: Path, by: int) -> Path:
    """What a set-up has in hand that process `by` is at, or was."""
    (checkout / ".venv").mkdir()
    (checkout / ".venv" / ".installing").write_text(f"{by}\n")
    (checkout / ".venv" / "half").touch()
    return checkout / ".venv" / "half"


def test_a_second_set_up_waits_for_nobody_and_touches_nothing(checkout: Path) -> None:
    half = begun(checkout, by=os.getpid())
    done = set_up(checkout)
    assert done.returncode == 1
    assert f"process {os.getpid()} is making .venv: wait for it" in done.stderr
    assert half.exists()


def test_an_interrupted_set_up_starts_again_and_a_missing_python_is_told_with_what_was_tried(checkout: Path) -> None:
    over = subprocess.Popen(["true"])
    over.wait()
    half = begun(checkout, by=over.pid)
    done = set_up(checkout, PYTHON="no-such-python")
    assert done.returncode == 1
    assert "the last set-up was interrupted: starting again" in done.stderr
    assert "    no-such-python: not found\n" in done.stderr
    assert "make setup PYTHON=/path/to/python3.12" in done.stderr
    assert not half.parent.exists()
