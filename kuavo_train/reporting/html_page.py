"""A record of numbers → one self-contained page: figures inlined, numbers looked up and nowhere written by hand.

Templates (reporting/templates) show numbers only through `value(pointer)` and `interval(pointer)`, which look them
up in the record that is stored as JSON beside the page, so that the two cannot disagree.
"""

import base64
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from kuavo_train.metrics.number_format import ABSENT, FORMATS
from kuavo_train.reading import Json, JsonValue
from kuavo_train.runs.files import write_text

TEMPLATES = Path(__file__).parent / "templates"


def render(
    template: str, record: Json, figures: Mapping[str, Path], films: Mapping[str, Path] = MappingProxyType({})
) -> str:
    """The page as text.

    Args:
        template: file below kuavo_train/reporting/templates; it sees the record as `m`.
        figures: name → PNG.
        films: name → MP4.
    """
    environment = _environment()

    def value(pointer: str, form: str = "number") -> Markup:
        text = FORMATS[form](look_up(record, pointer))
        return Markup('<span class="v" data-pointer="{}" data-form="{}">{}</span>').format(pointer, form, text)

    def interval(pointer: str, form: str = "number") -> Markup:
        """Estimate and ends of an interval; a dash where there is none."""
        found = look_up(record, pointer)
        if found is None:
            return Markup(escape(ABSENT))
        estimate = value(f"{pointer}/estimate", form)
        if found["low"] is None:
            return estimate
        ends = value(f"{pointer}/low", form), value(f"{pointer}/high", form)
        return Markup('{} <span class="ci">[{}, {}]</span>').format(estimate, *ends)

    def figure(name: str, alt: str) -> Markup:
        if name not in figures:
            return Markup("")
        data = base64.b64encode(figures[name].read_bytes()).decode("ascii")
        return Markup('<img src="data:image/png;base64,{}" alt="{}">').format(Markup(data), escape(alt))

    def film(name: str, about: str, *, plays: bool) -> Markup:
        """Inlined; one that `plays` begins by itself, without end, and without sound as it has none."""
        if name not in films:
            return Markup("")
        data = base64.b64encode(films[name].read_bytes()).decode("ascii")
        how = "autoplay loop " if plays else ""
        video = Markup('<video controls muted playsinline {}aria-label="{}" src="data:video/mp4;base64,{}"></video>')
        return video.format(Markup(how), escape(about), Markup(data))

    shown = {"m": record, "value": value, "interval": interval, "figure": figure, "figures": figures, "film": film}
    environment.globals.update(shown)  # so that included and imported templates have them too
    return environment.get_template(template).render()


@cache
def _environment() -> Environment:
    """Which keeps what it compiled: more than half of what a page takes, and a command may write several."""
    return Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def write_page(
    path: Path,
    template: str,
    record: Json,
    figures: Mapping[str, Path],
    films: Mapping[str, Path] = MappingProxyType({}),
) -> Path:
    """Render into `path`, whole or not at all."""
    write_text(path, render(template, record, figures, films))
    return path


def look_up(record: Json, pointer: str) -> JsonValue:
    """What a JSON pointer such as /verdicts/0/loss_now points at (RFC 6901, without its escapes)."""
    found: JsonValue = record
    for key in pointer.removeprefix("/").split("/"):
        found = found[int(key)] if isinstance(found, list) else found[key]
    return found
