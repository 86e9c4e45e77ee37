"""How many steps a stage takes, and when its epochs end.

An epoch is one pass over the frames of the task being learnt. Where replay is raised during a stage, that task has a
smaller part of every batch from then on, so an epoch takes more steps: replay never shortens the new task's training.
Where more processes go on with a stage, a step takes more samples, and an epoch fewer steps.
"""

import math
from fractions import Fraction


class Timetable:
    """Epochs in steps; those after a `change` take another number of them.

    Args:
        epochs: passes over the new task's frames.
        steps_per_epoch: optimizer steps of one pass.
        max_steps: an upper limit.
    """

    def __init__(self, *, epochs: int, steps_per_epoch: int, max_steps: int | None = None):
        self.epochs, self.max_steps = epochs, max_steps
        # first step, epochs done by then, steps per epoch
        self._stretches = [(0, Fraction(0), steps_per_epoch)]

    def change(self, step: int, steps_per_epoch: int) -> None:
        """From `step` on an epoch takes so many steps."""
        done = self._done(step)
        self._stretches = [*(each for each in self._stretches if each[0] < step), (step, done, steps_per_epoch)]

    @property
    def steps(self) -> int:
        """Of the whole stage."""
        first, done, per_epoch = self._stretches[-1]
        steps = first + math.ceil((self.epochs - done) * per_epoch)
        return steps if self.max_steps is None else min(steps, self.max_steps)

    @property
    def planned_steps(self) -> int:
        """Of the whole stage, as planned when it began."""
        steps = self.epochs * self._stretches[0][2]
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def _done(self, step: int) -> Fraction:
        first, done, per_epoch = next(each for each in reversed(self._stretches) if each[0] <= step)
        return done + Fraction(step - first, per_epoch)

    def epoch(self, step: int) -> float:
        """Passes done after `step` steps."""
        return float(self._done(step))

    def number(self, step: int) -> int:
        """The epoch, from 1 on, that ends with `step`, or that is not over then."""
        done = self._done(step)
        return math.floor(done) if self._ends(step, every=1) else math.ceil(done)

    def planned(self, step: int) -> float:
        """Where the stage would be, in steps, if its epochs had not changed: what the learning rate goes by."""
        return step if len(self._stretches) == 1 else float(self._done(step) * self._stretches[0][2])

    def validates(self, step: int, *, every: int) -> bool:
        """Whether `step` ends the stage, or an epoch whose number `every` divides."""
        return step == self.steps or self._ends(step, every=every)

    def _ends(self, step: int, *, every: int) -> bool:
        return step > 0 and self._done(step) // every > self._done(step - 1) // every
