"""A picture sheet of one episode: what the three cameras saw, with the cue and the sub-goals written in."""

import textwrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from kuavo_sim.expert import Demonstration
from kuavo_sim.robot import CAMERAS, FPS
from kuavo_sim.tasks.task import Task

_COLUMNS = 9
_MIN_CELL, _MAX_CELL = 128, 256  # pixels high; smaller pictures are enlarged without smoothing, larger ones reduced
_GAP, _HEADER, _CAPTION = 4, 64, 34


def contact_sheet(task: type[Task], demonstration: Demonstration) -> Image.Image:
    """Rows are cameras, columns are moments: evenly spread, moved where needed to show the cue's decision point."""
    frames = _moments(demonstration)
    cell = _cell(*demonstration.pictures[CAMERAS[0]].shape[1:3])
    width = len(frames) * (cell[0] + _GAP) + _GAP
    height = _HEADER + len(CAMERAS) * (cell[1] + _GAP) + _CAPTION
    sheet = Image.new("RGB", (width, height), (250, 250, 250))
    draw = ImageDraw.Draw(sheet)
    cue = "none" if demonstration.cue is None else task.cues[demonstration.cue]
    header = f"{task.name}   cue: {cue}   seed {demonstration.seed}   {len(demonstration.actions)} steps at {FPS} Hz"
    draw.text((_GAP, 4), header, fill=(0, 0, 0), font=ImageFont.load_default(15))
    lines = textwrap.wrap(demonstration.instruction, width // 7)[:2]
    draw.text((_GAP, 26), "\n".join(lines), fill=(70, 70, 70), font=ImageFont.load_default(12))
    for column, frame in enumerate(frames):
        x = _GAP + column * (cell[0] + _GAP)
        for row, camera in enumerate(CAMERAS):
            picture = Image.fromarray(demonstration.pictures[camera][frame])
            smoothing = Image.Resampling.BOX if picture.height > cell[1] else Image.Resampling.NEAREST
            sheet.paste(picture.resize(cell, smoothing), (x, _HEADER + row * (cell[1] + _GAP)))
        caption = _caption(demonstration, frame)
        draw.text((x, height - _CAPTION), caption, fill=(0, 0, 0), font=ImageFont.load_default(12))
    return sheet


def _cell(height: int, width: int) -> tuple[int, int]:
    """Width and height on the sheet of pictures of this size."""
    if height > _MAX_CELL:
        return round(width * _MAX_CELL / height), _MAX_CELL
    factor = max(1, -(-_MIN_CELL // height))
    return width * factor, height * factor


def _moments(demonstration: Demonstration) -> list[int]:
    last = len(demonstration.actions) - 1
    moments = np.linspace(0, last, _COLUMNS).round().astype(int).tolist()
    for decision in demonstration.decision_frames:
        nearest = min(range(len(moments)), key=lambda i: abs(moments[i] - decision))
        moments[nearest] = decision
    return moments


def _caption(demonstration: Demonstration, frame: int) -> str:
    """Time, and the sub-goal reached last; under the last frame the one that its action reached."""
    until = frame + (frame == len(demonstration.actions) - 1)
    reached = [name for name, first in demonstration.subgoal_frames.items() if first <= until]
    decision = "  CUE NEEDED" if frame in demonstration.decision_frames else ""
    return f"{frame / FPS:.1f} s{decision}\n{reached[-1] if reached else ''}"
