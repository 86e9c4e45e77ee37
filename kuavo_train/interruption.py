"""What stops a command: Ctrl-C, a scheduler's SIGTERM or its warning SIGUSR1, a terminal that is closed.

A command that has not begun a stage ends at once (`end_on_signals`). A stage listens: what must be whole, such as a
step, is finished, and what can be done again, such as a validation, is given up. The exit status is 128 + the signal's
number, and the same command continues.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any, NoReturn, TextIO

from kuavo_sim.children import STOP_SIGNALS
from kuavo_train.errors import Interrupted

ONE_OF_EACH_SIGNAL = "KUAVO_ONE_OF_EACH_SIGNAL"
"""Set in the environment of processes that train together and get every signal once."""


class Listening:
    """Notes the first signal instead of dying of it; a second SIGINT interrupts at once.

    Attributes:
        number: of the signal that has arrived.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._gives_up = False

    @contextlib.contextmanager
    def giving_up(self) -> Iterator[None]:
        """Around work that can be done again: a signal ends it where it is. Raises `Interrupted`."""
        before, self._gives_up = self._gives_up, True
        try:
            if self.number is not None:
                raise Interrupted(self.number)
            yield
        finally:
            self._gives_up = before

    def hear(self, number: int, _frame: FrameType | None = None) -> None:
        if self.number is not None:
            # Other launchers of several processes hand on what the terminal has sent to all of them already.
            once = os.environ.get("WORLD_SIZE", "1") == "1" or ONE_OF_EACH_SIGNAL in os.environ
            if number == signal.SIGINT and once:
                raise KeyboardInterrupt
            return
        self.number = number
        with contextlib.suppress(OSError):  # past Python's streams, which the signal may have come in the midst of
            os.write(2, b"\nstopping ...\n" if self._gives_up else b"\nstopping after this step ...\n")
        if self._gives_up:
            raise Interrupted(number)


@contextlib.contextmanager
def listening() -> Iterator[Listening]:
    """For the time of a stage."""
    listener = Listening()
    handlers = {number: signal.signal(number, listener.hear) for number in stop_signals()}
    try:
        yield listener
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def end_on_signals() -> None:
    """For a command's time outside of stages: unwinds, so that nothing half-written stays. SIGINT does so by itself."""
    for number in stop_signals() - {signal.SIGINT}:
        signal.signal(number, lambda number, _frame: sys.exit(128 + number))
    sys.stdout, sys.stderr = Lasting(sys.stdout), Lasting(sys.stderr)  # type: ignore[assignment]


def main_ends_on_signals(main: Callable[[Sequence[str]], int]) -> NoReturn:
    """Of a command that trains no stage: `main(words)` and out, with a word where Ctrl-C would give a traceback."""
    end_on_signals()
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def stop_signals() -> set[signal.Signals]:
    """All stop signals, but of a closed terminal only where `nohup` has not said otherwise."""
    return {n for n in STOP_SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN}


class Lasting:
    """A stream whose reader may go: Ctrl-C ends the `tee` of a pipeline too. What nobody reads is no reason to die."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            self._let_go()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._let_go()

    def _let_go(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:  # whatever else a stream has
        return getattr(self._stream, name)
