"""YAML files and overrides → typed configs, one for every task of the curriculum.

`task=tasks/task2_weighing` is a Hydra group override; each file of configs/tasks/ gets a two-line alias, so
adding a task is adding a file.
"""

import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from kuavo_train.config import (
    CONFIG_FOLDER,
    ConfigError,
    RunConfig,
    RunError,
    StageConfig,
    check_curriculum,
    require,
    resolve,
)


def task_files(folder: Path = CONFIG_FOLDER) -> list[Path]:
    """The files of configs/tasks/ in the order of learning (their `stage.index`)."""
    files = sorted((folder / "tasks").glob("*.yaml"))
    require(bool(files), str(folder / "tasks"), "hold at least one task file", "none")
    return sorted(files, key=lambda file: OmegaConf.load(file).stage.index)


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
        configs = [by_name[name] for name in by_name if name in learn]
    check_curriculum([config.stage for config in configs])
    return configs


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
    stage = replace(first.stage, name="joint", index=1, replay={"joint": 1.0})
    passes = {config.stage.name: config.training.epochs for config in configs}
    return [replace(first, stage=stage, training=training, passes=passes)]


def compose_stage(composed: DictConfig, overrides: Sequence[str]) -> tuple[RunConfig, list[StageConfig]]:
    """The stage that a command line asks for, and the curriculum it belongs to. Raises `ConfigError`."""
    config = resolve(composed)
    configs = compose_run(overrides_for_all_tasks(overrides), current=config)
    if config.mixture == "all_tasks":
        for override in overrides:
            if override.startswith(("task=", "stage.")):
                raise ConfigError(f"strategy=joint has one stage for all tasks: leave out what chooses one, {override}")
        config = stages_to_run(configs)[0]
    return config, [other.stage for other in configs]


def overrides_for_all_tasks(overrides: Sequence[str]) -> list[str]:
    """What of a stage's overrides holds for the other tasks too: all but its choice and recipe."""
    return [item for item in overrides if not item.lstrip("~+").startswith(("task=", "stage.", "stage="))]


def hydra_entry(function: Callable[[DictConfig, list[str]], int]) -> Callable[[], None]:
    """A command line around `function(composed config, overrides) -> exit status`, with errors in one line."""

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that nothing half-written stays

    @hydra.main(config_path=str(CONFIG_FOLDER), config_name="train", version_base="1.3")
    def entry(composed: DictConfig) -> None:
        def run() -> int:
            set_hub(resolve(composed))
            return function(composed, list(HydraConfig.get().overrides.task))

        status = errors_in_one_line(run)
        if status:
            sys.exit(status)

    register_task_aliases()
    return entry


def errors_in_one_line(function: Callable[[], int]) -> int:
    """The exit status of `function`; what the user can correct is told in a line instead of a traceback."""
    try:
        return function()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def set_hub(config: RunConfig) -> None:
    """Where the hub is asked, and whether. The hub's library reads both once, when it is imported, which is later."""
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line on stdout for each of its requests otherwise
    if config.hf_endpoint is not None:
        os.environ["HF_ENDPOINT"] = config.hf_endpoint
    if config.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
