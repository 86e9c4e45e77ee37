"""Processes that work for another: loader workers, simulators, recorders.

A signal to stop goes to the whole process group (`timeout`, docker, SLURM, Ctrl-C). The parent decides what follows:
it finishes its step, and needs its children for that. They end with the parent, or when it stops them.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker

STOP_SIGNALS = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP})
"""Ctrl-C, a scheduler's end and its warning (SLURM's usual one), a terminal that was closed."""


@contextmanager
def born_deaf() -> Iterator[None]:
    """Processes started within are born with the stop signals blocked: no instant is left in which one kills them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        # The first process that is spawned starts this one, which unblocks what it blocked for itself.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def follow_parent() -> None:
    """In a child: end at once when the parent has ended, by whatever death, or terminates this process."""
    started_by = multiprocessing.parent_process()
    assert started_by is not None
    parent = started_by.pid

    def watch() -> None:
        received = None
        while os.getppid() == parent and (received is None or received.si_pid != parent):
            received = signal.sigtimedwait({signal.SIGTERM}, 1.0)
        os._exit(1)

    threading.Thread(target=watch, name="follow_parent", daemon=True).start()


def let_children_hear() -> None:
    """In a child born deaf, before what it starts itself: that inherits a blocked signal, but not a handler."""
    for number in STOP_SIGNALS:
        signal.signal(number, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
