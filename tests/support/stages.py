"""Stages run in this process, and what they leave."""

from collections.abc import Sequence
from dataclasses import is_dataclass, replace
from typing import Any

import torch
from safetensors.torch import load_file

from kuavo_train.config import RunConfig
from kuavo_train.runs.run_folder import StageFolder
from kuavo_train.stage.stage import run_stage


def changed(config: RunConfig, **changes: Any) -> RunConfig:
    """With other values of keys; of a section, `training={"lr": 1}` changes what it names and keeps the rest."""

    def merged(key: str, value: Any) -> Any:
        section = getattr(config, key)
        if is_dataclass(section) and isinstance(value, dict):
            return replace(section, **value)  # type: ignore[type-var]
        return {**section, **value} if isinstance(section, dict) and isinstance(value, dict) else value

    return replace(config, **{key: merged(key, value) for key, value in changes.items()})


def run(configs: Sequence[RunConfig], place: int = 0, **changes: Any) -> int:
    """The exit status of the stage at this place, with `changed` settings."""
    return run_stage(changed(configs[place], **changes), [config.stage for config in configs])


def weights(folder: StageFolder, link: str = "last") -> dict[str, torch.Tensor]:
    return load_file(folder.path / "checkpoints" / link / "pretrained_model" / "model.safetensors")


def assert_equal_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def records(folder: StageFolder, kind: str | None = None) -> list[dict[str, Any]]:
    """The stage's validations, all or those of one kind."""
    return [record for record in folder.validations.read() if kind in (None, record["kind"])]
