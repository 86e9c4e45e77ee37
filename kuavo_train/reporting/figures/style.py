"""How all figures look, and how they are stored.

Every figure is about 12 cm wide, so that its text stays readable when a phone shows it at full width; on a
desktop two stand side by side. No pyplot: figures are objects without global state, and nothing needs a
display.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from kuavo_train.reading import Json

INK, MUTED, GRID, GREY = "#1c2430", "#667085", "#e4e7ec", "#f2f4f7"
TASK_COLOURS = ("#2f5d8c", "#c9772b", "#3f8f6f", "#8a5a9e", "#b0486a", "#6b7280", "#a3892b", "#3b8ea5")
STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["Inter", "Helvetica Neue", "Arial", "Liberation Sans", "DejaVu Sans"],
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": "#c4cad4",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "legend.fontsize": 9,
}
WIDTH = 4.8  # inches
LABEL_BOX = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}


def save_figures(folder: Path, drawings: Mapping[str, Callable[[], Figure | None]]) -> dict[str, Path]:
    """Draw each and save it as PNG; name → file, without those that had nothing to draw."""
    folder.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Path] = {}
    for name, draw in drawings.items():
        path = folder / f"{name}.png"
        path.unlink(missing_ok=True)  # none left over from an earlier report
        with rc_context(STYLE):
            figure = draw()
            if figure is not None:
                figure.savefig(path, dpi=170, facecolor="white")
                figures[name] = path
    return figures


def draw_limits(axes: Axes, limits: Json) -> None:
    """Where a change in per cent begins to be slight and to be significant, at the top of bars that start at -0.65."""
    for name, label, side in (("well_retained_change", "slight ", "right"), ("slight_change", " significant", "left")):
        limit = 100 * limits[name]
        axes.axvline(limit, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        axes.text(limit, -0.62, label, color=MUTED, fontsize=8.5, va="bottom", ha=side)
    axes.axvline(0, color=INK, linewidth=1)


def short_name(name: str) -> str:
    """A task name broken at its underscores, so that columns stay narrow."""
    return name.replace("_", "\n", 1) if len(name) > 9 else name


def log_if_wide(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic axis where positive values span more than a factor of eight."""
    positive = [value for value in values if value is not None and value > 0]
    if positive and max(positive) / min(positive) > 8 and len(positive) == len(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_ylim(min(positive) / 1.2, max(positive) * 1.2)
