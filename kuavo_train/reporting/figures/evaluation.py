"""The figures of an evaluation, from the content of evaluation_results.json."""

from collections.abc import Callable
from itertools import cycle

import numpy as np
from matplotlib.figure import Figure

from kuavo_train.reading import Json
from kuavo_train.reporting.figures.style import INK, MUTED, TASK_COLOURS, WIDTH, short_name


def evaluation_figures(found: Json) -> dict[str, Callable[[], Figure | None]]:
    """Name → drawing."""
    return {
        "success": lambda: bars(found, "success", "episodes that succeeded (%)"),
        "progress": lambda: bars(found, "progress", "sub-goals reached (%)"),
        "funnel": lambda: funnels(found),
    }


def demonstration_figures(found: Json) -> dict[str, Callable[[], Figure | None]]:
    """As `evaluation_figures`, of an evaluation on demonstrations."""
    return {"error": lambda: error_bars(found), "horizon": lambda: horizons(found)}


def error_bars(found: Json) -> Figure:
    """For each task a bar for every row: action error over all dimensions, with its interval."""
    rows = [{**row, "tasks": [{"error": task["groups"][0]["error"]} for task in row["tasks"]]} for row in found["rows"]]
    return bars({**found, "rows": rows}, "error", "mean absolute action error", scale=1)


def horizons(found: Json) -> Figure:
    """Error over the steps of the planned chunk: a panel for each task, a line for each checkpoint as it is."""
    whole = [row for row in found["rows"] if row["whole"]]
    tasks = found["tasks"]
    figure = Figure(figsize=(WIDTH, 1.75 * len(tasks) + 0.9), layout="constrained")
    panels = figure.subplots(len(tasks), 1, squeeze=False, sharex=True)[:, 0]
    for place, (axes, task) in enumerate(zip(panels, tasks, strict=True)):
        for colour, row in zip(cycle(TASK_COLOURS), whole, strict=False):
            error = [np.nan if value is None else value for value in row["tasks"][place]["groups"][0]["horizon"]]
            axes.plot(range(1, len(error) + 1), error, color=colour, label=row["name"])
            axes.axvline(row["n_action_steps"] + 0.5, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        axes.set_title(task, fontsize=10, color=INK, loc="left")
        axes.set_ylim(bottom=0)
    panels[-1].set_xlabel("step of the planned chunk; carried out up to the dashed line")
    figure.supylabel("action error", fontsize=10, color=MUTED)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=min(3, len(whole)))
    return figure


def bars(found: Json, measure: str, label: str, *, scale: float = 100) -> Figure:
    """For each task a bar for every row, with its interval."""
    tasks, rows = found["tasks"], found["rows"]
    height = 0.84 / len(rows)
    figure = Figure(
        figsize=(WIDTH, len(tasks) * (0.3 + 0.27 * len(rows)) + 0.9 + 0.12 * len(rows)), layout="constrained"
    )
    axes = figure.subplots()
    for place, (colour, row) in enumerate(zip(cycle(TASK_COLOURS), rows, strict=False)):
        for y, of_task in enumerate(row["tasks"]):
            if of_task[measure] is None:
                continue
            estimate, low, high = (of_task[measure][key] for key in ("estimate", "low", "high"))
            at = y - 0.42 + height * (place + 0.5)
            axes.barh(at, scale * estimate, 0.88 * height, color=colour, label=row["name"] if y == 0 else None)
            if low is not None:
                axes.plot([scale * low, scale * high], [at, at], color=INK, linewidth=1.3)
    axes.set_yticks(range(len(tasks)), [short_name(task) for task in tasks], color=INK)
    axes.set(xlim=(0, 101 if scale == 100 else None), ylim=(len(tasks) - 0.5, -0.5), xlabel=label)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=min(2, len(rows)))
    return figure


def funnels(found: Json) -> Figure | None:
    """How far episodes get: per task the share that reached each sub-goal, a line for every checkpoint as it is."""
    whole = [row for row in found["rows"] if row["whole"]]
    tasks = [n for n, _ in enumerate(found["tasks"]) if any(row["tasks"][n]["funnel"] for row in whole)]
    if not tasks:
        return None
    figure = Figure(figsize=(WIDTH, 1.75 * len(tasks) + 0.7), layout="constrained")
    panels = figure.subplots(len(tasks), 1, squeeze=False)[:, 0]
    for axes, place in zip(panels, tasks, strict=True):
        for colour, row in zip(cycle(TASK_COLOURS), whole, strict=False):
            funnel = row["tasks"][place]["funnel"]
            shares = [100.0, *(100 * reached["estimate"] for reached in funnel)]
            axes.plot(range(len(shares)), shares, "o-", color=colour, markersize=4, label=row["name"])
            names = ["begun", *(reached["name"].replace("_", " ") for reached in funnel)]
            axes.set_xticks(range(len(names)), [_two_lines(name) for name in names], color=INK, fontsize=8.5)
        axes.set_title(found["tasks"][place], fontsize=10, color=INK, loc="left")
        axes.set(ylim=(-4, 104))
    figure.supylabel("episodes that got there (%)", fontsize=10, color=MUTED)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=min(3, len(whole)))
    return figure


def _two_lines(name: str) -> str:
    """Broken at the space nearest to its middle."""
    spaces = [n for n, letter in enumerate(name) if letter == " "]
    if len(name) <= 9 or not spaces:
        return name
    middle = min(spaces, key=lambda n: abs(n - len(name) / 2))
    return f"{name[:middle]}\n{name[middle + 1 :]}"
