"""The picture of the four jobs: `python docs/four_jobs.py` writes docs/pictures/four_jobs.png."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from kuavo_sim.env import KuavoEnv
from kuavo_sim.expert import demonstrate
from kuavo_sim.tasks import TASKS

PICTURE = Path(__file__).parent / "pictures" / "four_jobs.png"
HEIGHT, WIDTH, MOMENTS, GAP, TITLE = 180, 240, 4, 6, 26


def main() -> None:
    sheet = Image.new("RGB", (MOMENTS * (WIDTH + GAP) - GAP, len(TASKS) * (HEIGHT + TITLE)), (255, 255, 255))
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
    sheet.quantize(128).save(PICTURE, optimize=True)
    print(PICTURE)


if __name__ == "__main__":
    main()
