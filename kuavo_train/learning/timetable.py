"""How many steps a stage takes, and when its epochs end.

An epoch is one pass over the frames of the task being learnt. Where replay is raised during a stage, that task has a
smaller part of every batch from then on, so an epoch takes more steps: replay never shortens the new task's training.
"""


class Timetable:
    """Epochs in steps; those after a `lengthen` take longer.

    Args:
        epochs: passes over the new task's frames.
        steps_per_epoch: optimizer steps of one pass.
        max_steps: an upper limit.
    """

    def __init__(self, *, epochs: int, steps_per_epoch: int, max_steps: int | None = None):
        self.epochs, self.max_steps = epochs, max_steps
        self._stretches = [(0, 0, steps_per_epoch)]  # first step, epochs done by then, steps per epoch

    def lengthen(self, step: int, steps_per_epoch: int) -> None:
        """From the end of the epoch at `step` on, an epoch takes so many steps."""
        done = self.epoch(step)
        if done != int(done):
            raise ValueError(f"an epoch must end at the step that lengthens the next ones, got step {step}: {done}")
        self._stretches.append((step, int(done), steps_per_epoch))

    @property
    def steps(self) -> int:
        """Of the whole stage."""
        first, done, per_epoch = self._stretches[-1]
        steps = first + (self.epochs - done) * per_epoch
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def epoch(self, step: int) -> float:
        """Passes done after `step` steps."""
        first, done, per_epoch = next(each for each in reversed(self._stretches) if each[0] <= step)
        return done + (step - first) / per_epoch

    def planned(self, step: int) -> float:
        """Where the stage would be, in steps, if no epoch had been lengthened: what the learning rate goes by."""
        return step if len(self._stretches) == 1 else self.epoch(step) * self._stretches[0][2]

    def validates(self, step: int, *, every: int) -> bool:
        """Whether `step` ends the stage, or an epoch whose number `every` divides."""
        return step == self.steps or self.epoch(step) % every == 0
