"""kuavo_client in the interpreters that robots have, and openpi's own client, against our server.

The environments are made on the spot from the package index; pyenv's interpreters are those that are found.
"""

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from commands import REPOSITORY
from robot_process import read, write
from served import PATIENCE, Served

from kuavo_client import pack, unpack
from kuavo_train.evaluation.checkpoints import Contestant
from kuavo_train.evaluation.environment import Environment
from kuavo_train.evaluation.environment_pool import seen_in
from kuavo_train.evaluation.options import Options
from kuavo_train.evaluation.rollout import observation_of
from kuavo_train.wrapper.policy.smolvla import SmolVLAPolicyWrapper

PYENV = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
OLDEST, INSTALLED_IN = (3, 8), 300  # s
TICKS = 20
ROBOT_PROCESS = REPOSITORY / "tests" / "support" / "robot_process.py"
CLIENT_TESTS = REPOSITORY / "tests" / "client"
PYTEST = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull, "--confcutdir", str(CLIENT_TESTS)]


def interpreters() -> list[str]:
    """Of every minor version from the oldest on, by its version; our own first."""
    found = {sys.version_info[:2]: sys.executable}
    for python in sorted(PYENV.glob("3.*/bin/python")):
        version = tuple(int(part) for part in re.findall(r"\d+", python.parent.parent.name)[:2])
        if version >= OLDEST:
            found.setdefault(version, str(python))
    return [found[version] for version in sorted(found)]


def environment(python: str, folder: Path, *packages: str) -> Path:
    """The interpreter of a new environment with these packages; skips the test where there is no index."""
    uv = Path(sysconfig.get_path("scripts")) / "uv"
    new = folder / "bin" / "python"
    install = ["pip", "install", "--quiet", "--python", new, *packages]
    for words in (["venv", "--quiet", "--python", python, folder], install):
        done = subprocess.run([uv, *words], capture_output=True, text=True, timeout=INSTALLED_IN)
        if done.returncode:
            pytest.skip(f"no environment for {python}: {done.stderr[-300:]}")
    return new


@pytest.mark.slow
@pytest.mark.parametrize("python", interpreters())
def test_the_clients_tests_pass_under_every_python_that_is_there(python: str, tmp_path: Path) -> None:
    new = environment(python, tmp_path / "env", "numpy", "msgpack", "websockets", "pytest")
    words = [new, *PYTEST, str(CLIENT_TESTS)]
    environ = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(words, capture_output=True, text=True, timeout=INSTALLED_IN, env=environ)
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("client", "packages"),
    [
        ("kuavo_client", ["numpy", "msgpack", "websockets"]),
        ("openpi_client", ["openpi-client==0.1.2", "typing_extensions"]),  # which it forgets to declare
    ],
)
def test_a_robot_in_an_old_python_acts_in_a_simulated_job_as_the_policy_does_in_process(
    client: str, packages: list[str], simulated_run: Path, tmp_path: Path
) -> None:
    python = environment(interpreters()[0], tmp_path / "env", *packages)
    checkpoint = simulated_run / "stage3_placement" / "checkpoints" / "best"
    place = Contestant.open("served", str(checkpoint)).environment("weighing", Options({"served": str(checkpoint)}))
    policies = [SmolVLAPolicyWrapper.from_pretrained(checkpoint, device="cpu", seed=0) for _ in range(2)]
    world, expected = place.make(), []
    seen = seen_in(*world.reset(seed=7))
    policies[0].reset(seeds=[0])
    for _ in range(TICKS):
        action = policies[0].select_action(observation_of([seen], "weighing"))[0]
        expected.append(action)
        seen = seen_in(*world.step(action)[::4])
    world.close()
    with Served(policies[1], batch=1) as server:
        acted = drive(python, client, f"ws://127.0.0.1:{server.port}", place)
    assert np.array_equal(np.stack(acted), np.stack(expected))


def drive(python: Path, client: str, address: str, place: Environment) -> list[np.ndarray]:
    """What the robot's process does in the world, tick by tick."""
    words = [python, ROBOT_PROCESS, client, address, "weighing", str(TICKS), "0"]
    environ = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    world, acted = place.make(), []
    seen = seen_in(*world.reset(seed=7))
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environ) as robot:
        assert robot.stdin is not None
        assert robot.stdout is not None
        while len(acted) < TICKS:
            asked = unpack(read(robot.stdout))
            if "observe" in asked:
                pictures = {f"observation.images.{camera}": picture for camera, picture in seen.pictures.items()}
                write(robot.stdin, pack({**pictures, "observation.state": seen.state}))
                continue
            acted.append(asked["act"])
            seen = seen_in(*world.step(asked["act"])[::4])
            write(robot.stdin, b"")
        assert robot.wait(PATIENCE) == 0
    world.close()
    return acted
