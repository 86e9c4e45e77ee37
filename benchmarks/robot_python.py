"""The Pythons that robots have, as far as they are on this machine, and an environment for one."""

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

from kuavo_train.errors import RunError

PYENV = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
OLDEST, INSTALLED_IN = (3, 8), 300  # s
CLIENT_NEEDS = ("numpy", "msgpack", "websockets")


def interpreters() -> list[str]:
    """pyenv's, of every minor version from the oldest on, by version; our own among them."""
    found = {sys.version_info[:2]: sys.executable}
    for python in sorted(PYENV.glob("3.*/bin/python")):
        major, minor = re.findall(r"\d+", python.parent.parent.name)[:2]
        if (int(major), int(minor)) >= OLDEST:
            found.setdefault((int(major), int(minor)), str(python))
    return [found[version] for version in sorted(found)]


def environment(python: str, folder: Path, *packages: str) -> Path:
    """The interpreter of a new environment with these packages, in `folder`.

    Raises:
        RunError: there is no such Python, or no index that has them.
    """
    uv, new = Path(sysconfig.get_path("scripts")) / "uv", folder / "bin" / "python"
    install: list[str | Path] = ["pip", "install", "--quiet", "--python", new, *packages]
    for words in ([*("venv", "--quiet", "--python"), python, folder], install):
        try:
            done = subprocess.run([uv, *words], capture_output=True, text=True, timeout=INSTALLED_IN)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise RunError(f"no environment for {python}: {error}") from error
        if done.returncode:
            raise RunError(f"no environment for {python}: {done.stderr[-300:]}")
    return new


def version_of(python: str | Path) -> str:
    """As 3.8.18. Raises `RunError`."""
    try:
        return subprocess.check_output(
            [python, "-c", "import platform; print(platform.python_version())"], text=True
        ).strip()
    except (OSError, subprocess.CalledProcessError) as error:
        raise RunError(f"robot_python must be a Python, got {python}: {error}") from error


def can_import(python: str | Path, modules: tuple[str, ...]) -> bool:
    words = [python, "-c", f"import {', '.join(modules)}"]
    return subprocess.run(words, capture_output=True, cwd="/").returncode == 0
