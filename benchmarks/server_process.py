"""`python -m kuavo_train.serve` in a process of its own, for as long as a block lasts."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from kuavo_train.errors import RunError

PATIENCE = 60.0  # s until a server that does not end is given up


@dataclass(frozen=True)
class ServerProcess:
    address: str
    pid: int


@contextmanager
def served(*words: str) -> Iterator[ServerProcess]:
    """
    Args:
        words: of the command, but for the port: it takes a free one.

    Raises:
        RunError: it does not begin.
    """
    command = [sys.executable, "-m", "kuavo_train.serve", *words, "port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        said = server.stdout.readline()
        if not said:
            raise RunError("the server did not begin; what is wrong stands above")
        try:
            yield ServerProcess(said.split()[-1], server.pid)
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(PATIENCE)
