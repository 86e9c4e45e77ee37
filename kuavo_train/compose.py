"""YAML files and overrides → typed configs, one for every task of the curriculum.

`task=tasks/task2_weighing` is a Hydra group override; each file of configs/tasks/ gets a two-line alias, so
adding a task is adding a file.
"""

import re
from collections.abc import Container, Iterator, Sequence
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

import draccus
import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from kuavo_train.config import CONFIG_FOLDER, RunConfig, StageConfig, check_curriculum
from kuavo_train.data.replay import proportional_shares
from kuavo_train.errors import ConfigError, Problems, require
from kuavo_train.keys import check_key, described, optional_sections, section_of, words_for_hydra

OF_A_TASKS_DATA = (
    "episodes",
    "cameras",
    "repo_id",
    "revision",
    "state_names",
    "action_names",
    "scale",
    "simulation_task",
    "environment",
    "environment_settings",
)
"""Fields of a task's stage that no other stage may take over."""


def task_files(folder: Path = CONFIG_FOLDER) -> list[Path]:
    """The files of configs/tasks/ in the order of learning (their `stage.index`)."""
    files = sorted((folder / "tasks").glob("*.yaml"))
    require(bool(files), str(folder / "tasks"), "hold at least one task file", "none")
    return sorted(files, key=_index_of)


def _index_of(file: Path) -> int:
    """A task's place in the order of learning. Raises `ConfigError` for a file that does not tell it."""
    try:
        index = OmegaConf.select(OmegaConf.load(file), "stage.index")
    except (YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(
            f"{file} must be YAML with the stage of a task, got {' '.join(str(error).split())}"
        ) from error
    require(isinstance(index, int), f"{file}: stage.index", "be a whole number, the place in the order", index)
    return index


def register_task_aliases(folder: Path = CONFIG_FOLDER) -> None:
    """Let Hydra find configs/tasks/x.yaml under the name `tasks/x` of the group `task`."""
    for file in task_files(folder):
        ConfigStore.instance().store(
            group="task/tasks", name=file.stem, node={"defaults": [f"/tasks/{file.stem}"]}, provider="kuavo_train"
        )


def compose_run(
    overrides: Sequence[str] = (), *, current: RunConfig | None = None, folder: Path = CONFIG_FOLDER
) -> list[RunConfig]:
    """One config per task to learn, in the order of learning.

    Args:
        overrides: Hydra overrides as on the command line; `task=` is not among them.
        current: takes the place of its task's config, with overrides that hold for it alone.
        folder: the configuration folder.

    Raises:
        ConfigError: unknown keys, wrong types, impossible values, two tasks of one name or place.
    """
    register_task_aliases(folder)
    overrides = words_for_hydra(overrides, folder)
    if GlobalHydra.instance().is_initialized():  # inside @hydra.main
        return _compose_all(overrides, current, folder)
    with hydra.initialize_config_dir(str(folder), version_base="1.3"):
        return _compose_all(overrides, current, folder)


def _compose_all(overrides: Sequence[str], current: RunConfig | None, folder: Path) -> list[RunConfig]:
    try:
        configs = [
            resolve(hydra.compose("train", overrides=[f"task=tasks/{file.stem}", *overrides]))
            for file in task_files(folder)
        ]
    except HydraException as error:
        raise ConfigError(str(error)) from error
    if current is not None:
        configs = [current if config.stage.index == current.stage.index else config for config in configs]
    learn = configs[0].learn
    if learn is not None:
        by_name = {config.stage.name: config for config in configs}
        if current is not None:
            require(
                current.stage.name in learn, "learn", f"include the task of this stage ({current.stage.name})", learn
            )
        for name in learn:
            require(name in by_name, "learn", f"name tasks of configs/tasks ({', '.join(by_name)})", name)
            require(learn.count(name) == 1, "learn", "name a task once", name)
        require(bool(learn), "learn", "name at least one task, or be null for all", learn)
        places = enumerate(learn, start=1)
        configs = [_at_place(by_name[name], place, learn[:place], by_name) for place, name in places]
    check_curriculum([config.stage for config in configs])
    return configs


def _at_place(config: RunConfig, place: int, learnt: Sequence[str], known: Container[str]) -> RunConfig:
    """A task's config in the order that `learn` gives; shares of tasks that come later or never go to the others."""
    replay = config.stage.replay
    dealt = {name: share for name, share in replay.items() if share > 0 and name in known and name not in learnt}
    if dealt:
        replay = proportional_shares({name: share for name, share in replay.items() if name not in dealt})
    return replace(config, stage=replace(config.stage, index=place, replay=replay), dealt=dealt)


def resolve(composed: DictConfig) -> RunConfig:
    """Typed config from Hydra's composition. Raises `ConfigError`, also for unknown keys and wrong types."""
    problems = Problems()
    for key in _keys(OmegaConf.to_container(composed)):
        problems.attempt(check_key, key)
    problems.raise_all()
    try:
        plain: Any = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
    plain.pop("task", None)  # the group's own, empty node
    for key, section in optional_sections():  # decoded alone, because a failed `X | None` does not say what failed
        value = OmegaConf.select(composed, key)
        if value is not None:
            _decode(section, OmegaConf.to_container(value, resolve=True), f"{key}.")
    return _decode(RunConfig, plain)


def _keys(values: Any, where: str = "") -> Iterator[str]:
    """Those of a configuration and of its sections, but for the node of the group `task`."""
    for name, value in values.items():
        if name == "task" and not where:
            continue
        key = f"{where}{name}"
        yield key
        if isinstance(value, dict) and section_of(key) is not None:
            yield from _keys(value, f"{key}.")


def _decode[T](into: type[T], plain: Any, where: str = "") -> T:
    """Raises `ConfigError` naming the key, of what kind it must be, and the value."""
    try:
        return draccus.decode(into, plain)
    except draccus.ParsingError as error:
        if isinstance(error.__cause__, ConfigError):
            raise error.__cause__ from error
        lacking = re.search(r"Missing required field\(s\) (.*) for \w+", str(error))
        if lacking is not None:
            missing = lacking[1].replace("`", "")
            raise ConfigError(f"{where.rstrip('.') or 'the configuration'} must have {missing}, got nothing") from error
        told = re.match(r"`([\w.]+)`: (.*)", str(error), re.DOTALL)
        key, value = (told[1], OmegaConf.select(OmegaConf.create(plain), told[1])) if told else ("", None)
        if told is None or section_of(where + key) is not None:
            raise ConfigError(where + " ".join(str(error).split())) from error
        raise ConfigError(f"{where}{key} must be {described(where + key)}, got {value!r}") from error


def stages_to_run(configs: Sequence[RunConfig]) -> list[RunConfig]:
    """The stages of a run: one per task, or where all tasks are learnt at once, a single one.

    The joint stage has the first stage's recipe, as much training as all stages together, and as many passes over each
    task's frames as the task's own stage makes.
    """
    first = configs[0]
    if first.mixture != "all_tasks":
        return list(configs)
    max_steps = first.training.max_steps
    training = replace(
        first.training,
        decay_steps=sum(config.training.decay_steps for config in configs),
        max_steps=None if max_steps is None else max_steps * len(configs),
    )
    stage = replace(without_data(first.stage), name="joint", index=1, replay={"joint": 1.0})
    passes = {config.stage.name: config.training.epochs for config in configs}
    return [replace(first, stage=stage, training=training, passes=passes)]


def without_data(stage: StageConfig) -> StageConfig:
    """The recipe alone, without what is said of the task's own dataset and simulation."""
    own = (item for item in fields(StageConfig) if item.name in OF_A_TASKS_DATA)
    empty: dict[str, Any] = {
        item.name: item.default if item.default_factory is MISSING else item.default_factory() for item in own
    }
    return replace(stage, **empty)


def compose_stage(composed: DictConfig, overrides: Sequence[str]) -> tuple[RunConfig, list[StageConfig]]:
    """The stage that a command line asks for, and the curriculum it belongs to. Raises `ConfigError`."""
    config = resolve(composed)
    for_all = overrides_for_all_tasks(overrides)
    if config.mixture == "all_tasks":
        chosen = [item for item in overrides if item not in for_all]
        if chosen:
            raise ConfigError(f"strategy=joint has one stage for all tasks: leave out what chooses one, {chosen[0]}")
        configs = compose_run(for_all)
        config = stages_to_run(configs)[0]
    else:
        configs = compose_run(for_all, current=config)
        config = next(each for each in configs if each.stage.name == config.stage.name)  # at its place in `learn`
    return config, [other.stage for other in configs]


def overrides_for_all_tasks(overrides: Sequence[str]) -> list[str]:
    """What of a stage's overrides holds for the other tasks too: all but its choice and recipe."""
    return [item for item in overrides if not item.lstrip("~+").startswith(("task=", "stage.", "stage="))]
