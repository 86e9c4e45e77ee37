"""Where a command line's YAML files lie: those of configs/, and a user's own.

    tasks_dir=DIR                      the tasks are DIR/*.yaml, in place of configs/tasks/*.yaml
    --config-dir DIR, config_dir=DIR   beside configs/: DIR/tasks/*.yaml are more tasks, DIR/policy/*.yaml policies, …

Both may be given. DIR is relative to the folder that the command is called in.
"""

import re
import shlex
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from kuavo_train.config import CONFIG_FOLDER, RunConfig
from kuavo_train.errors import ConfigError, one_of, require

FIRST_TASK = "first"
"""The choice in the group `task` where nothing is chosen: what is learnt first."""


@dataclass(frozen=True)
class TaskFile:
    """A task and the recipe of its stage, as its file has them."""

    path: Path
    content: DictConfig
    task: str | None  # the task's own name
    index: int

    @classmethod
    def read(cls, path: Path) -> "TaskFile":
        """Raises `ConfigError` for a file that is no task's, or lacks its place."""
        usable = re.fullmatch(r"[\w.-]+", path.stem) is not None and path.stem != FIRST_TASK
        require(usable, str(path), f"be named by letters, digits and . _ -, and not {FIRST_TASK}", path.stem)
        try:
            content = OmegaConf.load(path)
            index, name = (OmegaConf.select(content, f"stage.{key}") for key in ("index", "name"))
        except (YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
            raise ConfigError(
                f"{path} must be YAML with the stage of a task, got {' '.join(str(error).split())}"
            ) from error
        require(isinstance(index, int), f"{path}: stage.index", "be a whole number, the place in the order", index)
        return cls(path, content, name, index)  # type: ignore[arg-type]

    @property
    def choice(self) -> str:
        """What `task=` is given: tasks/<the file's name>."""
        return f"tasks/{self.path.stem}"


@dataclass(frozen=True)
class ConfigFolders:
    """
    Attributes:
        base: with train.yaml and the groups.
        tasks_dir: of the tasks, in place of those in `base`.
        config_dir: of groups and tasks beside those.
    """

    base: Path = CONFIG_FOLDER
    tasks_dir: str | None = None
    config_dir: str | None = None

    @classmethod
    def of(cls, config: RunConfig) -> "ConfigFolders":
        return cls(tasks_dir=config.tasks_dir, config_dir=config.config_dir)

    @cached_property
    def beside(self) -> list[Path]:
        """The folders added to the base: one, or none. Raises `ConfigError` where what is given is no such folder."""
        if self.config_dir is None:
            return []
        folder = _folder("config_dir", self.config_dir)
        rule = "hold folders of YAML files as configs/ does (tasks/*.yaml, policy/*.yaml; of tasks alone: tasks_dir=…)"
        require(any(folder.glob("[!.]*/[!.]*.yaml")), "config_dir", rule, self.config_dir)
        for ours in self.base.rglob("*.yaml"):
            name = ours.relative_to(self.base)
            taken = name.parts[0] != "tasks" and (folder / name).is_file()
            require(not taken, "config_dir", f"give its files other names than {self.base} has", str(name))
        return [folder]

    @property
    def task_folders(self) -> list[Path]:
        first = self.base / "tasks" if self.tasks_dir is None else _folder("tasks_dir", self.tasks_dir)
        return [first, *(folder / "tasks" for folder in self.beside)]

    @cached_property
    def task_files(self) -> list[TaskFile]:
        """In the order of learning (their `stage.index`). Raises `ConfigError`, also for two of one name or place."""
        first, *beside = (_yaml_files(folder) for folder in self.task_folders)
        key, value = ("tasks_dir", self.tasks_dir) if self.tasks_dir is not None else ("configs", str(self.base))
        require(bool(first), key, "hold at least one task file (*.yaml)", value)
        files = [TaskFile.read(path) for path in [*first, *(path for paths in beside for path in paths)]]
        _check_unique("the file's name", [(file.path.stem, file) for file in files])
        _check_unique("stage.name", [(file.task, file) for file in files])
        _check_unique("stage.index", [(file.index, file) for file in files])
        return sorted(files, key=lambda file: file.index)

    def is_group(self, key: str) -> bool:
        return key == "task" or any((folder / key).is_dir() for folder in (self.base, *self.beside))

    def check_choice(self, group: str, value: str) -> None:
        """Raises `ConfigError` for a choice that the group does not have."""
        if group == "task":
            allowed = [*(file.choice for file in self.task_files), FIRST_TASK]
        else:
            found = (path for folder in (self.base, *self.beside) for path in _yaml_files(folder / group))
            allowed = sorted(path.stem for path in found)
        one_of(group, value, allowed)

    def register_tasks(self) -> None:
        """Let Hydra find the tasks, and no others, as choices of the group `task`."""
        store = ConfigStore.instance()
        store.repo.pop("task", None)
        for file in self.task_files:
            # Other than with Hydra's own reading, `# @package _global_` in the file's first line makes no difference.
            store.store(group="task/tasks", name=file.path.stem, node=file.content, package="_global_")
        first = {"defaults": [self.task_files[0].choice]}
        store.store(group="task", name=FIRST_TASK, node=first, package="_global_")

    @property
    def for_hydra(self) -> list[str]:
        """The override that lets Hydra look beside the base."""
        found = [quoted(f"file://{folder.absolute()}") for folder in self.beside]
        return [f"hydra.searchpath=[{','.join(found)}]"] if found else []

    @property
    def words(self) -> list[str]:
        """What a command line names the folders by, as typed in a shell."""
        given = (("tasks_dir", self.tasks_dir), ("config_dir", self.config_dir))
        return [shlex.quote(f"{key}={folder}") for key, folder in given if folder is not None]

    def choice_of(self, task: str) -> str:
        """What `task=` is given for the task of that name."""
        return next((file.choice for file in self.task_files if file.task == task), f"tasks/{task}")

    def __str__(self) -> str:
        first = f"{self.base.name}/tasks" if self.tasks_dir is None else self.tasks_dir
        return " and ".join([first, *(f"{folder}/tasks" for folder in self.beside)])


def quoted(text: str) -> str:
    """As a value of an override, whatever it holds."""
    return "'" + text.replace("'", "\\'") + "'"


def _folder(key: str, text: str) -> Path:
    require(Path(text).is_dir(), key, "be a folder, relative to the one that the command is called in", text)
    return Path(text)


def _yaml_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("[!.]*.yaml"))


def _check_unique(key: str, said: Sequence[tuple[Hashable, TaskFile]]) -> None:
    """Raises `ConfigError` where two files say the same."""
    by_value: dict[Hashable, TaskFile] = {}
    for value, file in said:
        other = by_value.setdefault(value, file)
        require(other is file or value is None, f"{other.path} and {file.path}: {key}", "be unique", value)
