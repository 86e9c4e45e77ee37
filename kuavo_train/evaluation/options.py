"""What `python -m kuavo_train.evaluate` was asked: its `key=value` arguments, read and checked."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from kuavo_train.errors import ConfigError, one_of, require
from kuavo_train.evaluation.ablations import ABLATIONS

ENVIRONMENT_SETTING = "environment."


@dataclass(frozen=True)
class Request:
    """
    Attributes:
        checkpoints: name → folder or hub id, in the order given; the first is what the others are compared with.
        tasks: by name; None for all that every checkpoint has learnt.
        n_episodes: per task, or of a dataset. None: 50 in simulation, all there are of a dataset.
        seed: of the layouts, and of the policies' noise.
        output: the JSON; page, figures and videos lie beside it.
        parallel: robots at a time. workers: processes that simulate; None for one per CPU.
        max_steps: time limit of an episode; None leaves it to the environment.
        n_action_steps: horizons of execution, a row each; empty for the checkpoint's own.
        sampling_temperature: of the noise actions are denoised from, a row each; empty for the checkpoint's own.
        ablate: what is taken away, a row each.
        videos: per checkpoint and task.
        environment: gymnasium's "module:id" in place of kuavo_sim's; `environment_settings` go to any.
        data: LeRobot dataset, or a folder of them by task: demonstrations in place of a simulator.
    """

    checkpoints: dict[str, str]
    tasks: tuple[str, ...] | None = None
    n_episodes: int | None = None
    seed: int = 0
    output: Path = Path("evaluation_results.json")
    parallel: int = 8
    workers: int | None = None
    device: str | None = None
    max_steps: int | None = None
    n_action_steps: tuple[int, ...] = ()
    sampling_temperature: tuple[float, ...] = ()
    ablate: tuple[str, ...] = ()
    videos: int = 0
    environment: str | None = None
    environment_settings: dict[str, Any] = field(default_factory=dict)
    data: Path | None = None

    def __post_init__(self) -> None:
        if not self.checkpoints:
            raise ConfigError("arguments must name a checkpoint, NAME=outputs/<run>/stage…/checkpoints/best, got none")
        for name in self.ablate:
            one_of("ablate", name, ABLATIONS)
        require(self.output.suffix == ".json", "output", "be a .json file", str(self.output))
        if self.data is not None:
            in_simulation = ("environment", "environment_settings", "max_steps", "n_action_steps", "videos", "workers")
            for key in in_simulation:
                if getattr(self, key):
                    raise ConfigError(f"{key} must not be given with data: demonstrations are walked, not simulated")
        if self.environment is not None:
            require(self.tasks is not None and len(self.tasks) == 1, "tasks", "be one with environment", self.tasks)

    @classmethod
    def parse(cls, words: Sequence[str]) -> "Request":
        """Raises `ConfigError` naming the argument that is wrong."""
        given: dict[str, Any] = {"checkpoints": {}, "environment_settings": {}}
        for word in words:
            key, equals, text = word.partition("=")
            require(bool(equals and text), "arguments", "be NAME=CHECKPOINT or one of the options as key=value", word)
            if key.startswith(ENVIRONMENT_SETTING):
                place, name, value = (
                    given["environment_settings"],
                    key.removeprefix(ENVIRONMENT_SETTING),
                    _yaml(key, text),
                )
            elif key in OPTIONS:
                place, name, value = given, key, OPTIONS[key](key, text)
            else:
                place, name, value = given["checkpoints"], key, _checkpoint(key, text)
            require(name not in place, key, "be given once", text)
            place[name] = value
        return cls(**given)


def _checkpoint(name: str, text: str) -> str:
    is_name = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_+-]*", name)
    is_hub_id = re.fullmatch(r"[^/\s]+/[^/\s]+", text)
    if not is_name or not (is_hub_id or Path(text).exists()):
        raise ConfigError(
            f"{name} must be an option ({', '.join(OPTIONS)}, {ENVIRONMENT_SETTING}KEY), or a name for a checkpoint "
            f"that is there, got {text!r}"
        )
    return text


def _text(key: str, text: str) -> str:
    return text


def _path(key: str, text: str) -> Path:
    return Path(text)


def _whole(least: int) -> Callable[[str, str], int]:
    def read(key: str, text: str) -> int:
        require(text.isdigit() and int(text) >= least, key, f"be a whole number of at least {least}", text)
        return int(text)

    return read


def _share(key: str, text: str) -> float:
    valid = re.fullmatch(r"\d*\.?\d+", text) and float(text) <= 1
    require(bool(valid), key, "be a number in [0, 1]", text)
    return float(text)


def _several[T](read: Callable[[str, str], T]) -> Callable[[str, str], tuple[T, ...]]:
    def read_all(key: str, text: str) -> tuple[T, ...]:
        values = tuple(read(key, part) for part in text.split(","))
        require(
            len(set(values)) == len(values) and "" not in values, key, "be values with commas between, each once", text
        )
        return values

    return read_all


def _yaml(key: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{key} must be a YAML value, got {text!r}") from error


OPTIONS: dict[str, Callable[[str, str], Any]] = {
    "tasks": _several(_text),
    "n_episodes": _whole(1),
    "seed": _whole(0),
    "output": _path,
    "parallel": _whole(1),
    "workers": _whole(1),
    "device": _text,
    "max_steps": _whole(1),
    "n_action_steps": _several(_whole(1)),
    "sampling_temperature": _several(_share),
    "ablate": _several(_text),
    "videos": _whole(0),
    "environment": _text,
    "data": _path,
}
