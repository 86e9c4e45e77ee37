"""The picture of one chunk after the other: what a robot that is answered late carries out under each hand-over.

Drawn from kuavo_client's own `Handover`, by docs/make_pictures.py.
"""

import io
from dataclasses import dataclass, field

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL import Image

from kuavo_client import HANDOVERS, Handover
from kuavo_train.reporting.figures.style import INK, MUTED, STYLE, TASK_COLOURS

CHUNK, EVERY, DELAY, TICKS = 12, 6, 3, 24
ABOUT = {
    "wait": "wait: n_action_steps are carried out, then the pose is held until the answer is there",
    "blend": "blend: the robot goes on, and the new chunk is faded in",
    "rtc": "rtc: the new chunk begins with the steps carried out meanwhile",
}


@dataclass
class Told:
    """What one hand-over comes to: ticks of looks and of their answers, commands, and the plans behind them."""

    looks: list[int] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)
    commands: list[float] = field(default_factory=list)
    held: list[bool] = field(default_factory=list)
    plans: list[tuple[int, np.ndarray]] = field(default_factory=list)


def wish(tick: np.ndarray, number: int) -> np.ndarray:
    """What chunk `number` plans: the same swing each time, a little higher or lower."""
    return np.sin(tick / 5.5) + 0.22 * (-1) ** number


def drive(kind: str) -> Told:
    told, handover, due_at, before, command = Told(), Handover(kind, EVERY), 0, None, 0.0
    for tick in range(TICKS):
        if handover.due:
            handover.look(DELAY)
            due_at = tick + (DELAY if told.looks else 0)  # the first answer is there when the picture begins
            told.looks.append(tick)
        if handover.waiting and tick >= due_at:
            begins = tick if kind == "wait" else told.looks[-1]
            plan = wish(np.arange(begins, begins + CHUNK), len(told.plans))
            if kind == "rtc" and before is not None:  # as the guidance does: what is carried out, then slowly away
                left = before[EVERY:]
                weight = np.clip((EVERY - np.arange(len(left))) / (EVERY - DELAY + 1), 0, 1)
                plan[: len(left)] += weight * (left - plan[: len(left)])
            handover.arrived(plan[:, None])
            told.plans.append((begins, plan))
            told.answers.append(tick)
            before = plan
        action = handover.action()
        told.held.append(action is None)
        command = command if action is None else float(action[0])
        told.commands.append(command)
    return told


def chunk_timeline() -> Image.Image:
    with rc_context(STYLE):
        figure = Figure(figsize=(8.4, 6.6), layout="constrained")
        rows = figure.subplots(len(HANDOVERS), 1, sharex=True, sharey=True)
        for axes, kind in zip(rows, HANDOVERS, strict=True):
            told, ticks = drive(kind), np.arange(TICKS)
            for number, (begins, plan) in enumerate(told.plans):
                colour = TASK_COLOURS[number % len(TASK_COLOURS)]
                axes.plot(begins + np.arange(CHUNK), plan, color=colour, linewidth=1.4, alpha=0.45)
                label = {"color": colour, "fontsize": 9, "va": "center", "clip_on": True}
                axes.text(begins + CHUNK - 0.8, plan[-1], f"{number + 1}", **label)
            held = np.array(told.held)
            axes.plot(ticks, told.commands, color=INK, linewidth=1, zorder=3)
            axes.plot(ticks[~held], np.array(told.commands)[~held], "o", color=INK, markersize=4, zorder=4)
            axes.plot(
                ticks[held], np.array(told.commands)[held], "o", color=INK, markersize=4, markerfacecolor="w", zorder=4
            )
            for look, answer in zip(told.looks, told.answers, strict=False):
                axes.plot([look, answer], [-1.62, -1.62], color=MUTED, linewidth=3, solid_capstyle="butt")
                axes.plot(look, -1.62, "|", color=MUTED, markersize=12)
            axes.set_title(ABOUT[kind], loc="left", fontsize=10)
            axes.set(ylim=(-1.85, 1.6), xlim=(-0.5, TICKS - 0.5), yticks=[])
            axes.grid(visible=False)
        rows[-1].set_xlabel(
            "ticks · dots: what is carried out (hollow: pose held) · lines: the chunks planned · grey: from a look to "
            "its answer",
            fontsize=9,
        )
        rows[0].set_ylabel("a joint")
        file = io.BytesIO()
        figure.savefig(file, dpi=130, facecolor="white")
    return Image.open(file).convert("RGB")
