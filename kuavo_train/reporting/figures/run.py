"""The figures of a run's report, from the content of matrix.json and the lines of metrics.jsonl."""

from collections.abc import Callable, Sequence
from functools import partial
from math import nan

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from kuavo_train.metrics.number_format import MINUS, number, percent, whole_percent
from kuavo_train.metrics.verdict import SIGNIFICANT_FORGETTING, SLIGHT_DEGRADATION, WELL_RETAINED
from kuavo_train.reading import Json
from kuavo_train.reporting.figures.style import (
    GREY,
    INK,
    LABEL_BOX,
    MUTED,
    TASK_COLOURS,
    WIDTH,
    draw_limits,
    log_if_wide,
    short_name,
)
from kuavo_train.runs.stored_run import StoredStage

VERDICT_COLOURS = {WELL_RETAINED: "#2e7d5b", SLIGHT_DEGRADATION: "#c58a1b", SIGNIFICANT_FORGETTING: "#b5412f"}
CHANGE = LinearSegmentedColormap.from_list("change", ["#9cc4b2", "#ffffff", "#f3c9a5", "#dd7f63"])
UNITS = {
    "loss": "held-out loss",
    "action_error": "action error (normalised)",
    "success": "success rate",
    "progress": "share of sub-goals reached",
}
SHARES = ("success", "progress")


def run_figures(matrix: Json, stages: Sequence[StoredStage]) -> dict[str, Callable[[], Figure | None]]:
    """Name → drawing, in the order of the report. `matrix` is the content of matrix.json, of the run of `stages`."""
    return {
        **{f"matrix_{measure}": partial(heat_map, matrix, measure) for measure in matrix["matrices"]},
        "loss_curves": lambda: validation_curves(matrix, "loss"),
        "action_error_curves": lambda: validation_curves(matrix, "action_error"),
        "forgetting": lambda: forgetting_bars(matrix),
        "constant": lambda: constant_bars(matrix),
        "training": lambda: training_curves(matrix, stages),
        "replay": lambda: replay_bars(matrix),
    }


def heat_map(matrix: Json, measure: str) -> Figure | None:
    """R as measured, rows stages and columns tasks; colour is the change since the task was learnt.

    The change of a share, such as success, is in points; that of a loss or an error is in percent of what it was.
    Tasks not yet learnt are grey: their values are forward transfer, not memory. The cell of a task's own
        stage is framed.
    """
    rows, tasks = matrix["matrices"][measure]["rows"], matrix["tasks"]
    worse = -1 if matrix["matrices"][measure]["higher_is_better"] else 1
    labels = {stage["index"]: f"after {stage['index']}\n{short_name(stage['name'])}" for stage in matrix["stages"]}
    figure = Figure(figsize=(WIDTH, 0.72 * len(rows) + 1.0), layout="constrained")
    axes = figure.subplots()
    limit = 2 * matrix["limits"]["slight_drop" if measure in SHARES else "slight_change"]
    scale = Normalize(-limit / 2, limit, clip=True)  # no change is white, a third of the way
    when_learnt = {r["stage"]: r["values"] for r in rows}
    for y, row in enumerate(rows):
        for x, task in enumerate(tasks):
            value, learnt = row["values"][task["name"]], task["learnt_in"]
            reference = when_learnt.get(learnt, {}).get(task["name"])
            colour, ink, note = GREY, "#98a2b3", ""
            if learnt <= row["stage"] and value is not None and reference is not None:
                change = value - reference if measure in SHARES else (value - reference) / reference
                colour, ink = CHANGE(scale(worse * change)), INK
                unit = " points" if measure in SHARES else "%"
                note = "" if learnt == row["stage"] else f"{100 * change:+z.0f}{unit}".replace("-", MINUS)
            axes.add_patch(Rectangle((x, y), 1, 1, facecolor=colour, edgecolor="white", linewidth=2))
            text = "–" if value is None else whole_percent(value) if measure in SHARES else number(value)
            axes.text(x + 0.5, y + (0.40 if note else 0.5), text, ha="center", va="center", color=ink, fontsize=12)
            axes.text(x + 0.5, y + 0.72, note, ha="center", va="center", color=ink, fontsize=9.5)
    for y, row in enumerate(rows):
        for x, task in enumerate(tasks):
            if task["learnt_in"] == row["stage"]:
                axes.add_patch(Rectangle((x + 0.03, y + 0.03), 0.94, 0.94, fill=False, edgecolor=INK, linewidth=1.3))
    axes.set(xlim=(0, len(tasks)), ylim=(len(rows), 0))
    axes.set_xticks([x + 0.5 for x in range(len(tasks))], [short_name(task["name"]) for task in tasks], color=INK)
    axes.set_yticks([y + 0.5 for y in range(len(rows))], ["before\ntraining", *(labels[r["stage"]] for r in rows[1:])])
    axes.tick_params(length=0, labeltop=True, labelbottom=False, labelsize=9.5)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    return figure


def validation_curves(matrix: Json, measure: str) -> Figure | None:
    """A line per task over all training; thin and dotted until the task is trained, stage borders and names on top."""
    points = [point for point in matrix["curves"] if point[measure] is not None]
    if not points:
        return None
    figure = Figure(figsize=(WIDTH, 3.3), layout="constrained")
    axes = figure.subplots()
    _stage_borders(axes, matrix)
    for colour, task in zip(_colours(matrix), matrix["tasks"], strict=True):
        mine = sorted((p for p in points if p["task"] == task["name"]), key=lambda p: p["total_step"])
        # An unseen task keeps its dotted line up to the first point of its own stage.
        first = next(
            (i for i, p in enumerate(mine) if p["stage"] >= task["learnt_in"] and p["kind"] != "start"),
            len(mine),
        )
        unseen, seen = mine[: first + 1], mine[first:]
        axes.plot([p["total_step"] for p in unseen], [p[measure] for p in unseen], ":", color=colour, linewidth=1)
        x, y = [p["total_step"] for p in seen], [p[measure] for p in seen]
        axes.plot(x, y, "o-", color=colour, linewidth=1.9, markersize=3, label=task["name"])
    log_if_wide(axes, [p[measure] for p in points])
    axes.set(ylabel=UNITS[measure], xlabel="optimizer steps, all stages")
    axes.set_ylim(bottom=None if axes.get_yscale() == "log" else 0)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=min(len(matrix["tasks"]), 2))
    return figure


def forgetting_bars(matrix: Json) -> Figure | None:
    """Relative change of held-out loss since a task was learnt, with its interval and the limits of the verdict."""
    judged = [verdict for verdict in matrix["verdicts"] if verdict["loss_verdict"] is not None]
    if not judged:
        return None
    figure = Figure(figsize=(WIDTH, 0.55 * len(judged) + 1.5), layout="constrained")
    axes = figure.subplots()
    for y, verdict in enumerate(judged):
        change = verdict["relative_change"]
        axes.barh(y, 100 * change["estimate"], height=0.5, color=_verdict_colour(verdict["loss_verdict"]))
        edge = change["estimate"]
        if change["low"] is not None:
            axes.plot(
                [100 * change["low"], 100 * change["high"]],
                [y, y],
                color=INK,
                linewidth=1.6,
                solid_capstyle="butt",
            )
            axes.plot([100 * change["low"], 100 * change["high"]], [y, y], "|", color=INK, markersize=9)
            edge = max(edge, change["high"])
        axes.text(100 * max(edge, 0) + 1.5, y, percent(change["estimate"]), va="center", fontsize=10, bbox=LABEL_BOX)
    draw_limits(axes, matrix["limits"])
    axes.set_yticks(range(len(judged)), [short_name(verdict["task"]) for verdict in judged], color=INK)
    axes.set(ylim=(len(judged) - 0.5, -0.65), xlabel="change of held-out loss since learnt (%)")
    low, high = axes.get_xlim()
    axes.set_xlim(low, max(high + 0.14 * (high - low), 115 * matrix["limits"]["slight_change"]))
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    return figure


def constant_bars(matrix: Json) -> Figure | None:
    """Action error of the final policy on each task, against a predictor that always answers the mean action."""
    bars = [v for v in matrix["verdicts"] if v.get("action_error_now") is not None]
    if not bars:
        return None
    figure = Figure(figsize=(WIDTH, 0.62 * len(bars) + 1.3), layout="constrained")
    axes = figure.subplots()
    for y, verdict in enumerate(bars):
        if verdict["constant_error"] is not None:
            label = "constant predictor" if y == 0 else None
            axes.barh(y + 0.2, verdict["constant_error"], height=0.34, color="#d0d5dd", label=label)
            axes.text(
                verdict["constant_error"],
                y + 0.2,
                f" {number(verdict['constant_error'])}",
                va="center",
                fontsize=9,
            )
        axes.barh(
            y - 0.2,
            verdict["action_error_now"],
            height=0.34,
            color="#2f5d8c",
            label="final policy" if y == 0 else None,
        )
        axes.text(
            verdict["action_error_now"],
            y - 0.2,
            f" {number(verdict['action_error_now'])}",
            va="center",
            fontsize=9,
        )
    axes.set_yticks(range(len(bars)), [short_name(verdict["task"]) for verdict in bars], color=INK)
    axes.set(ylim=(len(bars) - 0.4, -0.6), xlabel=UNITS["action_error"])
    axes.margins(x=0.12)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def training_curves(matrix: Json, stages: Sequence[StoredStage]) -> Figure | None:
    """Training loss (logged, and smoothed over 5 % of a stage) above the learning rate; stages are not joined."""
    if not any(stage.metrics for stage in stages):
        return None
    figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
    loss_axes, rate_axes = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    _stage_borders(loss_axes, matrix)
    _stage_borders(rate_axes, matrix, names=False)
    everything: list[float] = []
    offset = 0
    for stage in stages:
        thin = slice(None, None, max(1, len(stage.metrics) // 600))
        x = [offset + line.step for line in stage.metrics]
        losses = [nan if line.loss is None else line.loss for line in stage.metrics]
        rates = [nan if line.lr is None else line.lr for line in stage.metrics]
        window = max(1, len(losses) // 20)
        parts = (losses[max(0, i - window + 1) : i + 1] for i in range(len(losses)))
        smooth = [sum(part) / len(part) for part in parts]
        loss_axes.plot(x[thin], losses[thin], color="#b9cde0", linewidth=0.8)
        loss_axes.plot(x[thin], smooth[thin], color="#2f5d8c", linewidth=1.6)
        rate_axes.plot(x[thin], rates[thin], color="#c9772b", linewidth=1.5)
        everything += losses
        offset += stage.steps
    log_if_wide(loss_axes, everything)
    loss_axes.set(ylabel="training loss")
    rate_axes.set(ylabel="learning rate", xlabel="optimizer steps, all stages")
    rate_axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    return figure


def replay_bars(matrix: Json) -> Figure | None:
    """For each stage the shares declared (pale) above the shares drawn."""
    stages = sorted({entry["stage"] for entry in matrix["replay"]})
    if not stages:
        return None
    figure = Figure(figsize=(WIDTH, 0.68 * len(stages) + 1.35), layout="constrained")
    axes = figure.subplots()
    for y, stage in enumerate(stages):
        entries = {entry["task"]: entry for entry in matrix["replay"] if entry["stage"] == stage}
        for kind, centre, height, alpha in (
            ("declared", y - 0.27, 0.16, 0.45),
            ("drawn", y + 0.06, 0.42, 1.0),
        ):
            left = 0.0
            for colour, task in zip(_colours(matrix), matrix["tasks"], strict=True):
                share = (entries.get(task["name"]) or {}).get(kind)
                if not share:
                    continue
                label = task["name"] if kind == "drawn" and task["learnt_in"] == stage else None
                axes.barh(
                    centre,
                    share,
                    left=left,
                    height=height,
                    color=colour,
                    alpha=alpha,
                    label=label,
                    edgecolor="white",
                )
                if kind == "drawn" and share > 0.06:
                    axes.text(
                        left + share / 2,
                        centre,
                        f"{share:.0%}",
                        ha="center",
                        va="center",
                        color="white",
                        fontsize=9,
                    )
                left += share
    axes.set_yticks([y + 0.0 for y in range(len(stages))], [f"stage {stage}" for stage in stages], color=INK)
    axes.set(ylim=(len(stages) - 0.5, -0.6), xlim=(0, 1), xlabel="share of the frames: declared (pale), drawn")
    axes.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.grid(visible=False)
    axes.tick_params(axis="y", length=0)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def _stage_borders(axes: Axes, matrix: Json, *, names: bool = True) -> None:
    start = 0
    for stage in matrix["stages"]:
        end = start + max(stage["steps"], 1)
        if start:
            axes.axvline(start, color="#98a2b3", linewidth=1, linestyle=(0, (4, 3)))
        if names:
            axes.text(
                (start + end) / 2,
                1.02,
                short_name(stage["name"]),
                transform=axes.get_xaxis_transform(),
                ha="center",
                color=MUTED,
                fontsize=8.5,
            )
        start = end
    axes.set_xlim(0, max(start, 1) * 1.01)


def _verdict_colour(verdict: Json) -> str:
    """What is not settled lies between the others."""
    return VERDICT_COLOURS[verdict["verdict"] if verdict["settled"] else SLIGHT_DEGRADATION]


def _colours(matrix: Json) -> list[str]:
    return [TASK_COLOURS[i % len(TASK_COLOURS)] for i in range(len(matrix["tasks"]))]
