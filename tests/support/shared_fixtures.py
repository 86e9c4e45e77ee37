"""Configs, datasets, runs and processes that every test may use."""

import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from forked import Forked, fork, run_main
from small_datasets import TASK_NAMES, write_dataset
from stages import changed, run

from kuavo_train.compose import compose_run, stages_to_run
from kuavo_train.config import RunConfig
from kuavo_train.runs.run_folder import stage_folder
from kuavo_train.stage.stage import run_stage


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def here(capsys: pytest.CaptureFixture[str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`python -m module words` in this process, which has imported already what takes another one seconds."""

    def run(module: str, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess([module, *words], run_main(module, *words), *capsys.readouterr())

    return run


@pytest.fixture
def forked(tmp_path: Path) -> Iterator[Callable[..., Forked]]:
    """`python -m module words` in a process forked from this one; `before` is called in it first."""
    started: list[Forked] = []

    def start(module: str, *words: str, before: Callable[[], Any] = lambda: None) -> Forked:
        def run() -> int:
            before()
            return run_main(module, *words)

        started.append(fork(run, tmp_path / f"printed{len(started)}", module, *words))
        return started[-1]

    yield start
    for each in started:
        each.send(signal.SIGKILL)
        each.process.join()


@pytest.fixture(scope="session")
def datasets(once: Callable[..., Path]) -> Path:
    """Folder with one small dataset per task; sorting moves its base.

    One for all workers: LeRobot orders a dataset's statistics anew in each process, and runs know theirs by its bytes.
    """
    return once("datasets", _write_datasets)


def _write_datasets(folder: Path) -> None:
    for number, name in enumerate(TASK_NAMES):
        write_dataset(folder / name, base=name == "sorting", seed=number)


@pytest.fixture(scope="session")
def configs(datasets: Path) -> list[RunConfig]:
    """Of the four tasks on the small datasets; composing them takes longer than most of what is tested with them."""
    return compose_run(["simulation=null", f"data.root={datasets}", "data.held_out_episodes=2"])


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Callable[..., Path]:
    """`once(name, make)` is a folder that `make(folder)` has filled, in the first worker of pytest-xdist to need it."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if hasattr(request.config, "workerinput") else base  # one for all workers

    def made(name: str, make: Callable[[Path], None]) -> Path:
        folder = shared / name
        with FileLock(f"{folder}.lock"):
            if not folder.is_dir():
                try:
                    make(folder)
                except BaseException:
                    shutil.rmtree(folder, ignore_errors=True)
                    raise
        return folder

    return made


@pytest.fixture(scope="session")
def small_checkpoint(datasets: Path, tmp_path_factory: pytest.TempPathFactory, once: Callable[..., Path]) -> Path:
    """A policy that has learnt all four tasks, at a place of its own: nothing else of its run is left."""
    folder = tmp_path_factory.mktemp("robot")
    return once("small_checkpoint", partial(_train_small_checkpoint, datasets, folder))


@pytest.fixture(scope="session")
def simulated_run(once: Callable[..., Path]) -> Path:
    """A run of weighing, whose cue must be remembered, then placement, which has none: to read, or to copy."""
    return once("simulated", _train_simulated_run) / "smoke"


def _train_simulated_run(outputs: Path) -> None:
    configs = compose_run(
        [
            "profile=smoke",
            f"outputs={outputs}",
            "simulation.episodes=5",
            "simulation.image_size=32",
            "data.held_out_episodes=2",
            "data.record_workers=1",
            "tiny_vlm.image_size=32",
            "policy.resize_imgs_with_padding=[32,32]",
            "policy.mem_backprop_depth=2",
            "training.max_steps=2",
            "training.batch_size=4",
            "strategy=sequential",
        ]
    )
    weighing, placement = configs[1:3]
    for config in (weighing, placement):
        assert run_stage(config, [weighing.stage, placement.stage]) == 0


def _train_small_checkpoint(datasets: Path, folder: Path, into: Path) -> None:
    configs = compose_run(
        [
            "profile=smoke",
            "strategy=joint",
            "simulation=null",
            "rollout.episodes=0",
            f"outputs={folder / 'outputs'}",
            f"data.root={datasets}",
            f"data.cache_root={folder / 'cache'}",
            "data.held_out_episodes=2",
            "data.image_size=[24,24]",
            "tiny_vlm.image_size=32",
            "policy.resize_imgs_with_padding=[32,32]",
            "policy.chunk_size=6",
            "policy.n_action_steps=2",
            "training.max_steps=1",
            "training.batch_size=4",
        ]
    )
    joint = stages_to_run(configs)[0]
    assert run_stage(joint, [config.stage for config in configs]) == 0
    shutil.copytree(stage_folder(joint).path / "checkpoints" / "best", folder / "best", symlinks=False)
    shutil.rmtree(folder / "outputs")
    (folder / "best").rename(into)


@pytest.fixture(scope="session")
def small_run_in(datasets: Path) -> Callable[..., list[str]]:
    """Overrides of a run on the small datasets that finishes in a second a stage, in a folder of its own.

    Of two tasks, unless `more` says otherwise: what more of them show is shown where it is looked at.
    """

    def overrides(outputs: Path, *more: str) -> list[str]:
        return [
            "profile=smoke",
            "learn=[moving_grasp,weighing]",
            "simulation=null",
            "rollout.episodes=0",
            f"outputs={outputs}",
            f"data.root={datasets}",
            "data.held_out_episodes=2",
            "tiny_vlm.image_size=32",
            "policy.resize_imgs_with_padding=[32,32]",
            "policy.chunk_size=6",
            "policy.n_action_steps=4",
            "training.max_steps=4",
            "training.batch_size=4",
            "training.log_every=2",
            "training.save_every=2",
            *more,
        ]

    return overrides


@pytest.fixture(scope="session")
def small_configs_in(small_run_in: Callable[..., list[str]]) -> Callable[..., list[RunConfig]]:
    """The configs of such a run, with what Hydra has to choose in `words` and all other settings as `changed` has them.

    Composed once for the same words: that takes longer than much of what is tested with them.
    """

    @cache
    def composed(*words: str) -> tuple[RunConfig, ...]:
        return tuple(compose_run(small_run_in(Path("outputs"), *words)))

    def configs(outputs: Path, *words: str, **changes: Any) -> list[RunConfig]:
        return [changed(config, outputs=str(outputs), **changes) for config in composed(*words)]

    return configs


@pytest.fixture
def small_configs(small_configs_in: Callable[..., list[RunConfig]], tmp_path: Path) -> Callable[..., list[RunConfig]]:
    """As `small_configs_in`, in the test's own folder."""
    return partial(small_configs_in, tmp_path / "outputs")


@pytest.fixture(scope="session")
def four_stages(datasets: Path, once: Callable[..., Path]) -> list[RunConfig]:
    """A run in which all four stages are finished; to read, or to copy."""

    def composed(outputs: Path) -> list[RunConfig]:
        return compose_run(
            [
                "profile=smoke",
                "simulation=null",
                "rollout.episodes=0",
                f"outputs={outputs}",
                f"data.root={datasets}",
                "tiny_vlm.image_size=32",
                "policy.resize_imgs_with_padding=[32,32]",
                "policy.chunk_size=6",
                "policy.n_action_steps=4",
                "training.max_steps=5",
                "training.batch_size=4",
                "training.log_every=2",
                "training.save_every=2",
                "training.freeze=[vision,connector,vlm_text,action_proj]",
                "policy.mem_backprop_depth=2",
            ]
        )

    def train(outputs: Path) -> None:
        configs = composed(outputs)
        for place in range(4):
            assert run(configs, place) == 0

    return composed(once("four_stages", train))


@pytest.fixture
def small_run(small_run_in: Callable[..., list[str]], tmp_path: Path) -> Callable[..., list[str]]:
    """As `small_run_in`, in the test's own folder."""
    return partial(small_run_in, tmp_path / "outputs")
