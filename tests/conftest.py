"""Configs and datasets that every test may use."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_datasets import TASK_NAMES, write_dataset


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with one small dataset per task; sorting moves its base."""
    folder = tmp_path_factory.mktemp("datasets")
    for number, name in enumerate(TASK_NAMES):
        write_dataset(folder / name, base=name == "sorting", seed=number)
    return folder


@pytest.fixture
def small_run(datasets: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Overrides of a run on the small datasets that finishes in seconds."""

    def overrides(*more: str) -> list[str]:
        return [
            "profile=smoke",
            "simulation=null",
            "rollout.episodes=0",
            f"outputs={tmp_path / 'outputs'}",
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
