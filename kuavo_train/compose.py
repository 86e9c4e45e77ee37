"""YAML files and overrides → typed configs, one for every task of the curriculum.

`task=tasks/task2_weighing` is a Hydra group override; every task's file is a choice of it, so adding a task is adding
a file: to configs/tasks, or to a folder of the user's own (config_folders.py).
"""

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, replace
from pathlib import Path

import draccus
import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kuavo_train.config import CONFIG_FOLDER, RunConfig, StageConfig, check_curriculum
from kuavo_train.config_folders import ConfigFolders, TaskFile
from kuavo_train.data.mixture import dealt_out, learns_all_at_once
from kuavo_train.data.replay.shares import proportional_shares
from kuavo_train.errors import ConfigError, Problems, require
from kuavo_train.keys import check_key, described, optional_sections, parsed, section_of, words_for_hydra
from kuavo_train.reading import Json, JsonValue

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

OF_ONE_TASK = ("task=", "stage=", "stage.")
"""What an override begins with that chooses a stage, or changes its recipe."""

OF_A_STUDY = ("engine=", "engine.", "axes=", "axes.")
"""What one begins with that says how the cells of a study are trained."""


def folders_named(overrides: Sequence[str], base: Path = CONFIG_FOLDER) -> ConfigFolders:
    """The folders that a command line's tasks_dir= and config_dir= name. Raises `ConfigError`."""
    given: dict[str, str | None] = {}
    for word, override in ((word, parsed(word)) for word in overrides):
        key = override.key_or_group
        if key in ("tasks_dir", "config_dir"):
            require(not override.is_sweep_override(), key, "be one folder", word)
            value = override.value()
            given[key] = None if value is None else str(value)
    return ConfigFolders(base, **given)


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
    folders = folders_named(overrides, folder)
    folders.register_tasks()
    overrides = words_for_hydra(overrides, folders)
    if GlobalHydra.instance().is_initialized():  # inside @hydra.main
        return _compose_all(overrides, current, folders)
    with hydra.initialize_config_dir(str(folder), version_base="1.3"):
        return _compose_all(overrides, current, folders)


def _compose_all(overrides: Sequence[str], current: RunConfig | None, folders: ConfigFolders) -> list[RunConfig]:
    def composed(file: TaskFile) -> RunConfig:
        if current is not None and file.task == current.stage.name:
            return current
        try:
            return resolve(hydra.compose("train", overrides=[f"task={file.choice}", *overrides, *folders.for_hydra]))
        except HydraException as error:
            raise ConfigError(str(error)) from error

    first, *others = folders.task_files
    configs = [composed(first)]
    learn = configs[0].learn
    configs += [composed(file) for file in others if learn is None or file.task is None or file.task in learn]
    if current is not None:
        configs = [current if config.stage.index == current.stage.index else config for config in configs]
    if learn is not None:
        by_name = {config.stage.name: config for config in configs}
        known = dict.fromkeys([*(file.task for file in folders.task_files if file.task is not None), *by_name])
        if current is not None:
            require(
                current.stage.name in learn, "learn", f"include the task of this stage ({current.stage.name})", learn
            )
        for name in learn:
            require(name in known, "learn", f"name tasks of {folders} ({', '.join(known)})", name)
            require(learn.count(name) == 1, "learn", "name a task once", name)
        require(bool(learn), "learn", "name at least one task, or be null for all", learn)
        configs = [
            _at_place(by_name[name], place, set(known) - set(learn[:place]))
            for place, name in enumerate(learn, start=1)
        ]
    names = [config.stage.name for config in configs]
    configs = [_with_equal_replay(config, names[:place]) for place, config in enumerate(configs)]
    check_curriculum([config.stage for config in configs])
    return configs


def _at_place(config: RunConfig, place: int, not_learnt: Collection[str]) -> RunConfig:
    """A task's config in the order that `learn` gives; shares of tasks that come later or never go to the others."""
    replay, dealt = dealt_out(config.stage.replay, not_learnt)
    return replace(config, stage=replace(config.stage, index=place, replay=replay), dealt=dealt)


def _with_equal_replay(config: RunConfig, earlier: Sequence[str]) -> RunConfig:
    """The config; where `replay.share` is set, the tasks learnt before get it, in place of its file's shares."""
    if config.replay.share is None:
        return config
    replayed = config.replay.share if earlier else 0.0
    parts = dict.fromkeys(earlier, replayed / max(len(earlier), 1)) | {config.stage.name: 1 - replayed}
    return replace(config, stage=replace(config.stage, replay=proportional_shares(parts)), dealt={})


def resolve(composed: DictConfig) -> RunConfig:
    """Typed config from Hydra's composition. Raises `ConfigError`, also for unknown keys and wrong types."""
    problems = Problems()
    for key in _keys(OmegaConf.to_container(composed)):
        problems.attempt(check_key, key)
    problems.raise_all()
    try:
        plain: JsonValue = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
    for key, number in _endless(plain):
        problems.append(f"{key} must be a finite number, got {number}")
    problems.raise_all()
    for key, section in optional_sections():  # decoded alone, because a failed `X | None` does not say what failed
        value = OmegaConf.select(composed, key)
        if value is not None:
            _decode(section, OmegaConf.to_container(value, resolve=True), f"{key}.")
    return _decode(RunConfig, plain)


def _keys(values: JsonValue, where: str = "") -> Iterator[str]:
    """Those of a configuration and of its sections."""
    for name, value in values.items():
        key = f"{where}{name}"
        yield key
        if isinstance(value, dict) and section_of(key) is not None:
            yield from _keys(value, f"{key}.")


def _endless(value: JsonValue, key: str = "") -> Iterator[tuple[str, float]]:
    """Key and number of what is NaN or without end and passes comparisons; a user's environment may take such."""
    if isinstance(value, float) and not math.isfinite(value):
        yield key, value
    elif isinstance(value, dict) and key != "stage.environment_settings":
        for name, each in value.items():
            yield from _endless(each, f"{key}.{name}" if key else name)
    elif isinstance(value, list):
        for each in value:
            yield from _endless(each, key)


def _decode[T](into: type[T], plain: JsonValue, where: str = "") -> T:
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
        named = re.match(r"`([\w.]+)`: (.*)", str(error), re.DOTALL)
        key, value = (named[1], OmegaConf.select(OmegaConf.create(plain), named[1])) if named else ("", None)
        if named is None or section_of(where + key) is not None:
            raise ConfigError(where + " ".join(str(error).split())) from error
        raise ConfigError(f"{where}{key} must be {described(where + key)}, got {value!r}") from error


def stages_to_run(configs: Sequence[RunConfig]) -> list[RunConfig]:
    """The stages of a run: one per task, or where all tasks are learnt at once, a single one."""
    return [_joint_stage(configs)] if learns_all_at_once(configs[0]) else list(configs)


def _joint_stage(configs: Sequence[RunConfig]) -> RunConfig:
    """The first stage's recipe, as much training as all stages together, and of each task as many passes as its own.

    Its `stage` is a recipe and a place among the run's folders, of no task; what it samples is in `passes`.
    """
    first = configs[0]
    max_steps = first.training.max_steps
    training = replace(
        first.training,
        decay_steps=sum(config.training.decay_steps for config in configs),
        max_steps=None if max_steps is None else max_steps * len(configs),
    )
    stage = replace(without_data(first.stage), name="joint", index=1, replay={"joint": 1.0})
    passes = {config.stage.name: config.training.epochs for config in configs}
    return replace(first, stage=stage, training=training, passes=passes)


def without_data(stage: StageConfig) -> StageConfig:
    """The recipe alone, without what is said of the task's own dataset and simulation."""
    own = (item for item in fields(StageConfig) if item.name in OF_A_TASKS_DATA)
    empty: Json = {
        item.name: item.default if item.default_factory is MISSING else item.default_factory() for item in own
    }
    return replace(stage, **empty)


def compose_stage(composed: DictConfig, overrides: Sequence[str]) -> tuple[RunConfig, list[StageConfig]]:
    """The stage that a command line names, and the curriculum it belongs to. Raises `ConfigError`."""
    config, configs = compose_stage_of_run(composed, overrides)
    return config, [other.stage for other in configs]


def compose_stage_of_run(composed: DictConfig, overrides: Sequence[str]) -> tuple[RunConfig, list[RunConfig]]:
    """The stage that a command line names, and the configs of all tasks. Raises `ConfigError`."""
    check_no_study(overrides)
    config = resolve(composed)
    for_all = overrides_for_all_tasks(overrides)
    if learns_all_at_once(config):
        chosen = [item for item in overrides if item not in for_all]
        if chosen:
            raise ConfigError(f"strategy=joint has one stage for all tasks: leave out what chooses one, {chosen[0]}")
        configs = compose_run(for_all)
        config = stages_to_run(configs)[0]
    else:
        configs = compose_run(for_all, current=config)
        config = next(each for each in configs if each.stage.name == config.stage.name)  # at its place in `learn`
    return config, configs


def overrides_for_all_tasks(overrides: Sequence[str]) -> list[str]:
    """What of a stage's overrides holds for the other tasks too: all but its choice and recipe."""
    return [item for item in overrides if not item.lstrip("~+").startswith(OF_ONE_TASK)]


def check_overrides(overrides: Sequence[str]) -> None:
    """Raises `ConfigError` for one that can only be meant for a single stage, where all of a run are asked for."""
    for override in overrides:
        if override.lstrip("~+").startswith((*OF_ONE_TASK, "resume=")):
            raise ConfigError(
                f"overrides of the whole curriculum must hold for every stage, got {override.lstrip('+')}; "
                "run that stage with python -m kuavo_train, or edit its file"
            )


def check_no_study(overrides: Sequence[str]) -> None:
    """Raises `ConfigError` for one that is meant for the cells of a study, where a single run is asked for."""
    for override in overrides:
        if override.lstrip("~+").startswith(OF_A_STUDY):
            raise ConfigError(
                f"engine chooses what trains the cells of a study (python -m kuavo_train.study), got {override} for a "
                "single run; leave it out"
            )


def split_varied(
    overrides: Sequence[str], varied: Mapping[str, Sequence[str]], also: Sequence[str] = ()
) -> tuple[dict[str, list[str]], list[str]]:
    """The values of the keys of which a run each is wanted, and all other overrides.

    Args:
        varied: keys that are varied in any case, and their default values.
        also: keys that are varied even if they are given a single value, as each is that is given several.
    """
    values, others = {key: list(default) for key, default in varied.items()}, []
    for word, override in ((word, parsed(word)) for word in overrides):
        key, several = override.key_or_group, override.is_sweep_override()
        if several:
            values[key] = list(dict.fromkeys(override.sweep_string_iterator()))
        elif key in varied or key in also:
            values[key] = [override.get_value_element_as_str() if key in also else str(override.value())]
        else:
            others.append(word)
    return values, others
