"""Variants take turns; what is kept are medians, spread and the ratio within a turn.

Whatever else the machine does then hits all variants alike. Wall-clock is what a user waits for; CPU time, summed
over threads, is what is left of it on a machine that others use as well.
"""

import json
import os
import platform
import statistics
import sys
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from kuavo_train.runs.files import write_json

LIBRARIES = ("torch", "lerobot", "transformers", "accelerate", "av", "numpy")


@dataclass(frozen=True)
class Spread:
    """The median of some repetitions, and their quartiles (least and greatest of fewer than four)."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        ordered = sorted(values)
        if len(ordered) < 4:
            low, high = ordered[0], ordered[-1]
        else:
            low, _, high = statistics.quantiles(ordered, n=4, method="inclusive")
        return cls(statistics.median(ordered), low, high)


@dataclass(frozen=True)
class Timing:
    """Seconds of every repetition."""

    wall: list[float]
    cpu: list[float]

    def times_as_fast_as(self, reference: "Timing") -> tuple[Spread, Spread]:
        """In wall-clock and in CPU time: reference / this, repetition by repetition."""
        return (
            Spread.of([theirs / mine for mine, theirs in zip(self.wall, reference.wall, strict=True)]),
            Spread.of([theirs / mine for mine, theirs in zip(self.cpu, reference.cpu, strict=True)]),
        )


@dataclass(frozen=True)
class Table:
    """Rows of equal keys; the keys are the headings, the values text, numbers or a `Spread`."""

    title: str
    rows: list[dict[str, Any]]


def alternate(
    variants: Mapping[str, Callable[[], object]], *, rounds: int, warm_up: int = 1, block: int = 1
) -> dict[str, Timing]:
    """Run all variants in turn, `rounds` times after `warm_up` turns that do not count.

    Args:
        block: how often a variant runs in its turn; its time is divided by it.
    """
    timings = {name: Timing([], []) for name in variants}
    for turn in range(warm_up + rounds):
        for name, variant in variants.items():
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(block):
                variant()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            if turn >= warm_up:
                timings[name].wall.append(wall / block)
                timings[name].cpu.append(cpu / block)
    return timings


def speed_rows(timings: Mapping[str, Timing], *, reference: str, samples: int = 1) -> list[dict[str, Any]]:
    """A row per variant: its time, and how many times as fast as the reference it is."""
    rows = []
    for name, timing in timings.items():
        wall, cpu = timing.times_as_fast_as(timings[reference])
        rows.append(
            {
                "": name,
                "ms": milliseconds(timing.wall),
                "CPU ms": milliseconds(timing.cpu),
                "samples/s": samples / statistics.median(timing.wall),
                f"× {reference}": wall,
                "× in CPU time": cpu,
            }
        )
    return rows


def cost_rows(timings: Mapping[str, Timing], *, reference: str) -> list[dict[str, Any]]:
    """A row per variant: its time, and how many times the reference's it is."""
    rows = []
    for name, timing in timings.items():
        wall, cpu = timings[reference].times_as_fast_as(timing)
        rows.append(
            {
                "": name,
                "ms": milliseconds(timing.wall),
                "CPU ms": milliseconds(timing.cpu),
                f"time / {reference}": wall,
                "CPU time / same": cpu,
            }
        )
    return rows


def milliseconds(seconds: Sequence[float]) -> Spread:
    return Spread.of([1e3 * value for value in seconds])


def circumstances() -> dict[str, Any]:
    """Machine, versions and command: what a figure needs to be one."""
    return {
        "command": " ".join(["python -m benchmarks", *(word for word in sys.argv[1:] if "folder=" not in word)]),
        "machine": f"{os.cpu_count()} cores, {_processor()}",
        "load": round(os.getloadavg()[0], 1),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def store(folder: Path, name: str, about: str, tables: Sequence[Table]) -> None:
    """Put a benchmark's tables in the place of those of the same title; the others stay.

    results.json is the record, RESULTS.md its picture.
    """
    record = folder / "results.json"
    results = json.loads(record.read_text()) if record.is_file() else {}
    kept = results.get(name, {}).get("tables", {})
    new = {table.title: {**circumstances(), "rows": [_plain(row) for row in table.rows]} for table in tables}
    results[name] = {"about": about, "tables": {**kept, **new}}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(record, results)
    (folder / "RESULTS.md").write_text(_page(results))


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: asdict(value) if isinstance(value, Spread) else value for key, value in row.items()}


def _page(results: Mapping[str, Any]) -> str:
    parts = [
        "# Measured",
        "Written by `python -m benchmarks` (`make bench`); results.json holds the same numbers.\n"
        "Variants take turns; a figure is the median over the turns, in brackets the quartiles (of fewer than four\n"
        "turns: the least and the greatest). Ratios are taken within a turn. CPU time is summed over threads.\n"
        "The machine did other work beside, so that ratios say more than seconds, and CPU time more than wall-clock\n"
        "where the two differ.",
    ]
    for name in sorted(results):
        parts += [f"## {name}", results[name]["about"]]
        for title, table in results[name]["tables"].items():
            versions = ", ".join(f"{library} {number}" for library, number in table["versions"].items())
            where = f"{table['machine']}, load {table['load']}; {versions}"
            parts += [f"### {title}", as_markdown(table["rows"]), fill(f"`{table['command']}` on {where}.")]
    return "\n\n".join(parts) + "\n"


def fill(sentence: str) -> str:
    """Wrapped as all documents are."""
    return textwrap.fill(sentence, 120, break_long_words=False, break_on_hyphens=False)


def as_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: Any) -> str:
    if isinstance(value, Spread):
        value = asdict(value)
    if isinstance(value, Mapping):
        return f"{_number(value['median'])} ({_number(value['low'])} to {_number(value['high'])})"
    return _number(value) if isinstance(value, float) else "–" if value is None else str(value)


def _number(value: float) -> str:
    """Three significant digits, large numbers in full."""
    if abs(value) >= 100:
        return f"{value:,.0f}".replace(",", " ")
    return f"{value:.3g}" if abs(value) >= 1e-3 or value == 0 else f"{value:.1e}"
