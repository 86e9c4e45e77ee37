"""The figures of the probes, from what they stored (see `kuavo_train.probes`)."""

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from kuavo_train.metrics.number_format import number, percent
from kuavo_train.reading import Json
from kuavo_train.reporting.figures.style import INK, MUTED, TASK_COLOURS, WIDTH, log_if_wide, short_name

PALE = "#a9b8c9"


def probe_figures(probes: Mapping[str, Json]) -> dict[str, Callable[[], Figure | None]]:
    """Name → drawing, of the probes that were run."""
    drawings: dict[str, tuple[str, Callable[[Json], Figure | None]]] = {
        "recovery": ("recovery", recovery_curves),
        "instruction_swap": ("instruction_swap", instruction_map),
        "memory_loss": ("memory", memory_bars),
        "memory_decisions": ("memory", decision_bars),
    }
    return {name: partial(draw, probes[of]) for name, (of, draw) in drawings.items() if of in probes}


def recovery_curves(record: Json) -> Figure:
    """For each earlier task the held-out loss while it is learnt again, beside learning it for the first time."""
    tasks = record["tasks"]
    figure = Figure(figsize=(WIDTH, 1.75 * len(tasks) + 0.9), layout="constrained")
    panels = figure.subplots(len(tasks), 1, sharex=True, squeeze=False)[:, 0]
    for axes, task in zip(panels, tasks, strict=True):
        for key, label, colour in (
            ("before", "before it was learnt", PALE),
            ("final", "the final policy", TASK_COLOURS[0]),
        ):
            axes.plot(task["steps"], task[key], "o-", color=colour, markersize=3, label=f"from {label}")
        axes.axhline(task["loss_when_learnt"], color=INK, linewidth=1, linestyle=(0, (4, 3)), label="loss when learnt")
        log_if_wide(axes, [*task["before"], *task["final"], task["loss_when_learnt"]])
        axes.set_title(task["task"], fontsize=10, color=INK, loc="left")
        axes.set_ylabel("held-out loss")
    panels[-1].set_xlabel("steps on the task alone")
    panels[-1].xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def instruction_map(record: Json) -> Figure | None:
    """How far the predicted action moves on a task's frames (rows) when another's instruction (columns) is read."""
    tasks = record["tasks"]
    names = [task["task"] for task in tasks]
    if len(names) < 2:
        return None
    values = np.full((len(names), len(names) + 1), np.nan)
    for row, task in enumerate(tasks):
        values[row, -1] = task["noise"]["estimate"]
        for swap in task["swaps"]:
            values[row, names.index(swap["instruction_of"])] = swap["change"]["estimate"]
    figure = Figure(figsize=(WIDTH, 0.62 * len(names) + 1.3), layout="constrained")
    axes = figure.subplots()
    darkest = 1.35 * float(np.nanmax(values))
    axes.imshow(values, cmap="Blues", vmin=0, vmax=darkest, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        text, ink = ("own", INK) if np.isnan(value) else (number(value), "white" if value > 0.6 * darkest else INK)
        axes.text(column, row, text, ha="center", va="center", color=ink)
    axes.axvline(len(names) - 0.5, color="white", linewidth=5)
    axes.set_xticks(range(len(names) + 1), [*map(short_name, names), "other\nnoise"], color=INK, fontsize=9)
    axes.set_yticks(range(len(names)), [short_name(name) for name in names], color=INK, fontsize=9)
    axes.set(xlabel="the instruction read", ylabel="the frames of")
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    axes.xaxis.set_label_position("top")
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    return figure


def memory_bars(record: Json) -> Figure:
    """After the last stage: what losing the memory, and having another episode's, does to each task's held-out loss."""
    tasks = record["stages"][-1]["tasks"]
    titles = {"reset": "reset at every query", "swapped": "of another episode"}
    figure = Figure(figsize=(WIDTH, 0.5 * len(tasks) + 1.2), layout="constrained")
    panels = figure.subplots(1, len(titles), sharey=True)
    for axes, colour, (kind, title) in zip(panels, (PALE, TASK_COLOURS[1]), titles.items(), strict=True):
        for y, task in enumerate(tasks):
            change = task["loss_change"][kind]
            axes.barh(y, 100 * change["estimate"], 0.55, color=colour)
            edge = change["estimate"]
            if change["low"] is not None:
                axes.plot([100 * change["low"], 100 * change["high"]], [y, y], color=INK, linewidth=1.3)
                edge = max(edge, change["high"])
            axes.text(100 * max(edge, 0), y, f" {percent(change['estimate'])}", va="center", fontsize=9)
        axes.axvline(0, color=INK, linewidth=1)
        axes.set_title(title, fontsize=10, color=INK, loc="left")
        axes.set(ylim=(len(tasks) - 0.5, -0.5))
        axes.margins(x=0.32)
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
    panels[0].set_yticks(range(len(tasks)), [short_name(task["task"]) for task in tasks], color=INK)
    figure.supxlabel("change of held-out loss (%)", fontsize=10, color=MUTED)
    return figure


def decision_bars(record: Json) -> Figure | None:
    """After the last stage: how often the action at the cue's decision point is the one the memory's cue demands."""
    tasks = [task for task in record["stages"][-1]["tasks"] if task["decision"]]
    if not tasks:
        return None
    figure = Figure(figsize=(WIDTH, 0.85 * len(tasks) + 1.5), layout="constrained")
    axes = figure.subplots()
    kinds = {"on": "memory on", "reset": "reset", "swapped": "swapped: the donor's choice"}
    height = 0.8 / len(kinds)
    colours = dict(zip(kinds, (TASK_COLOURS[0], PALE, TASK_COLOURS[1]), strict=True))
    for y, task in enumerate(tasks):
        rows = task["decision"]["interventions"]
        for place, kind in enumerate(kinds):
            if kind not in rows:
                continue
            row, at = rows[kind], y - 0.4 + height * (place + 0.5)
            axes.barh(at, row["accuracy"], 0.86 * height, color=colours[kind], label=kinds[kind] if y == 0 else None)
            axes.plot([row["low"], row["high"]], [at, at], color=INK, linewidth=1.3)
            ink = INK if colours[kind] == PALE else "white"
            axes.text(0.01, at, f"{row['correct']}/{row['n']}", va="center", color=ink, fontsize=8.5)
        if task["decision"]["chance"] is not None:
            axes.plot([task["decision"]["chance"]] * 2, [y - 0.42, y + 0.42], color=MUTED, linewidth=1, linestyle=":")
    axes.set_yticks(range(len(tasks)), [short_name(task["task"]) for task in tasks], color=INK)
    axes.set(xlim=(0, 1.02), ylim=(len(tasks) - 0.5, -0.5), xlabel="decides as the cue in its memory demands")
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure
