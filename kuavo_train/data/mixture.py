"""What a stage samples, decided here and nowhere else: the tasks that are new in it, and the share of each task.

`mixture` in the configuration names one of three: `replay` (the new task and the earlier ones, by the shares of its
file), `own_task` (the new task alone), `all_tasks` (every task is new, in one stage). Everything else calls
`mixture_of`.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from fractions import Fraction

from kuavo_train.config import RunConfig
from kuavo_train.data.replay.shares import proportional_shares


@dataclass(frozen=True)
class Mixture:
    """
    Attributes:
        passes: task that is new in the stage → passes over its training frames; in the order of learning.
        replayed: task learnt before → its share of the stage's samples.
        dealt: task that the run does not learn before this stage → the share that the other tasks have got of it.
    """

    passes: Mapping[str, int]
    replayed: Mapping[str, float] = field(default_factory=dict)
    dealt: Mapping[str, float] = field(default_factory=dict)

    @property
    def learns(self) -> tuple[str, ...]:
        """The new tasks."""
        return tuple(self.passes)

    @property
    def leading(self) -> str:
        """The new task by whose passes the stage's epochs are counted: the first."""
        return self.learns[0]

    def shares(self, frames: Mapping[str, int]) -> dict[str, float]:
        """Task → share of the samples, summing to 1: what is not replayed is the new tasks', by passes times frames.

        Args:
            frames: task → its training frames; the new tasks are among them.
        """
        left = 1 - sum((Fraction(str(share)) for share in self.replayed.values()), Fraction())
        new = proportional_shares({task: passes * frames[task] for task, passes in self.passes.items()})
        return dict(self.replayed) | {task: float(left * Fraction(str(share))) for task, share in new.items()}


def mixture_of(config: RunConfig) -> Mixture:
    """That of the config's stage."""
    if learns_all_at_once(config):
        return Mixture(config.passes)
    own = config.stage.name
    passes = {own: config.training.epochs}
    if config.mixture == "own_task":
        return Mixture(passes)
    replayed = {task: share for task, share in config.stage.replay.items() if share > 0 and task != own}
    return Mixture(passes, replayed, config.dealt)


def learns_all_at_once(config: RunConfig) -> bool:
    """Whether all tasks of the run are new in one stage, in place of a stage for each."""
    return config.mixture == "all_tasks"


def dealt_out(replay: Mapping[str, float], left_out: Collection[str]) -> tuple[dict[str, float], dict[str, float]]:
    """Replay shares where the run does not learn some of the tasks before: what the others get, and what they got."""
    dealt = {task: share for task, share in replay.items() if share > 0 and task in left_out}
    if not dealt:
        return dict(replay), {}
    return proportional_shares({task: share for task, share in replay.items() if task not in dealt}), dealt
