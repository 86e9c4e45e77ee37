"""kuavo_client in the interpreters that robots have, and openpi's own client, against our server.

The environments are made on the spot from the package index; pyenv's interpreters are those that are found.
"""

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from commands import REPOSITORY
from served import PATIENCE, Served

from benchmarks import robot_python
from benchmarks.network_episodes import in_process, over_the_network
from benchmarks.robot_python import CLIENT_NEEDS, INSTALLED_IN, OLDEST, interpreters
from kuavo_train.errors import RunError
from kuavo_train.evaluation.checkpoints import Contestant
from kuavo_train.evaluation.options import Options
from kuavo_train.wrapper.policy.smolvla import SmolVLAPolicyWrapper

TICKS = 20
CLIENT_TESTS = REPOSITORY / "tests" / "client"
PYTEST = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull, "--confcutdir", str(CLIENT_TESTS)]


def environment(python: str, folder: Path, *packages: str) -> Path:
    """The interpreter of a new environment with these packages; skips the test where there is no index."""
    try:
        return robot_python.environment(python, folder, *packages)
    except RunError as error:
        pytest.skip(str(error))


@pytest.mark.slow
@pytest.mark.parametrize("python", interpreters())
def test_the_clients_tests_pass_under_every_python_that_is_there(python: str, tmp_path: Path) -> None:
    new = environment(python, tmp_path / "env", *CLIENT_NEEDS, "pytest")
    words = [new, *PYTEST, str(CLIENT_TESTS)]
    environ = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(words, capture_output=True, text=True, timeout=INSTALLED_IN, env=environ)
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.slow
def test_the_clients_own_wheel_is_all_that_the_oldest_python_needs(tmp_path: Path) -> None:
    """Built from its folder as the page says, installed with what it declares, from an empty folder."""
    source = shutil.copytree(REPOSITORY / "kuavo_client", tmp_path / "kuavo_client")
    new = environment(interpreters()[0], tmp_path / "env", str(source))
    code = "import sys, kuavo_client as c; c.RobotLoop(dict, print, 'ws://nowhere', 'weighing'); "
    code += "print(c.__file__, '%d.%d' % sys.version_info[:2])"
    empty = tmp_path / "empty"
    empty.mkdir()
    environ = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([new, "-c", code], cwd=empty, env=environ, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    place, version = done.stdout.split()
    assert place.startswith(str(tmp_path / "env"))
    assert tuple(map(int, version.split("."))) >= OLDEST


@pytest.mark.slow
@pytest.mark.parametrize(
    ("client", "packages"),
    [
        ("loop", CLIENT_NEEDS),  # kuavo_client's
        ("openpi", ["openpi-client==0.1.2", "typing_extensions"]),  # which it forgets to declare
    ],
)
def test_a_robot_in_an_old_python_acts_in_a_simulated_job_as_the_policy_does_in_process(
    client: str, packages: list[str], simulated_run: Path, tmp_path: Path
) -> None:
    python = environment(interpreters()[0], tmp_path / "env", *packages)
    checkpoint = simulated_run / "stage3_placement" / "checkpoints" / "best"
    options = Options({"served": str(checkpoint)}, max_steps=TICKS)
    place = Contestant.open("served", str(checkpoint)).environment("weighing", options)
    alone, policy = (SmolVLAPolicyWrapper.from_pretrained(checkpoint, device="cpu", seed=0) for _ in range(2))
    world = place.make()
    with Served(policy, batch=1) as server:
        acted = over_the_network(python, client, f"ws://127.0.0.1:{server.port}", place, world, seed=0)
    world.close()
    expected = in_process(alone, place, [0])[0]
    assert len(acted.actions) == TICKS
    assert np.array_equal(acted.actions, expected.actions)
