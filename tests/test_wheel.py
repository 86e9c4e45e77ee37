"""What `pip install` of the built wheel gives, away from the repository."""

import email
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib import import_module
from pathlib import Path

import pytest

import kuavo_client

REPOSITORY = Path(__file__).resolve().parents[1]
ENTRY = "lerobot_policy_kuavo_train.py"
PACKAGES = ("kuavo_train", "kuavo_sim", "kuavo_client", "lerobot_policy_smolvla_memory")
NO_SOURCE = shutil.ignore_patterns("__pycache__", ".*", "outputs", "*.egg-info", "build", "dist")


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that nothing is left in the repository, and nothing left there is taken along."""
    folder = tmp_path_factory.mktemp("sdist")
    shutil.copytree(REPOSITORY, folder / "repository", ignore=NO_SOURCE)
    return build("sdist", folder / "repository")


@pytest.fixture(scope="module")
def wheel(sdist: Path) -> Path:
    """Built from the source distribution, as where no wheel is at hand."""
    with tarfile.open(sdist) as file:
        file.extractall(sdist.parent, filter="data")
    return build("wheel", sdist.parent / sdist.name.removesuffix(".tar.gz"))


def build(what: str, source: Path) -> Path:
    """`python -m build`, without a network and in this environment."""
    code = f"from setuptools import build_meta; build_meta.build_{what}('dist')"
    subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, check=True)
    (built,) = (source / "dist").iterdir()
    return built


def test_wheel_and_source_hold_all_that_is_needed_and_neither_tests_nor_benchmarks(sdist: Path, wheel: Path) -> None:
    with tarfile.open(sdist) as file:
        source = {name.partition("/")[2] for name in file.getnames()}
    installed = set(zipfile.ZipFile(wheel).namelist())
    ours = {file.relative_to(REPOSITORY) for name in PACKAGES for file in (REPOSITORY / name).rglob("*")}
    ours = {str(file) for file in ours if file.suffix in (".py", ".jinja", ".css", ".typed")}
    configs = {str(file.relative_to(REPOSITORY)) for file in (REPOSITORY / "configs").rglob("*.yaml")}
    models = {str(file.relative_to(REPOSITORY)) for file in (REPOSITORY / "models").rglob("*") if file.is_file()}
    assert ours | configs | models <= source
    assert ours | {f"kuavo_train/{file}" for file in configs | models} <= installed
    assert {name.split("/")[0] for name in installed if ".dist-info" not in name} == {*PACKAGES, ENTRY}
    assert ENTRY in source
    assert not any(name.startswith(("tests", "benchmarks")) for name in source)
    assert {f"{name}/py.typed" for name in PACKAGES} <= installed


def test_lerobot_finds_the_policy_and_the_simulation_of_an_installed_wheel(wheel: Path, tmp_path: Path) -> None:
    """Of the wheel alone: the repository's own editable install is no distribution of that folder."""
    zipfile.ZipFile(wheel).extractall(tmp_path)
    (found,) = importlib.metadata.distributions(path=[str(tmp_path)])
    name = found.metadata["Name"]
    assert name.startswith("lerobot_policy_")  # LeRobot then imports the module of that name
    assert f"{name}.py" == ENTRY
    entry = (tmp_path / ENTRY).read_text()
    assert {"import kuavo_sim.lerobot", "import lerobot_policy_smolvla_memory"} <= set(entry.splitlines())


def test_the_client_has_a_wheel_of_its_own_for_the_python_of_robots(tmp_path: Path) -> None:
    shutil.copytree(REPOSITORY / "kuavo_client", tmp_path / "kuavo_client", ignore=NO_SOURCE)
    wheel = zipfile.ZipFile(build("wheel", tmp_path / "kuavo_client"))
    about = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    held = {name for name in wheel.namelist() if ".dist-info" not in name}
    assert held == {"kuavo_client/__init__.py", "kuavo_client/py.typed"}
    metadata = email.message_from_bytes(wheel.read(about))
    assert (metadata["Name"], metadata["Version"]) == ("kuavo_client", kuavo_client.__version__)
    assert metadata["Requires-Python"] == ">=3.8"
    needed = {re.match(r"\w+", each).group() for each in metadata.get_all("Requires-Dist")}
    assert needed == {"numpy", "msgpack", "websockets"}


def test_every_command_has_a_name_of_its_own_and_can_be_called() -> None:
    scripts = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["scripts"]
    commands = ((file.stem, file.read_text()) for file in (REPOSITORY / "kuavo_train").glob("*.py"))
    runnable = {name for name, source in commands if name == "__main__" or 'if __name__ == "__main__":' in source}
    modules = {target.partition(":")[0] for target in scripts.values()}
    assert modules >= {f"kuavo_train.{name}" for name in runnable}
    for target in scripts.values():
        module, _, name = target.partition(":")
        assert callable(getattr(import_module(module), name)), target


def test_the_wheel_finds_its_configuration_from_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    unpacked, empty = tmp_path / "site packages", tmp_path / "an empty folder"
    zipfile.ZipFile(wheel).extractall(unpacked)
    empty.mkdir()
    code = "import kuavo_train.config as c; print(c.CONFIG_FOLDER); import kuavo_train.__main__ as m; m.command()"
    done = subprocess.run(
        [sys.executable, "-c", code, "task=tasks/task3_placement", "--cfg", "job"],
        cwd=empty,
        env={**os.environ, "PYTHONPATH": str(unpacked)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{unpacked / 'kuavo_train' / 'configs'}\n")
    assert "name: placement" in done.stdout
    assert list(empty.iterdir()) == []


OWN_TASK = """\
stage:
  name: {name}
  index: {index}
  instruction: {instruction}
  epochs: 2
  lr: 5.0e-5
  warmup_steps: 0
  decay_steps: 100
  replay: {replay}
  root: ${{data.root}}/{name}
  simulation_task: {simulation_task}
"""


@pytest.fixture(scope="module")
def commands(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the commands in an environment that has the wheel and this one's packages, but not the repository."""
    clean = tmp_path_factory.mktemp("a clean") / "environment"
    subprocess.run([sys.executable, "-m", "venv", str(clean)], check=True)
    install = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([clean / "bin" / "python", *install], check=True)
    own = Path(subprocess.check_output([clean / "bin" / "python", "-c", PURELIB], text=True).strip())
    # A folder named in a .pth file is searched, but its own .pth files, that of the editable install, are not read.
    (own / "dependencies.pth").write_text(subprocess.check_output([sys.executable, "-c", PURELIB], text=True))
    return clean / "bin"


PURELIB = "import sysconfig; print(sysconfig.get_path('purelib'))"


@pytest.mark.slow
def test_two_own_tasks_train_and_report_from_an_empty_folder_with_nothing_but_the_wheel(
    commands: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "an empty folder"
    tasks = folder / "my tasks"
    tasks.mkdir(parents=True)
    pick = {"name": "pick", "index": 1, "replay": "{pick: 1.0}", "simulation_task": "placement"}
    weigh = {"name": "weigh", "index": 2, "replay": "{pick: 0.25, weigh: 0.75}", "simulation_task": "weighing"}
    (tasks / "a_pick.yaml").write_text(OWN_TASK.format(instruction="Lay the bottle in the yellow area.", **pick))
    (tasks / "b_weigh.yaml").write_text(OWN_TASK.format(instruction="Weigh the parcel, then store it.", **weigh))

    def call(name: str, *words: str) -> subprocess.CompletedProcess[str]:
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        done = subprocess.run(
            [commands / name, *words], cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done

    where = [str(commands / "python"), "-c", "import kuavo_train, kuavo_sim; print(kuavo_train.__path__[0])"]
    assert Path(subprocess.check_output(where, cwd=folder, text=True)).is_relative_to(commands.parent)
    trained = call("kuavo-train-all", "profile=smoke", "tasks_dir=my tasks", "data.record_workers=1")
    run = folder / "outputs" / "smoke"
    assert f"report: {(run / 'report' / 'report.html').relative_to(folder)}" in trained.stdout
    assert [path.name for path in sorted(run.glob("stage*"))] == ["stage1_pick", "stage2_weigh"]
    shutil.move(tasks, folder / "elsewhere")  # the stored run knows its tasks
    (run / "report" / "report.html").unlink()
    reported = call("kuavo-report", "run=outputs/smoke")
    assert "pick" in reported.stdout
    assert (run / "report" / "report.html").is_file()
    again = call("kuavo-train-all", "profile=smoke", "tasks_dir=elsewhere", "data.record_workers=1")
    assert again.stdout.count("is finished in") == 2
    played = call("kuavo-evaluate", "own=outputs/smoke/stage2_weigh/checkpoints/best", "n_episodes=1", "max_steps=12")
    assert "weigh" in played.stdout
