"""One will for all processes: what a signal to any of them stops, it stops in all, at the same place."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

from accelerate import Accelerator
from accelerate.utils import gather_object

from kuavo_train.errors import Interrupted
from kuavo_train.interruption import Listening


@dataclass
class Agreement:
    """
    Attributes:
        exit_status: of the stage: 0, or of the signal that has ended it.
    """

    listener: Listening
    accelerator: Accelerator
    exit_status: int = 0

    def signal(self) -> int | None:
        """The number of the signal that any process has received."""
        number = self.listener.number or 0
        if self.accelerator.num_processes > 1:
            number = max(gather_object([number]))
        return number or None

    def repeatable[T](self, work: Callable[[], T]) -> T:
        """What `work` gives, which can be done again: a signal to any of the processes raises `Interrupted` in all."""
        done: list[T] = []
        with contextlib.suppress(Interrupted), self.listener.giving_up():
            done.append(work())
        number = self.signal()
        if number is not None:
            raise Interrupted(number)
        return done[0]
