"""What a robot's episode carries from one query of the policy to the next.

A robot may look sooner or later than it did in training. It says how many steps it has carried out since its last look,
and the memory advances as in training: with the first look, and with the first one after every `n_action_steps` carried
out. Looks in between plan anew from the memory as it is. A robot that looks later advances it once a look.
"""

from dataclasses import dataclass, replace
from typing import Self

from torch import Tensor

from lerobot_policy_smolvla_memory.memory import MemoryState
from lerobot_policy_smolvla_memory.query_schedule import advance


@dataclass(frozen=True)
class RobotEpisode:
    """
    Attributes:
        seed: the episode's own part of the seed of what the policy draws.
        steps: carried out since the episode began.
        since: steps carried out since the memory last advanced.
        advanced: how often the memory has advanced.
        memory: of one robot; None before the first query, and without memory.
        plan: [T, A] of the last query, normalized, from the step of its look on; None before the first.
    """

    seed: int = 0
    steps: int = 0
    since: int = 0
    advanced: int = 0
    memory: MemoryState | None = None
    plan: Tensor | None = None

    def moved(self, executed: int) -> Self:
        """So many steps have been carried out since the last look."""
        return replace(self, steps=self.steps + executed, since=self.since + executed)

    def looked(self, plan: Tensor, memory: MemoryState | None, *, every: int) -> Self:
        """After a query.

        Args:
            memory: as the query leaves it.
            every: `n_action_steps`.
        """
        first = self.plan is None
        advances, since = (True, 0) if first else advance(every, self.since)
        if not advances:
            return replace(self, plan=plan)
        return replace(self, plan=plan, since=since, advanced=self.advanced + 1, memory=memory)
