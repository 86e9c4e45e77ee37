"""What every command line does alike: its words, Hydra around it, errors in one line, libraries kept quiet."""

import difflib
import logging
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError, safe_load

from kuavo_train.compose import folders_named, resolve
from kuavo_train.config import CONFIG_FOLDER, RunConfig
from kuavo_train.config_folders import quoted
from kuavo_train.errors import ConfigError, RunError, one_of, require
from kuavo_train.interruption import end_on_signals
from kuavo_train.keys import Annotation, parsed, words_for_hydra
from kuavo_train.reading import JsonValue

SETS_THE_FOLDER = {"run", "outputs", "profile", "policy", "task"}
"""What a sweep may vary so that its jobs write into folders of their own: a run is named by profile and policy."""


def option(meaning: str, default: Any = MISSING, *, takes: str | type | None = None) -> Any:
    """A field of a command's options; of `Any` type to a checker, as one of `dataclasses.field` without a default is.

    Args:
        meaning: what --help says of it.
        default: what it is when it is not given; without one it must be given.
        takes: for a field that is a dictionary: "NAME" for words whose key is no option (values are text), "PREFIX.KEY"
            for those that begin with PREFIX. (values are YAML), or a dataclass, for its fields.
    """
    about = {"meaning": meaning, "takes": takes}
    return field(default_factory=dict, metadata=about) if takes else field(default=default, metadata=about)


def parse[T](options: type[T], words: Sequence[str], *, help: str | None) -> T:
    """A command's options, a dataclass of `option` fields, from its `key=value` words.

    A field's type says how its value is read: text, a path, a number, one of several (`Literal`), or some of these with
    commas between (`tuple`). Rules beyond that are the dataclass's own.

    Raises:
        ConfigError: naming key, rule and value; of a key that does not exist the nearest.
        SystemExit: --help was given, and is shown.
    """
    if {"-h", "--help", "help"} & set(words):
        print(usage(options, help or ""))
        raise SystemExit(0)
    known = _arguments(options)
    given: dict[str, object] = {}
    mappings: dict[str, dict[str, object]] = {}
    for word in words:
        key, equals, text = word.partition("=")
        argument = _argument(known, key) if equals else None
        if argument is None:
            raise ConfigError(
                f"arguments must be key=value with a key of {', '.join(known)}, got {word!r}{nearest(key, known)}"
            )
        place = given if argument.within is None else mappings.setdefault(argument.field, {})
        name = key.removeprefix(argument.within or "")
        require(name not in place, key, "be given once", word)
        place[name] = _value(key, text, argument.kind)
    for argument in known.values():
        require(
            argument.default is not MISSING or argument.field in given | mappings, argument.field, "be given", "nothing"
        )
    return options(**given, **mappings)


def usage(options: type, help: str) -> str:
    """What --help shows: the command's docstring, then every key with its type, its meaning and its default."""
    rows = [(f"{key}={argument.type_name}", argument.described) for key, argument in _arguments(options).items()]
    width = max(len(row[0]) for row in rows)
    lines = [f"  {key.ljust(width)}  {described}".rstrip() for key, described in rows]
    return "\n".join([help.strip(), "", "Arguments:", "", *lines])


@dataclass(frozen=True)
class _Argument:
    """A key.

    Attributes:
        within: None for a field of its own; of one that is a dictionary what its keys begin with, "" for nothing.
        any_key: it stands for all keys that begin so.
    """

    field: str
    kind: Annotation
    meaning: str
    default: object
    within: str | None = None
    any_key: bool = False

    @property
    def type_name(self) -> str:
        kind, several = _item(self.kind)
        names = {str: "TEXT", Path: "PATH", int: "INTEGER", float: "NUMBER", bool: "true|false", JsonValue: "VALUE"}
        name = "|".join(get_args(kind)) if get_origin(kind) is Literal else names[kind]
        return f"{name},…" if several else name

    @property
    def described(self) -> str:
        if self.default is MISSING:
            return f"{self.meaning} (must be given)"
        if self.within is not None or self.default in (None, ()):
            return self.meaning
        values = self.default if isinstance(self.default, tuple) else (self.default,)
        shown = ",".join(str(each).lower() if isinstance(each, bool) else str(each) for each in values)
        return f"{self.meaning} (default {shown})"


def _arguments(options: type) -> dict[str, _Argument]:
    found = {}
    kinds = get_type_hints(options)
    for each in fields(options):
        meaning, takes = each.metadata["meaning"], each.metadata["takes"]
        if takes is None:
            found[each.name] = _Argument(each.name, kinds[each.name], meaning, each.default)
        elif isinstance(takes, str):
            prefix, dot, _ = takes.rpartition(".")
            found[takes] = _Argument(each.name, JsonValue if dot else str, meaning, None, f"{prefix}{dot}", True)
        else:
            inner = get_type_hints(takes)
            found |= {of.name: _Argument(each.name, inner[of.name], meaning, of.default, "") for of in fields(takes)}
    return found


def _argument(known: Mapping[str, _Argument], key: str) -> _Argument | None:
    """The one that takes the key: by name, or that with the longest beginning of those that stand for any key."""
    if key in known and not known[key].any_key:
        return known[key]
    takers = [each for each in known.values() if each.any_key and key.startswith(each.within or "")]
    return max(takers, key=lambda each: len(each.within or ""), default=None)


def nearest(key: str, keys: Iterable[str]) -> str:
    """For the end of an error: which of the keys may have been meant."""
    close = difflib.get_close_matches(key, [each for each in keys if each.islower()])
    return f"; did you mean {' or '.join(close)}?" if close else ""


def _item(kind: Annotation) -> tuple[Annotation, bool]:
    """A kind of value without None, and whether it is several of it."""
    if get_origin(kind) in (Union, UnionType):
        (kind,) = (each for each in get_args(kind) if each is not NoneType)
    return (get_args(kind)[0], True) if get_origin(kind) is tuple else (kind, False)


def _value(key: str, text: str, kind: Annotation) -> object:
    kind, several = _item(kind)
    if not several:
        return _single(key, text, kind)
    parts = text.split(",")
    require(len(set(parts)) == len(parts) and "" not in parts, key, "be values with commas between, each once", text)
    return tuple(_single(key, part, kind) for part in parts)


def _single(key: str, text: str, kind: Annotation) -> object:
    if get_origin(kind) is Literal:
        one_of(key, text, get_args(kind))
    elif kind is int:
        require(re.fullmatch(r"[+-]?\d+", text) is not None, key, "be a whole number", text)
        return int(text)
    elif kind is float:
        with suppress(ValueError):
            if math.isfinite(number := float(text)):
                return number
        raise ConfigError(f"{key} must be a number, got {text!r}")
    elif kind is bool:
        one_of(key, text, ("true", "false"))
        return text == "true"
    elif kind is Path:
        require(bool(text), key, "be a path", text)
        return Path(text)
    elif kind is JsonValue:
        try:
            return safe_load(text)
        except YAMLError as error:
            raise ConfigError(f"{key} must be a YAML value, got {text!r}") from error
    return text


def hydra_entry(function: Callable[[DictConfig, list[str]], int]) -> Callable[[], None]:
    """A command line around `function(composed config, overrides) -> exit status`, with errors in one line."""

    end_on_signals()

    @hydra.main(config_path=str(CONFIG_FOLDER), config_name="train", version_base="1.3")
    def entry(composed: DictConfig) -> None:
        def run() -> int:
            quieten_libraries()
            config = resolve(composed)
            check_folders(config)
            set_hub(config)
            return function(composed, list(HydraConfig.get().overrides.task))

        status = errors_in_one_line(run)
        if status:
            sys.exit(status)

    return lambda: sys.exit(errors_in_one_line(lambda: _run_under_hydra(entry)))


def _run_under_hydra(entry: Callable[[], None]) -> int:
    """Call Hydra with this process's command line; raises `ConfigError` for what Hydra refuses."""
    parser = get_args_parser()
    parser.error = _refuse_arguments  # type: ignore[method-assign]
    sys.argv[1:] = config_dir_as_key(sys.argv[1:])
    arguments = parser.parse_args(sys.argv[1:])
    only_one = [name for name in ("run", "multirun", "cfg", "info", "shell_completion") if getattr(arguments, name)]
    require(len(only_one) < 2, "arguments", "hold one of --cfg, --multirun and the like", only_one)
    if arguments.multirun:
        check_sweep([parsed(word) for word in arguments.overrides])
    folders = folders_named(arguments.overrides)
    folders.register_tasks()
    words = {word: words_for_hydra([word], folders) for word in arguments.overrides}
    sys.argv[1:] = [each for word in sys.argv[1:] for each in words.get(word, [word])]
    sys.argv[1:1] = [each for folder in folders.beside for each in ("--config-dir", str(folder))]
    try:
        with _hydra_raises():
            entry()
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(" ".join(str(error).split())) from error
    return 0


def check_sweep(overrides: Sequence[Override]) -> None:
    """Raises `ConfigError` for jobs that would meet in one folder, where the second is refused after the first."""
    swept = [each.key_or_group for each in overrides if each.is_sweep_override()]
    named = any(each.key_or_group == "run" and "${" in str(each.value()) for each in overrides)
    if swept and not named and not {*swept} & SETS_THE_FOLDER:
        raise ConfigError(
            f"-m must give each job a run of its own, got {', '.join(swept)} varied in one run; add "
            f"'run=NAME-${{{swept[0]}}}', or compare strategies and seeds with python -m kuavo_train.study"
        )


def config_dir_as_key(words: Iterable[str]) -> list[str]:
    """Hydra's `--config-dir DIR` said as config_dir=DIR. Raises `ConfigError` where DIR is missing."""
    given, taken = iter(words), []
    for word in given:
        option, _, folder = word.partition("=")
        if option in ("--config-dir", "-cd"):
            folder = folder or next(given, "")
            require(bool(folder), "--config-dir", "be followed by a folder", word)
            word = f"config_dir={quoted(folder)}"
        taken.append(word)
    return taken


def _refuse_arguments(message: str) -> NoReturn:
    raise ConfigError(f"arguments must be key=value or options of --help, got {message}; options such as -m go first")


@contextmanager
def _hydra_raises() -> Iterator[None]:
    """Hydra prints what is wrong in its own words, and ends the process, unless this variable is set."""
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        os.environ.pop("HYDRA_FULL_ERROR") if before is None else os.environ.update(HYDRA_FULL_ERROR=before)


def errors_in_one_line(function: Callable[[], int]) -> int:
    """The exit status of `function`; an error that the user can correct is one line instead of a traceback."""
    try:
        with own_modules():
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


@contextmanager
def own_modules() -> Iterator[None]:
    """Let modules of the user's own be found in the current folder, for a strategy or an environment.

    `python -m` looks there by itself, an installed command does not. Last, so that no file hides a library.
    """
    before, here = sys.path[:], os.getcwd()
    if here not in before:
        sys.path.append(here)
    try:
        yield
    finally:
        sys.path[:] = before


def quieten_libraries() -> None:
    """A line on stdout for every request to the hub, and for every video file that is opened to be written."""
    for name in ("httpx", "lerobot"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger().setLevel(logging.WARNING)  # LeRobot logs how it scales the learning rate without a name


def check_folders(config: RunConfig) -> None:
    """Raises `ConfigError` where what is to be a folder is a file, or lies below one."""
    for key, path in (("outputs", config.outputs), ("data.root", config.data.root)):
        there = next(each for each in (Path(path).absolute(), *Path(path).absolute().parents) if each.exists())
        require(there.is_dir(), key, f"be a folder, or a place for one ({there} is a file)", path)


def set_hub(config: RunConfig) -> None:
    """Where the hub is, and whether it is used. Its library reads both once, when it is imported, which is later."""
    if config.hf_endpoint is not None:
        os.environ["HF_ENDPOINT"] = config.hf_endpoint
    if config.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
