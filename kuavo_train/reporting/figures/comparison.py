"""The figures of a comparison, from the content of comparison.json."""

from collections.abc import Callable
from functools import partial
from itertools import cycle

from matplotlib.figure import Figure

from kuavo_train.reading import Json
from kuavo_train.reporting.figures.run import heat_map
from kuavo_train.reporting.figures.style import INK, MUTED, TASK_COLOURS, WIDTH, draw_limits, short_name


def comparison_figures(comparison: Json) -> dict[str, Callable[[], Figure | None]]:
    """Name → drawing; `matrix_<n>` is that of the n-th run."""
    runs = [{**run, "limits": comparison["limits"]} for run in comparison["runs"]]
    return {
        "stability_plasticity": lambda: stability_plasticity(comparison),
        "forgetting": lambda: forgetting_by_strategy(comparison),
        "success": lambda: success_by_strategy(comparison),
        **{f"matrix_{place}": partial(heat_map, run, "loss") for place, run in enumerate(runs)},
    }


def stability_plasticity(comparison: Json) -> Figure | None:
    """A strategy's loss when learnt (better to the right) and the rise since (better upwards), as measured.

    Joint training has nothing to forget: it is drawn as the line that learning in turn could reach.
    """
    points, goal = [], None
    for colour, entry in zip(cycle(TASK_COLOURS), comparison["strategies"], strict=False):
        named = entry["metrics"]["loss"]
        learnt, kept = named["plasticity"]["value"], named["backward transfer"]["value"]
        if learnt and kept:
            points.append((colour, entry["strategy"], learnt, kept))
        elif learnt:
            goal = entry["strategy"], -learnt["estimate"]
    if not points:
        return None
    figure = Figure(figsize=(WIDTH, 4.0), layout="constrained")
    axes = figure.subplots()
    for colour, strategy, learnt, kept in points:
        seeds = sorted(set(learnt["by_seed"]) & set(kept["by_seed"]))
        x, y = ([-of["by_seed"][seed] for seed in seeds] for of in (learnt, kept))
        axes.plot(x, y, "o", color=colour, markersize=4, alpha=0.45)
        errors = [
            None if of["low"] is None else [[of["high"] - of["estimate"]], [of["estimate"] - of["low"]]]
            for of in (learnt, kept)
        ]
        axes.errorbar(
            -learnt["estimate"], -kept["estimate"], xerr=errors[0], yerr=errors[1],
            fmt="o", color=colour, markersize=9, linewidth=1.2, capsize=3,
        )  # fmt: skip
        axes.plot([], [], "o", color=colour, markersize=7, label=strategy)
    if goal is not None:
        axes.axvline(goal[1], color=MUTED, linewidth=1, linestyle=(0, (4, 3)), label=f"{goal[0]}: all tasks at once")
    axes.axhline(0, color=INK, linewidth=0.9)
    axes.invert_xaxis()
    axes.invert_yaxis()
    axes.set(xlabel="held-out loss when learnt (right is better)", ylabel="rise since learnt (up is better)")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def success_by_strategy(comparison: Json) -> Figure | None:
    """For each task a bar per strategy: success in closed loop now, with its interval; a tick where it was learnt."""
    strategies = comparison["strategies"]
    tasks = [task["name"] for task in comparison["tasks"]]
    if not any(task["now"] for entry in strategies for task in entry["closed_loop"]):
        return None
    height = 0.8 / len(strategies)
    figure = Figure(figsize=(WIDTH, len(tasks) * (0.35 + 0.27 * len(strategies)) + 1.5), layout="constrained")
    axes = figure.subplots()
    for number, (colour, entry) in enumerate(zip(cycle(TASK_COLOURS), strategies, strict=False)):
        axes.plot([], [], color=colour, linewidth=8, label=entry["strategy"])
        for y, task in enumerate(entry["closed_loop"]):
            at, now, learnt = y - 0.4 + height * (number + 0.5), task["now"], task["when_learnt"]
            if now is None:
                continue
            axes.barh(at, 100 * now["estimate"], height=0.86 * height, color=colour)
            if now["low"] is not None:
                axes.plot([100 * now["low"], 100 * now["high"]], [at, at], color=INK, linewidth=1.3)
            if learnt is not None:
                tick = [at - 0.43 * height, at + 0.43 * height]
                axes.plot([100 * learnt["estimate"]] * 2, tick, color=INK, linewidth=2.5)
    axes.plot([], [], color=INK, linewidth=2.5, label="when learnt")
    axes.set_yticks(range(len(tasks)), [short_name(name) for name in tasks], color=INK)
    axes.set(ylim=(len(tasks) - 0.5, -0.5), xlim=(0, 100), xlabel="success in closed loop, in the end (%)")
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def forgetting_by_strategy(comparison: Json) -> Figure | None:
    """For each earlier task a bar per strategy: relative change of held-out loss since learnt, with its interval."""
    strategies = [entry for entry in comparison["strategies"] if any(task["verdict"] for task in entry["tasks"])]
    judged = [
        place
        for place in range(len(comparison["tasks"]))
        if any(entry["tasks"][place]["verdict"] for entry in strategies)
    ]
    if not judged:
        return None
    height = 0.8 / len(strategies)
    figure = Figure(figsize=(WIDTH, len(judged) * (0.35 + 0.27 * len(strategies)) + 1.5), layout="constrained")
    axes = figure.subplots()
    for number, (colour, entry) in enumerate(zip(cycle(TASK_COLOURS), strategies, strict=False)):
        for y, place in enumerate(judged):
            change = entry["tasks"][place]["relative_change"]
            if change is None:
                continue
            at = y - 0.4 + height * (number + 0.5)
            label = entry["strategy"] if y == 0 else None
            axes.barh(at, 100 * change["estimate"], height=0.86 * height, color=colour, label=label)
            if change["low"] is not None:
                axes.plot([100 * change["low"], 100 * change["high"]], [at, at], color=INK, linewidth=1.3)
    draw_limits(axes, comparison["limits"])
    names = [short_name(comparison["tasks"][place]["name"]) for place in judged]
    axes.set_yticks(range(len(judged)), names, color=INK)
    axes.set(ylim=(len(judged) - 0.5, -0.65), xlabel="change of held-out loss since learnt (%)")
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure
