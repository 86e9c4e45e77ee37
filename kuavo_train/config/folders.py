"""Where the YAML files and the pretrained models of the project lie, and what YAML may compute."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

_PACKAGE = Path(__file__).resolve().parents[1]
CONFIG_FOLDER = _PACKAGE / "configs" if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent / "configs"
"""The YAML files: inside the package where that was installed from a wheel, beside it in the repository."""

MODELS_FOLDER = CONFIG_FOLDER.parent / "models"
"""Pretrained models that come with the project, beside the YAML files."""


def register_resolvers() -> None:
    """Profiles scale the stage's own recipe: `${times:${stage.lr},20}`, `${share_of:${stage.epochs},0.1}`."""
    resolvers: dict[str, Callable[..., Any]] = {
        "times": lambda value, factor: float(f"{value * factor:.9g}"),
        "share_of": lambda whole, part: max(1, round(whole * part)),
        "model": lambda name: str(MODELS_FOLDER / name),
    }
    for name, resolver in resolvers.items():
        OmegaConf.register_new_resolver(name, resolver, replace=True)
