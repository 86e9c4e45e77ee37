"""`key=value` arguments of kuavo_sim's commands."""

import sys
from collections.abc import Callable
from typing import Any

# Any: every key's value is of a type of its own, that which its reader makes of the text.
Readers = dict[str, Callable[[str], Any]]
Arguments = dict[str, Any]


def parse_arguments(words: list[str], types: Readers, usage: str) -> Arguments:
    """Turn `["task=all", "episodes=40"]` into a dictionary; `types` holds each allowed key and how its value is read.

    Prints `usage` and exits for --help; raises ValueError naming key, rule and value otherwise.
    """
    if any(word in ("-h", "--help", "help") for word in words):
        print(usage.strip())
        sys.exit(0)
    arguments: Arguments = {}
    for word in words:
        key, separator, value = word.partition("=")
        if not separator or key not in types:
            raise ValueError(f"arguments are key=value with a key out of {', '.join(types)}; got {word!r}")
        if key in arguments:
            raise ValueError(f"{key} is given twice: {arguments[key]!r} and {value!r}")
        try:
            arguments[key] = types[key](value)
        except ValueError as error:
            raise ValueError(f"{key}={value!r} cannot be read: {error}") from error
    return arguments


def boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError("must be true or false")
    return text.lower() == "true"
