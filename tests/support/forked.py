"""Commands as processes of their own, in a process group of their own, that cost no imports: forked from this one.

    running = forked("kuavo_train", *words, before=lambda: when(Learner, "learn", send(signal.SIGTERM), call=3))
    done = running.wait()

Forking is safe where torch has one thread, as in all tests (shared_fixtures.py), and CUDA was not touched.
"""

import contextlib
import logging
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any
from unittest import mock

from kuavo_train.training.learner import Learner

PATIENCE = 120.0  # seconds until a command that does not end has failed its test


def run_main(module: str, *words: str) -> int:
    """`python -m module words` in this process; returns the exit status."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    hearing = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)}
    with (
        mock.patch.dict(os.environ),
        mock.patch.multiple(sys, argv=[module, *words], stdout=sys.stdout, stderr=sys.stderr),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", RuntimeWarning)  # runpy's, where a test has imported the module
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            return int(end.code or 0)
        finally:
            root.handlers, root.level = handlers, level  # Hydra puts its own in their place
            for number, handler in hearing.items():
                signal.signal(number, handler)
    return 0


@dataclass
class Forked:
    """A command under way. `words` are what it was given, `folder` holds what it prints."""

    words: list[str]
    folder: Path
    process: ForkProcess

    def wait(self, timeout: float = PATIENCE) -> subprocess.CompletedProcess[str]:
        """The exit status (negative: the signal that killed it) and what it printed; fails when it does not end."""
        self.process.join(timeout)
        assert not self.process.is_alive(), f"{self.words} does not end:\n{self.printed('stderr')[-3000:]}"
        status = self.process.exitcode
        assert status is not None
        return subprocess.CompletedProcess(self.words, status, self.printed("stdout"), self.printed("stderr"))

    def printed(self, stream: str) -> str:
        return (self.folder / stream).read_text()

    def send(self, number: int) -> None:
        """To the whole process group, as a terminal, `timeout`, docker and schedulers do."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid or 0, number)

    def survivors(self, timeout: float = 20.0) -> list[str]:
        """Processes of the group that do not end by themselves, by their command lines."""
        deadline = time.monotonic() + timeout
        while (left := list(_living(self.process.pid or 0))) and time.monotonic() < deadline:
            time.sleep(0.05)
        return left


def fork(function: Callable[[], int], folder: Path, *words: str) -> Forked:
    """Start `function` in a process forked from this one; it prints into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for stream in ("stdout", "stderr"):
        (folder / stream).write_text("")
    process = multiprocessing.get_context("fork").Process(target=_run, args=(function, folder))
    process.start()
    with contextlib.suppress(OSError):  # it does so itself, sooner or later than we
        os.setpgid(process.pid or 0, process.pid or 0)
    return Forked(list(words), folder, process)


def _run(function: Callable[[], int], folder: Path) -> None:
    with contextlib.suppress(OSError):
        os.setpgid(0, 0)
    for descriptor, stream in ((1, "stdout"), (2, "stderr")):
        opened = os.open(folder / stream, os.O_WRONLY | os.O_APPEND)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1, closefd=False) for n in (1, 2))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    sys.exit(function())


def _living(group: int) -> Iterator[str]:
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, _, its_group = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state != "Z":
                yield (entry / "cmdline").read_text().replace("\0", " ")


def when(owner: Any, name: str, do: Callable[[], Any], *, call: int = 1) -> None:
    """Let the `call`-th call of a function begin with `do`; for a process that ends soon, as nothing is put back."""
    function, calls = getattr(owner, name), []

    def watched(*arguments: Any, **named: Any) -> Any:
        calls.append(name)
        if len(calls) == call:
            do()
        return function(*arguments, **named)

    setattr(owner, name, watched)


def send(number: int) -> Callable[[], None]:
    """The signal, to all processes of the own group, from one that is not among them."""

    def from_outside() -> None:
        # Not os.fork: an exception that the signal raises would be lost in the hooks that Python calls around a fork.
        command = f"kill -s {number} -- -{os.getpgid(0)}"
        subprocess.run(["sh", "-c", command], start_new_session=True, check=True)

    return from_outside


@contextlib.contextmanager
def interrupted_in_step(number: int) -> Iterator[None]:
    """Within it, this process gets a SIGTERM in the `number`-th step of any stage it trains."""
    learn = Learner.learn

    def learn_interrupted(learner: Learner, *arguments: Any, step: int, **named: Any) -> dict[str, float]:
        if step == number - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return learn(learner, *arguments, step=step, **named)

    Learner.learn = learn_interrupted  # type: ignore[method-assign]
    try:
        yield
    finally:
        Learner.learn = learn  # type: ignore[method-assign]
