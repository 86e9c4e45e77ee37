"""What the project says about its speed and memory, measured.

    python -m benchmarks                               # the short ones, meant for a quarter of an hour
    python -m benchmarks training_step latency         # some
    python -m benchmarks training_step size=embedded rounds=9
    python -m benchmarks remember_colour depth=8       # what the memory learns; a command of its own, as the next
    python -m benchmarks.memory_suite task=colour      # the same through kuavo_train, on cues nobody tuned for

Results go to benchmarks/RESULTS.md and benchmarks/results.json (folder=… elsewhere), each in the place of the last.
"""

import dataclasses
import importlib
import os
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing measured here needs the hub

SHORT = ("training_step", "latency", "arithmetic", "memory_cost", "data_path", "scaling", "step_memory")
LONG = ("decoding", "encoder_precision", "end_to_end", "flow_draws", "memory_joins", "precision", "start_up")


def main(words: Sequence[str]) -> int:
    names = [word for word in words if "=" not in word]
    if {"-h", "--help", "help"} & set(words):
        print(__doc__)
        return 0
    if names[:1] == ["remember_colour"]:
        return importlib.import_module("benchmarks.remember_colour").main(words[1:])
    try:
        folder, todo = parse(names or SHORT, [word for word in words if "=" in word])
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    from benchmarks.measuring import as_markdown, store  # after the environment is set

    for name, settings in todo.items():
        module = importlib.import_module(f"benchmarks.{name}")
        print(f"{name} …", flush=True)
        tables = module.run(settings)
        for table in tables:
            print(f"\n{table.title}\n\n{as_markdown(table.rows)}\n", flush=True)
        store(folder, name, (module.__doc__ or "").strip(), tables)
    print(folder / "RESULTS.md")
    return 0


def parse(names: Sequence[str], assignments: Sequence[str]) -> tuple[Path, dict[str, Any]]:
    """Where the results go, and the settings of each benchmark. Raises ValueError naming key and value.

    A key is given to every benchmark that has it; at least one must.
    """
    given = dict(assignment.split("=", 1) for assignment in assignments)
    folder = Path(given.pop("folder", Path(__file__).parent))
    todo: dict[str, Any] = {}
    known: set[str] = set()
    for name in names:
        if name not in SHORT + LONG:
            raise ValueError(
                f"a benchmark must be one of {', '.join([*SHORT, *LONG, 'remember_colour'])}, got {name!r}"
            )
        settings = importlib.import_module(f"benchmarks.{name}").Settings
        types = typing.get_type_hints(settings)
        mine = {field.name for field in dataclasses.fields(settings)} & set(given)
        todo[name] = settings(**{key: _value(key, given[key], types[key]) for key in mine})
        known |= set(types)
    for key in given:
        if key not in known:
            raise ValueError(
                f"a key of {', '.join(names)} must be one of folder, {', '.join(sorted(known))}, got {key!r}"
            )
    return folder, todo


def _value(key: str, text: str, kind: Any) -> Any:
    """`text` as a number, a word, or a tuple of them with commas between."""
    try:
        if typing.get_origin(kind) is tuple:
            return tuple(typing.get_args(kind)[0](item) for item in text.split(","))
        return kind(text)
    except ValueError as error:
        raise ValueError(f"{key} must be {getattr(kind, '__name__', kind)}, got {text!r}") from error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
