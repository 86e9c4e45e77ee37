"""Episodes as small videos: what the robot saw, its instruction and progress, what it had to remember and what it held.

    for rank, episode in picked(rollouts.played, 3):
        write_video(folder / f"{rank}.mp4", episode, Caption("memory, weighing", instruction, fps=10))

Episodes need their traces (`roll_out(…, traces=True)`). Beside every video lies its last picture, as PNG.
"""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from kuavo_train.evaluation.episodes import Episode, Trace
from kuavo_train.reporting.figures.style import GREY, GRID, INK, MUTED, TASK_COLOURS

WIDTH, MARGIN, GAP = 640, 16, 8
LINE = 18  # pixels from one line of text to the next
GOOD, BAD = "#2e7d5b", "#b5412f"
PALE, DARK = np.array([232, 238, 245]), np.array([31, 66, 105])  # of the memory strip
FIRST_LOOK = 15  # percentile of a token's norms that is drawn palest
HOLD = 1.5  # seconds that the end stays
FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"  # a font that is there on every machine, ticks included


@dataclass(frozen=True)
class Caption:
    """What stands above an episode.

    Attributes:
        fps: steps per second, of the robot and so of the video.
        cues: names of the task's; without names they are numbered.
    """

    title: str
    instruction: str
    fps: float
    rank: str = ""
    cues: Sequence[str] = ()


def write_video(path: Path, episode: Episode, caption: Caption, *, crf: int = 20) -> Path:
    """H.264 at the rate of the robot, and `path` with .png; returns `path`.

    Args:
        crf: x264's constant rate factor; 6 more halve the size, roughly.

    Raises:
        ValueError: the episode has no trace.
    """
    if episode.trace is None or not episode.trace.pictures:
        raise ValueError(f"episode {episode.seed} must have a trace to be shown: roll it out with traces=True")
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet = _Sheet(episode, episode.trace, caption)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(
            "libx264", rate=Fraction(caption.fps).limit_denominator(1000), options={"crf": str(crf), "preset": "faster"}
        )
        stream.width, stream.height, stream.pix_fmt = *sheet.size, "yuv420p"
        for picture in sheet.pictures():
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())
    picture.save(path.with_suffix(".png"))
    return path


class _Sheet:
    """The picture of every step: header, cameras, and below them what was reached (left) and remembered (right)."""

    def __init__(self, episode: Episode, trace: Trace, caption: Caption):
        self.episode, self.trace, self.caption = episode, trace, caption
        self.bold, self.text, self.small = (_font(name, size) for name, size in (("-Bold", 15), ("", 13), ("", 11)))
        self.lines = _wrapped(caption.instruction, self.text, WIDTH - 2 * MARGIN)
        first = _decoded(trace.pictures[0])
        self.side = (WIDTH - 2 * MARGIN - GAP * (len(first) - 1)) // len(first)
        tallest = max(picture.height / picture.width for picture in first.values())
        self.cameras_at = MARGIN + 24 + LINE * len(self.lines) + GAP
        self.panel_at = self.cameras_at + round(self.side * tallest) + 24
        rows = max(len(episode.subgoals) + (episode.cue is not None), 6)
        height = self.panel_at + LINE * rows + MARGIN
        self.size = WIDTH, height + height % 2  # H.264 wants even sides
        self.strip = _strip(trace.memory_norms)
        self.background = Image.new("RGB", self.size, "white")
        draw = ImageDraw.Draw(self.background)
        self._header(draw)
        for place, (name, picture) in enumerate(first.items()):
            under = self.cameras_at + round(picture.height * self.side / picture.width) + 3
            draw.text((MARGIN + place * (self.side + GAP), under), name, MUTED, self.small)

    def pictures(self) -> Iterator[Image.Image]:
        for step in range(len(self.trace.pictures)):
            yield self._at(step)
        ended = self._at(self.episode.steps)
        for _ in range(round(HOLD * self.caption.fps)):
            yield ended

    def _at(self, step: int) -> Image.Image:
        """After `step` steps; what the last one led to is reported, but was not pictured."""
        sheet = self.background.copy()
        draw = ImageDraw.Draw(sheet)
        cameras = _decoded(self.trace.pictures[min(step, len(self.trace.pictures) - 1)])
        for place, picture in enumerate(cameras.values()):
            sheet.paste(_of_width(picture, self.side), (MARGIN + place * (self.side + GAP), self.cameras_at))
        self._reached(draw, step)
        self._progress(draw, step)
        self._memory(sheet, draw, step)
        return sheet

    def _header(self, draw: ImageDraw.ImageDraw) -> None:
        episode, about = self.episode, self.caption
        draw.text((MARGIN, MARGIN), about.title, INK, self.bold)
        outcome, colour = ("succeeded", GOOD) if episode.success else ("did not succeed", BAD)
        draw.text((WIDTH - MARGIN, MARGIN), outcome, colour, self.bold, anchor="ra")
        before = WIDTH - MARGIN - self.bold.getlength(outcome) - GAP
        draw.text((before, MARGIN + 3), f"{about.rank}  layout {episode.seed}".strip(), MUTED, self.small, anchor="ra")
        for place, line in enumerate(self.lines):
            draw.text((MARGIN, MARGIN + 24 + LINE * place), line, MUTED, self.text)

    def _reached(self, draw: ImageDraw.ImageDraw, step: int) -> None:
        y = self.panel_at
        for name, at in self.episode.subgoals.items():
            reached = at is not None and at <= step
            draw.text((MARGIN, y), "✓" if reached else "·", GOOD if reached else MUTED, self.text)
            label = name.replace("_", " ") + (f", step {at}" if reached else "")
            draw.text((MARGIN + 18, y), label, INK if reached else MUTED, self.text)
            y += LINE
        if self.episode.cue is not None:
            draw.text((MARGIN, y), f"cue: {self._cue(self.episode.cue)}", INK, self.text)
            choice, chosen_at = self.episode.choice, self.episode.chosen_at
            if choice is not None and chosen_at is not None and chosen_at <= step:
                colour = GOOD if self.episode.right_branch else BAD
                draw.text((MARGIN + 130, y), f"chose {self._cue(choice)}", colour, self.text)

    def _cue(self, number: int) -> str:
        return self.caption.cues[number].replace("_", " ") if number < len(self.caption.cues) else str(number)

    @property
    def _half(self) -> int:
        return WIDTH // 2

    def _progress(self, draw: ImageDraw.ImageDraw, step: int) -> None:
        """The time, with marks where a sub-goal was reached."""
        left, right, y = self._half, WIDTH - MARGIN, self.panel_at
        draw.text((left, y), f"step {step} of {self.episode.steps}", INK, self.text)
        draw.text((right, y), f"{step / self.caption.fps:.1f} s", MUTED, self.text, anchor="ra")
        bar = y + LINE + 4
        draw.rectangle((left, bar, right, bar + 6), GRID)
        pixels = (right - left) / self.episode.steps
        draw.rectangle((left, bar, left + pixels * step, bar + 6), TASK_COLOURS[0])
        for at in self.episode.subgoals.values():
            if at is not None and at <= step:
                draw.rectangle((left + pixels * at - 2, bar - 2, left + pixels * at, bar + 8), GOOD)

    def _memory(self, sheet: Image.Image, draw: ImageDraw.ImageDraw, step: int) -> None:
        """A row for each token, a column for each step so far: the norm of what it holds, dark where it is large."""
        left, y, width = self._half, self.panel_at + 2 * LINE, WIDTH - MARGIN - self._half
        height = self.size[1] - MARGIN - y - LINE
        if self.strip is None:
            draw.text((left, y), "no memory", MUTED, self.small)
            return
        draw.text((left, y), "memory: norm of each token", MUTED, self.small)
        draw.rectangle((left, y + LINE, left + width - 1, y + LINE + height - 1), GREY)
        until = min(step + 1, self.strip.shape[1])
        shown = Image.fromarray(self.strip[:, :until])
        wide = max(1, round(width * until / self.strip.shape[1]))
        sheet.paste(shown.resize((wide, height), Image.Resampling.NEAREST), (left, y + LINE))


def _strip(norms: Sequence[np.ndarray]) -> np.ndarray | None:
    """T of [tokens] → [tokens, T, 3] uint8; each token on a scale of its own, since tokens differ more than moments."""
    if not norms:
        return None
    values = np.stack(norms, axis=1)
    # Not from the least on: what little the first look leaves would take the scale for itself.
    low, high = np.percentile(values, [FIRST_LOOK, 100], axis=1, keepdims=True)
    share = np.clip((values - low) / np.maximum(high - low, 1e-9), 0, 1)
    return (PALE + share[..., None] * (DARK - PALE)).astype(np.uint8)


def _decoded(pictures: dict[str, bytes]) -> dict[str, Image.Image]:
    return {name: Image.open(io.BytesIO(picture)) for name, picture in pictures.items()}


def _of_width(picture: Image.Image, width: int) -> Image.Image:
    """Small pictures keep their pixels: they are what the policy had to go by."""
    how = Image.Resampling.NEAREST if picture.width <= width else Image.Resampling.LANCZOS
    return picture.resize((width, round(picture.height * width / picture.width)), how)


def _font(style: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(FONTS / f"DejaVuSans{style}.ttf", size)


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
