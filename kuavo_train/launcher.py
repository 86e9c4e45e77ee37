"""`processes=N`: a command's work in N processes that train together, started here and waited for.

They are told of each other as torchrun would, train on one machine, and the first alone prints. A signal to this
process goes to each of them once: they are in process groups of their own, so that a terminal's does not come twice.
Once one has failed the others are ended, and they end by themselves when this process is gone.
"""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from importlib import import_module
from multiprocessing import connection, get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, cast

from kuavo_sim.children import STOP_SIGNALS, born_deaf
from kuavo_sim.cpus import usable_cpus
from kuavo_train.command_line import errors_in_one_line, quieten_libraries
from kuavo_train.errors import require
from kuavo_train.interruption import ONE_OF_EACH_SIGNAL, end_on_signals, stop_signals

START: Literal["spawn", "fork"] = "spawn"  # with nothing of this process's: its threads and its GPU cannot be shared
FIRST_SPEAKS = 2.0  # s that another waits with an error: where the first has the same, it is said once
SETTLES = 5.0  # s in which the others of a process that failed come to their own end
PATIENCE = 30.0  # s for them to unwind after that; what hangs in an exchange with the dead hears no signal


def run_together[*P](processes: int, work: Callable[[*P], int], *arguments: *P) -> int:
    """The exit status of `work(*arguments)`, here or in so many processes: 128 + the number of the signal that ended
    it, or that of the process that failed first.

    Args:
        work: of a module, so that another process finds it.

    Raises:
        ConfigError: a launcher has started this process as one of several.
    """
    check_launched_once(processes)
    if processes == 1:
        return work(*arguments)
    with TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        errors = [Path(folder) / str(rank) for rank in range(processes)]
        about = {"WORLD_SIZE": processes, "MASTER_PORT": free.getsockname()[1]}
        free.close()
        start = get_context(START).Process  # type: ignore[attr-defined] # of every context but the stub's base
        children: list[BaseProcess] = [
            start(target=_begin, args=(os.getpid(), rank, about, errors[rank], findable(work), arguments))
            for rank in range(processes)
        ]
        with _handing_on_signals(children) as heard:
            failed = _wait(children, heard)
        if failed is None:
            return 0
        status = children[failed].exitcode or 0
        if not heard and failed:  # the first has said so itself
            sys.stderr.write(errors[failed].read_text(errors="replace"))
        if not heard and status < 0:
            name = signal.Signals(-status).name
            print(
                f"error: process {failed + 1} of {processes} was ended by {name}; the same command goes on",
                file=sys.stderr,
            )
        return 128 + heard[0] if heard else status if status > 0 else 128 - status


def check_launched_once(processes: int) -> None:
    """Raises `ConfigError` where another launcher has started this process as one of several."""
    outer = os.environ.get("WORLD_SIZE", "1")
    require(
        processes == 1 or outer == "1",
        "processes",
        f"be 1 in a process that a launcher has started as one of {outer} (WORLD_SIZE)",
        processes,
    )


@contextmanager
def _handing_on_signals(children: Sequence[BaseProcess]) -> Iterator[list[int]]:
    """The children started, and none left at the end; the stop signals that have come meanwhile."""
    heard: list[int] = []

    def hand_on(number: int, _frame: object) -> None:
        heard.append(number)
        _send(children, number)

    handlers = {}
    try:
        with born_deaf():  # until they can end in order
            for child in children:
                child.start()
            handlers = {number: signal.signal(number, hand_on) for number in stop_signals()}
        yield heard
    finally:
        _send(children, signal.SIGKILL)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _wait(children: Sequence[BaseProcess], heard: Sequence[int]) -> int | None:
    """Until all have ended. The first of them to fail, killed ones before others; None where none has."""
    failed, since, due = None, 0.0, [(SETTLES, signal.SIGTERM), (SETTLES + PATIENCE, signal.SIGKILL)]
    while True:
        codes = [child.exitcode for child in children]  # all at one look: an end between two would be missed
        ended = [rank for rank, code in enumerate(codes) if code]
        running = [child for child, code in zip(children, codes, strict=True) if code is None]
        if failed is None and ended:
            failed, since = min(ended, key=lambda rank: (codes[rank] or 0) > 0), time.monotonic()
        if not running:
            return failed
        if failed is not None and due and time.monotonic() - since > due[0][0]:
            _, number = due.pop(0)
            if not heard or number == signal.SIGKILL:  # they know already
                _send(running, number)
        connection.wait([child.sentinel for child in running], timeout=0.5)


def _send(children: Sequence[BaseProcess], number: int) -> None:
    for child in children:
        if child.pid is not None and child.exitcode is None:
            with suppress(ProcessLookupError):
                os.kill(child.pid, number)


def findable[*P](work: Callable[[*P], int]) -> Callable[[*P], int]:
    """Work that another process finds. Of `python -m package` it would look in `__main__`, where nothing is."""
    spec = sys.modules[work.__module__].__spec__
    if work.__module__ != "__main__" or spec is None:
        return work
    return cast("Callable[[*P], int]", partial(_named, spec.name, work.__qualname__))


def _named(module: str, name: str, *arguments: Any) -> int:
    return getattr(import_module(module), name)(*arguments)


def _begin[*P](
    launcher: int, rank: int, about: dict[str, int], errors: Path, work: Callable[[*P], int], arguments: tuple[*P]
) -> None:
    """In a child."""
    named = {**about, "LOCAL_WORLD_SIZE": about["WORLD_SIZE"], "RANK": rank, "LOCAL_RANK": rank, ONE_OF_EACH_SIGNAL: 1}
    os.environ.update({key: str(value) for key, value in named.items()}, MASTER_ADDR="127.0.0.1")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cpus() // about["WORLD_SIZE"])))
    if rank:
        for stream, path in ((1, os.devnull), (2, errors)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    status = in_a_child(launcher, work, *arguments)
    if rank and 0 < status < 128:
        time.sleep(FIRST_SPEAKS)
    sys.exit(status)


def in_a_child[*P](launcher: int, work: Callable[[*P], int], *arguments: *P) -> int:
    """The exit status of `work(*arguments)` in a process that was born deaf: as a command of its own.

    It is in a process group of its own, hears signals from now on, and ends by itself when its launcher is gone.
    """
    os.setpgid(0, 0)
    threading.Thread(target=_end_with, args=(launcher,), daemon=True).start()
    quieten_libraries()
    end_on_signals()

    def hearing() -> int:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        return work(*arguments)

    return errors_in_one_line(hearing)


def _end_with(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(PATIENCE)
    os.kill(os.getpid(), signal.SIGKILL)
