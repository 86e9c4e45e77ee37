"""Which tests run, in which order, and what they take. The fixtures lie in tests/support/shared_fixtures.py.

Nothing here imports torch: the process that hands tests to the workers of pytest-xdist would wait for it first.
"""

import gc
import json
import os
from collections import Counter
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")

DURATIONS = Path(__file__).with_name("durations.json")
"""File → seconds of its tests. `make test ARGS=--record-durations` writes it anew; it decides their order alone."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record-durations", action="store_true", help=f"write {DURATIONS.name}, after a whole run")


def pytest_configure(config: pytest.Config) -> None:
    is_worker = hasattr(config, "workerinput")
    if is_worker or not config.getoption("numprocesses", None):
        config.pluginmanager.import_plugin("shared_fixtures")
    if config.getoption("--record-durations") and not is_worker:
        config.pluginmanager.register(RecordDurations())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files, so that at the end no worker of pytest-xdist is left alone with one of them.

    A file that is not on record comes first: it may be long.
    """
    known = _recorded()
    items.sort(key=lambda item: -known.get(_file(item.nodeid), float("inf")))


def pytest_collection_finish() -> None:
    """Spare the garbage collector what was imported, which it would look through again and again."""
    gc.collect()
    gc.freeze()


class RecordDurations:
    """Seconds by file, of one process or of all workers; files that did not run stay on record unless they are gone."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[_file(report.nodeid)] += report.duration

    def pytest_sessionfinish(self) -> None:
        there = {file: seconds for file, seconds in _recorded().items() if Path(file).is_file()} | self.seconds
        slowest = sorted(there.items(), key=lambda item: -item[1])
        DURATIONS.write_text(json.dumps({file: round(seconds, 1) for file, seconds in slowest}, indent=1) + "\n")


def _recorded() -> dict[str, float]:
    return json.loads(DURATIONS.read_text()) if DURATIONS.is_file() else {}


def _file(nodeid: str) -> str:
    return nodeid.partition("::")[0]
