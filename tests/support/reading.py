"""What a test sees of a run's report, and of a page."""

import json
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
from PIL import Image

from kuavo_train import memory_report
from kuavo_train.command_line import parse
from kuavo_train.evaluation.options import Options
from kuavo_train.metrics.verdict import RetentionLimits
from kuavo_train.reading import Json
from kuavo_train.reporting.html_page import render
from kuavo_train.reporting.run_analysis import Analysis, analyse, write_matrix
from kuavo_train.reporting.strategy_comparison import Comparison, compare
from kuavo_train.reporting.write_report import write_report
from kuavo_train.runs.stored_run import StoredRun

QUICK = RetentionLimits(resamples=500)


def options_of(words: Sequence[str]) -> Options:
    """Of an evaluation."""
    return parse(Options, words, help="")


def analysed(folder: Path, *, limits: RetentionLimits | None = QUICK, joint: Path | None = None) -> Analysis:
    return analyse(StoredRun.open(folder), limits=limits, joint=None if joint is None else StoredRun.open(joint))


def matrix_of(folder: Path, *, limits: RetentionLimits | None = QUICK, joint: Path | None = None) -> Json:
    """The content of matrix.json, which is written."""
    analysis = analysed(folder, limits=limits, joint=joint)
    write_matrix(analysis)
    return analysis.matrix


def page_of(folder: Path, *, limits: RetentionLimits = QUICK) -> "Page":
    """Of the whole report, which is written."""
    return Page(write_report(analysed(folder, limits=limits)).read_text(encoding="utf-8"))


def bare_page_of(folder: Path, *, limits: RetentionLimits = QUICK) -> "Page":
    """Without its figures, which take seconds; matrix.json is written."""
    analysis = analysed(folder, limits=limits)
    write_matrix(analysis)
    return Page(render("report.html.jinja", analysis.matrix, {}))


def memory_report_of(stage: Path, task: str, output: Path, *words: str) -> Json:
    """Of a stage's best checkpoint, which is written into `output`."""
    given = (f"checkpoint={stage / 'checkpoints' / 'best'}", f"task={task}", f"output={output}", *words)
    assert memory_report.main(given) == 0
    return json.loads((output / "memory.json").read_text())


def is_drawn(picture: Path) -> bool:
    return bool(np.asarray(Image.open(picture).convert("L")).std() > 10)


def compared_runs(folders: Sequence[Path], limits: RetentionLimits = QUICK) -> Comparison:
    return compare([StoredRun.open(folder) for folder in folders], limits)


class Page(HTMLParser):
    """The page's numbers (pointer, form, text), whatever it would load from elsewhere, and its text."""

    def __init__(self, html: str):
        super().__init__()
        self.numbers: list[tuple[str, str, str]] = []
        self.loaded: list[str] = []
        self.text = ""
        self._open: tuple[str, str] | None = None
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        if "data-pointer" in attributes:
            self._open = (attributes["data-pointer"], attributes["data-form"])
            self.numbers.append((*self._open, ""))
        self.loaded += [value for key, value in attrs if key in ("src", "href")]

    def handle_data(self, data):
        self.text += data
        if self._open:
            self.numbers[-1] = (*self._open, data)
            self._open = None
