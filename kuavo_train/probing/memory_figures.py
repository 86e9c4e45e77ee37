"""The figures of a memory report, from the content of memory.json."""

from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kuavo_train.probing.memory_decisions import Question
from kuavo_train.reading import Json
from kuavo_train.reporting.figures.style import INK, MUTED, STYLE, TASK_COLOURS

WIDTH = 9.0  # inches
LABELS = {
    "on": "memory on",
    "reset": "reset at\nevery query",
    "frozen": "frozen after\nthe cue",
    "swapped": "swapped: the\ndonor's choice",
}


def draw_trace(path: Path, found: Json, pictures: np.ndarray, question: Question | None) -> None:
    """Pictures [Q, H, W, 3] of one episode's queries, and under each what its query did to the memory tokens."""
    trace = found["trace"]
    queries, tokens = len(pictures), len(trace["norm"])
    panels = (
        ("norm", "norm after the query", np.array(trace["norm"])[:, 1:]),
        ("change", "norm of the change", np.array(trace["change"])),
        ("cosine", "cosine with before", np.array(trace["cosine"])),
    )
    with rc_context(STYLE):
        row = 0.30 + 0.16 * tokens
        picture = 0.84 * WIDTH / queries
        figure = Figure(figsize=(WIDTH, picture + 3 * row + 1.2), layout="constrained")
        axes = figure.subplots(4, 1, sharex=True, height_ratios=[picture, row, row, row])
        for number, image in enumerate(pictures):
            axes[0].imshow(image, extent=(number - 0.47, number + 0.47, 0, 1), aspect="auto")
        axes[0].set(xlim=(-0.5, queries - 0.5), ylim=(0, 1), yticks=[])
        axes[0].spines[:].set_visible(False)
        axes[0].grid(visible=False)
        axes[0].tick_params(length=0)
        for panel, (kind, label, values) in zip(axes[1:], panels, strict=True):
            low = 0.0 if kind != "cosine" else min(0.0, float(values[:, 1:].min(initial=0.0)))
            high = float(values.max()) if kind != "cosine" else 1.0
            drawn = panel.imshow(
                values, aspect="auto", cmap="viridis", vmin=low, vmax=high, extent=(-0.5, queries - 0.5, tokens, 0)
            )
            panel.set_yticks(np.arange(tokens) + 0.5, [str(token) for token in range(tokens)])
            panel.set_ylabel("token")
            panel.set_title(label, fontsize=10, color=INK, loc="left")
            panel.grid(visible=False)
            figure.colorbar(drawn, ax=panel, pad=0.01, aspect=8)
        marks = ["" for _ in range(queries)]
        if question is not None:
            if question.cue_seen is not None:
                marks[question.cue_seen] = "\ncue last seen"
            marks[question.query] = "\ndecision"
        axes[-1].set_xticks(range(queries), [f"{number}{mark}" for number, mark in enumerate(marks)])
        axes[-1].set_xlabel("query")
        axes[0].set_title(
            f"{found['task']}, held-out episode {found['episodes'][0]}: what each query sees",
            fontsize=10,
            color=INK,
            loc="left",
        )
        figure.savefig(path, dpi=130, facecolor="white")


def draw_loss(path: Path, found: Json) -> None:
    """By how much memory lowers each episode's loss, and their mean with its interval; where the actions look."""
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.7), layout="constrained")
        axes = figure.subplots(1, 2, width_ratios=[2, 0.9])
        _lowered(axes[0], found["held_out"])
        _attention(axes[1], found["attention"])
        figure.savefig(path, dpi=130, facecolor="white")


def _lowered(axes: Axes, held_out: Json) -> None:
    losses, labels = held_out["loss_by_episode"], {"reset": "against reset", "swapped": "against another's"}
    for place, name in enumerate(labels):
        each = np.array(losses[name]) - np.array(losses["on"])
        axes.plot(each, np.full(len(each), place + 0.22), "o", color="#a9b8c9", markersize=4)
        lowered = held_out["loss_lowered"][name]
        axes.plot(lowered["estimate"], place, "D", color=TASK_COLOURS[0], markersize=6)
        if lowered["low"] is not None:
            axes.plot([lowered["low"], lowered["high"]], [place, place], color=INK, linewidth=1.3)
    axes.axvline(0, color=MUTED, linewidth=0.9)
    axes.set_yticks(range(len(labels)), list(labels.values()), color=INK)
    axes.set(ylim=(len(labels) - 0.5, -0.5), xlabel="loss without, less loss with memory: right of 0, memory helps")
    axes.grid(visible=False, axis="y")
    axes.set_title("memory lowers the held-out loss by (dots: episodes)", fontsize=10, color=INK, loc="left")


def draw_cue(path: Path, found: Json) -> None:
    """Decisions under each intervention, what a linear probe reads over time, and where the actions look."""
    with rc_context(STYLE):
        curve = found.get("probe", [])
        figure = Figure(figsize=(WIDTH, 3.3), layout="constrained")
        axes = figure.subplots(1, 3, width_ratios=[1.25, 1.25, 0.8])
        _decisions(axes[0], found["decision"])
        _probe(axes[1], curve, found["decision"])
        _attention(axes[2], found["attention"])
        figure.savefig(path, dpi=130, facecolor="white")


def _decisions(axes: Axes, decision: Json) -> None:
    rows = decision["interventions"]
    for place, (name, row) in enumerate(rows.items()):
        colour = TASK_COLOURS[0] if name in ("on", "swapped") else "#a9b8c9"
        axes.bar(place, row["accuracy"], 0.62, color=colour)
        errors = [[row["accuracy"] - row["low"]], [row["high"] - row["accuracy"]]]
        axes.errorbar(place, row["accuracy"], errors, color=INK, capsize=3, linewidth=1.1)
        axes.text(place, 0.03, f"{row['correct']}/{row['n']}", ha="center", color="white", fontsize=9)
    _chance(axes, decision)
    axes.set_xticks(range(len(rows)), [LABELS[name] for name in rows], fontsize=8)
    axes.set(ylim=(0, 1.03), xlim=(-0.6, max(len(rows), 2) - 0.4))
    axes.grid(visible=False, axis="x")
    axes.set_title("acts as the memory's cue demands", fontsize=10, color=INK, loc="left")


def _probe(axes: Axes, curve: list[Json], decision: Json) -> None:
    axes.set_title("linear probe reads the cue", fontsize=10, color=INK, loc="left")
    axes.set(ylim=(0, 1.03), xlabel="queries from the decision")
    _chance(axes, decision)
    if not curve:
        axes.text(0.5, 0.5, "no memory, or too few episodes", transform=axes.transAxes, ha="center", color=MUTED)
        return
    x = [point["queries_from_decision"] for point in curve]
    low, high = ([point[key] for point in curve] for key in ("low", "high"))
    axes.fill_between(x, low, high, color=TASK_COLOURS[1], alpha=0.2, linewidth=0)
    axes.plot(x, [point["accuracy"] for point in curve], "o-", color=TASK_COLOURS[1], markersize=3)
    axes.axvline(0, color=MUTED, linewidth=0.9)
    if decision["queries_since_cue"] is not None:
        seen = -decision["queries_since_cue"]
        axes.axvline(seen, color=MUTED, linewidth=0.9, linestyle="--")
        axes.text(seen, 0.02, "cue last seen ", ha="right", fontsize=8, color=MUTED)
    axes.text(0, 0.02, " decision", fontsize=8, color=MUTED)


def _chance(axes: Axes, decision: Json) -> None:
    """Where it is known."""
    if decision["chance"] is not None:
        axes.axhline(decision["chance"], color=INK, linewidth=0.9, linestyle=":")


def _attention(axes: Axes, shares: dict[str, float]) -> None:
    kinds = list(shares)[::-1]
    values = [shares[kind] for kind in kinds]
    axes.barh(kinds, values, 0.62, color=[TASK_COLOURS[2] if kind == "memory" else "#a9b8c9" for kind in kinds])
    for place, value in enumerate(values):
        axes.text(value + 0.01, place, f"{value:.2f}", va="center", fontsize=9, color=INK)
    axes.set(xlim=(0, max(values) * 1.25))
    axes.grid(visible=False, axis="y")
    axes.set_title("actions attend to", fontsize=10, color=INK, loc="left")
