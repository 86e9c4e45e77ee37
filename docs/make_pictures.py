"""The pictures of the documentation: `make pictures`, or `python docs/make_pictures.py WORD=FOLDER …`.

Without words it makes those of the simulation, four_jobs.png and sim_….png, and chunk_timeline.png. The others show
runs, and each word names what a run left:

    report=outputs/embedded/report            report.png: the top of report.html and success below; needs
                                              `pip install PyQt6-WebEngine`
    embedded=outputs/embedded-study/report    study_stability_plasticity.png
    study=outputs/study-study/report          study_success.png
    weighing=… moving_grasp=…                 memory_….png: folders that kuavo_train.memory_report wrote to
    best=….png worst=….png typical=….png      study_sorting_best_worst.png and study_weighing_typical.png: each is the
                                              picture that kuavo_train.evaluate leaves beside a video

The commands that made those runs stand beside the pictures in docs/experiments/.
"""

import functools
import importlib.util
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from chunk_timeline import chunk_timeline
from PIL import Image, ImageChops, ImageDraw, ImageFont

from kuavo_sim.env import KuavoEnv
from kuavo_sim.expert import demonstrate
from kuavo_sim.record import RecordSettings, record
from kuavo_sim.tasks import TASKS

FOLDER = Path(__file__).parent / "pictures"
WHITE = (255, 255, 255)
HEIGHT, WIDTH, MOMENTS, GAP, TITLE = 180, 240, 4, 6, 26  # of four_jobs.png
FILM = re.compile(r'<video[^>]*aria-label="(\w+), (\w+) episode.*?</video>', re.DOTALL)
TOP_OF_THE_PAGE = """<style>
    main > :not(header):not(.films):not(.verdicts) {display: none}
    .films > .pair ~ .pair ~ .pair, .films > h2:nth-of-type(n+3) {display: none}
    .films img {width: 100%}
</style></head>"""


def four_jobs() -> Image.Image:
    """Moments of one demonstration of each job, seen by the head camera."""
    sheet = Image.new("RGB", (MOMENTS * (WIDTH + GAP) - GAP, len(TASKS) * (HEIGHT + TITLE)), WHITE)
    draw = ImageDraw.Draw(sheet)
    for row, (name, task) in enumerate(TASKS.items()):
        top = row * (HEIGHT + TITLE)
        demonstration = demonstrate(KuavoEnv(name, image_size=(HEIGHT, WIDTH)), seed=0)
        title = f"{row + 1}  {name.replace('_', ' ')}: {', '.join(task.subgoals).replace('_', ' ')}"
        draw.text((0, top + 4), title, fill=(0, 0, 0), font=ImageFont.load_default(15))
        last = len(demonstration.actions) - 1
        for column, frame in enumerate(np.linspace(0, last, MOMENTS).round().astype(int)):
            picture = Image.fromarray(demonstration.pictures["head_cam_h"][frame])
            sheet.paste(picture, (column * (WIDTH + GAP), top + TITLE))
    return sheet


def contact_sheet(job: str) -> Image.Image:
    """What the recorder leaves beside a dataset of one episode."""
    with tempfile.TemporaryDirectory() as folder:
        root = record(RecordSettings(task=job, episodes=1, image_size=128), Path(folder) / job, workers=1)
        return Image.open(root / "contact_sheet.png").convert("RGB")


def top_of_a_report(folder: Path) -> Image.Image:
    """Moments of the films of two jobs, the sentence of each job, and the matrix of success below them."""
    if importlib.util.find_spec("PyQt6") is None:
        raise SystemExit("report=… needs a browser: uv pip install PyQt6-WebEngine")
    page = (folder / "report.html").read_text().replace("</head>", TOP_OF_THE_PAGE, 1)
    page = FILM.sub(lambda film: f'<img src="{(folder / "films").resolve().as_uri()}/{film[1]}-{film[2]}.png">', page)
    with tempfile.TemporaryDirectory() as work:
        shown, shot = Path(work) / "page.html", Path(work) / "page.png"
        shown.write_text(page)
        subprocess.run([sys.executable, FOLDER.parent / "page_picture.py", shown, shot], check=True)
        top = Image.open(shot).convert("RGB")
    ground = top.getpixel((0, top.height - 1))
    written = ImageChops.difference(top, Image.new("RGB", top.size, ground)).getbbox() or (0, 0, *top.size)
    return one_below_the_other([top.crop((0, 0, top.width, written[3] + 24)), opened(folder / "matrix_success.png")])


def opened(path: Path) -> Image.Image:
    return Image.open(path).convert("RGB")


def one_below_the_other(pictures: Sequence[Image.Image]) -> Image.Image:
    sheet = Image.new("RGB", (max(each.width for each in pictures), sum(each.height for each in pictures)), WHITE)
    top = 0
    for each in pictures:
        sheet.paste(each, ((sheet.width - each.width) // 2, top))
        top += each.height
    return sheet


def side_by_side(*paths: Path) -> Image.Image:
    pictures = [opened(path) for path in paths]
    sheet = Image.new("RGB", (sum(each.width for each in pictures) + 10, max(each.height for each in pictures)), WHITE)
    sheet.paste(pictures[0], (0, 0))
    sheet.paste(pictures[1], (pictures[0].width + 10, 0))
    return sheet


# picture → the words that it needs, and how it is made of what they name
PICTURES: dict[str, tuple[tuple[str, ...], Callable[..., Image.Image]]] = {
    "four_jobs.png": ((), four_jobs),
    "chunk_timeline.png": ((), chunk_timeline),
    **{f"sim_{job}.png": ((), functools.partial(contact_sheet, job)) for job in TASKS},
    "report.png": (("report",), top_of_a_report),
    "study_stability_plasticity.png": (("embedded",), lambda folder: opened(folder / "stability_plasticity.png")),
    "study_success.png": (("study",), lambda folder: opened(folder / "success.png")),
    "memory_weighing_cue.png": (("weighing",), lambda folder: opened(folder / "memory_cue.png")),
    "memory_weighing_trace.png": (("weighing",), lambda folder: opened(folder / "memory_trace.png")),
    "memory_moving_grasp_cue.png": (("moving_grasp",), lambda folder: opened(folder / "memory_cue.png")),
    "memory_moving_grasp_trace.png": (("moving_grasp",), lambda folder: opened(folder / "memory_trace.png")),
    "study_sorting_best_worst.png": (("best", "worst"), side_by_side),
    "study_weighing_typical.png": (("typical",), opened),
}


def main(words: Sequence[str], folder: Path = FOLDER) -> None:
    named = {word: Path(path) for word, _, path in (each.partition("=") for each in words)}
    known = {word for needed, _ in PICTURES.values() for word in needed}
    if unknown := named.keys() - known:
        raise SystemExit(f"words must be among {', '.join(sorted(known))}, got {', '.join(sorted(unknown))}\n{__doc__}")
    for name, (needed, make) in PICTURES.items():
        if set(needed) <= named.keys() and bool(needed) == bool(named):
            make(*(named[word] for word in needed)).quantize(128).save(folder / name, optimize=True)
            print(folder / name)


if __name__ == "__main__":
    main(sys.argv[1:])
