"""The keys of the configuration: which there are, of what kind, and how a command line sets them.

Hydra wants a plus before a key that no YAML file holds, and merges a mapping into the one that is there. On our
command lines every key of the schema is set as it stands, and a mapping replaces the one before. A word that means
nothing is refused, with the nearest key that exists.
"""

import difflib
import math
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from functools import cache
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from kuavo_train.config import RunConfig
from kuavo_train.config_folders import ConfigFolders
from kuavo_train.errors import ConfigError, require
from kuavo_train.reading import JsonValue

Annotation = Any
"""Of a field: a class, or a union or a generic of classes, for which Python 3.12 has no common type."""

NEAREST = 3
OF_HYDRA = "hydra"  # its own keys begin with it
KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    tuple: "a list",
    dict: "a mapping",
}


def kind_of(key: str) -> Annotation:
    """The annotation of a key, `JsonValue` for one inside an open mapping, None for one that does not exist."""
    kind: Annotation = RunConfig
    for name in key.split("."):
        section = _section(kind)
        if section is None:
            return JsonValue if any(_is_open(each) for each in _alternatives(kind)) else None
        kind = _fields(section).get(name)
    return kind


def section_of(key: str) -> Annotation:
    """The dataclass that a key is a section of; None where it is none."""
    return _section(kind_of(key))


def optional_sections(section: Annotation = RunConfig, where: str = "") -> Iterator[tuple[str, Annotation]]:
    """Key and dataclass of every section that may be null."""
    for name, kind in _fields(section).items():
        if (inner := _section(kind)) is not None:
            if inner is not kind:
                yield f"{where}{name}", inner
            yield from optional_sections(inner, f"{where}{name}.")


def described(key: str) -> str:
    """What a value of the key must be, in words."""
    return in_words(kind_of(key))


def in_words(kind: Annotation) -> str:
    """A type as what a value of YAML must be."""
    names = []
    for each in _alternatives(kind):
        plain: Annotation = typing.get_origin(each) or each
        items = [KINDS[item] for item in typing.get_args(each)[:1] if plain in (list, tuple) and item in KINDS]
        word = KINDS.get(plain, "a mapping of settings" if is_dataclass(plain) else "null")
        names.append(f"{word} of {items[0].removeprefix('a ')}s" if items and items[0] != KINDS[str] else word)
    return " or ".join(names)


def fits(value: JsonValue, kind: Annotation) -> bool:
    """Whether a value of YAML is of the type; a type that says more than what stands in YAML takes any."""
    return any(_fits(value, each) for each in _alternatives(kind))


def _fits(value: JsonValue, kind: Annotation) -> bool:
    plain: Annotation = typing.get_origin(kind) or kind
    items = typing.get_args(kind)
    if plain is types.NoneType:
        return value is None
    if plain is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if plain in (bool, int, str):
        return isinstance(value, plain) and (plain is bool or not isinstance(value, bool))
    if plain not in (list, tuple):
        return True
    valid = isinstance(value, list | tuple) and (plain is list or not items or ... in items or len(value) == len(items))
    return valid and (not items or all(fits(item, items[0]) for item in value))


def check_key(key: str) -> None:
    """Raises `ConfigError` for one that does not exist, with those that may have been meant."""
    if kind_of(key) is None:
        raise ConfigError(f"{key} must be a key of the configuration, got one that is not; {_nearest(key)}")


def _nearest(key: str) -> str:
    last = key.rpartition(".")[2]
    keys = known_keys()
    of_that_name = [known for known in keys if known.rpartition(".")[2] == last]
    close = difflib.get_close_matches(key, keys, NEAREST, cutoff=0.6)
    close += [k for k in keys if k.rpartition(".")[2] in difflib.get_close_matches(last, _last_names(), NEAREST, 0.7)]
    found = list(dict.fromkeys([*of_that_name, *close]))[:NEAREST]
    return f"did you mean {' or '.join(found)}?" if found else "--cfg job shows all keys"


@cache
def _fields(section: Annotation) -> dict[str, Annotation]:
    """Name → annotation of a dataclass's fields, worked out once: each key of each configuration asks for it."""
    return typing.get_type_hints(section)


@cache
def known_keys() -> list[str]:
    return list(_keys_of(RunConfig))


def words_for_hydra(words: Sequence[str], folders: ConfigFolders) -> list[str]:
    """Overrides as a user types them → as Hydra takes them.

    Args:
        folders: of the configuration; theirs are the groups.

    Raises:
        ConfigError: a word that is no override, a key or a choice that does not exist.
    """
    return [taken for word in words for taken in _for_hydra(word, parsed(word), folders)]


@cache
def parsed(word: str) -> Override:
    """Raises `ConfigError` for a word that is no override."""
    require(not word.startswith("="), "arguments", "be key=value", word)
    try:
        return OverridesParser.create().parse_override(word)
    except HydraException as error:
        reason = " ".join(str(error).split("\nSee https")[0].split("\n")[1:] or [str(error)])
        raise ConfigError(
            f"arguments must be key=value, got {word!r} ({reason}); quote spaces, commas and brackets for the shell"
        ) from error


def _for_hydra(word: str, override: Override, folders: ConfigFolders) -> list[str]:
    key = override.key_or_group
    if key.split(".")[0] == OF_HYDRA or key.startswith(f"{OF_HYDRA}/"):
        return [word]
    if folders.is_group(key):
        chosen = not (override.is_delete() or override.is_sweep_override() or override.value() is None)
        if chosen:
            folders.check_choice(key, str(override.value()))
        return [word]
    check_key(key)
    kind = kind_of(key)
    is_open = any(_is_open(each) for each in _alternatives(kind))
    require(is_open or not override.is_delete(), key, f"be set to a value ({key}=…), not deleted", word)
    if override.is_delete() or override.is_add() or override.is_force_add() or override.is_sweep_override():
        return [word]
    value = override.value()
    if _section(kind) is not None:
        valid = value is None or isinstance(value, dict)
        require(valid, key, f"be {described(key)}, such as {key}.{next(_keys_of(_section(kind)))}=…", value)
    elif isinstance(value, dict) and is_open and kind is not JsonValue:
        return [f"++{key}=null", f"++{word}"]  # in place of what is there, if anything is
    return [f"++{word}"]


def _alternatives(kind: Annotation) -> tuple[Annotation, ...]:
    """Those of `A | B`, else the kind alone."""
    return typing.get_args(kind) if typing.get_origin(kind) in (types.UnionType, typing.Union) else (kind,)


def _section(kind: Annotation) -> Annotation:
    """The dataclass that a key of this kind is a section of; None where it is none."""
    return next((each for each in _alternatives(kind) if is_dataclass(each)), None)


def _is_open(kind: Annotation) -> bool:
    """Whether it may hold any keys."""
    return kind is JsonValue or typing.get_origin(kind) is dict


def _keys_of(section: Annotation) -> Iterator[str]:
    for name, kind in _fields(section).items():
        yield name
        if inner := _section(kind):
            yield from (f"{name}.{key}" for key in _keys_of(inner))


@cache
def _last_names() -> list[str]:
    return list({key.rpartition(".")[2] for key in known_keys()})
