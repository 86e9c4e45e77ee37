"""Records of the suite as a table."""

from collections.abc import Sequence
from typing import Any

from kuavo_train.metrics.intervals import wilson

HEAD = ("task", "situation", "memory", "seeds", "chance", "trained delays", "twice", "reset", "frozen", "donor")


def table(records: Sequence[dict[str, Any]]) -> str:
    """A row per task, situation and memory, its seeds pooled; rates with their 95 % Wilson interval."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault(tuple(record[key] for key in HEAD[:3]), []).append(record)
    rows = [[*HEAD, "CPU s", "steps"]]
    for group, runs in groups.items():
        rows.append(
            [
                *group,
                ",".join(str(run["seed"]) for run in runs),
                f"{runs[0]['chance']:.2f}",
                _rate(runs, "trained", "on", with_interval=True),
                _rate(runs, "twice", "on", with_interval=True),
                *(_rate(runs, "trained", name) for name in ("reset", "frozen", "swapped")),
                f"{sum(run['cpu_seconds'] for run in runs) / len(runs):.0f}",
                ",".join(str(steps) for steps in dict.fromkeys(run["steps"] for run in runs)),
            ]
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]])


def _rate(runs: Sequence[dict[str, Any]], part: str, intervention: str, *, with_interval: bool = False) -> str:
    if any(intervention not in run[part] for run in runs):
        return "–"
    right, n = (sum(run[part][intervention][key] for run in runs) for key in ("right", "n"))
    found = wilson(right, n)
    return f"{right}/{n}" + (f" [{found.low:.2f}, {found.high:.2f}]" if with_interval else "")
