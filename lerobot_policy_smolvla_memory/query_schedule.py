"""When a memory advances under real-time chunking, which queries the policy whenever its queue runs low.

In training the memory advances once every `n_action_steps`. Real-time chunking queries at a rate of its own, set by the
robot's clock and `queue_threshold`. It hands over what is left of the last plan, which shows how many steps of the plan
were carried out.
"""

from torch import Tensor


def advance(every: int, since: int) -> tuple[bool, int]:
    """Whether the memory advances with a query, and how many steps then count towards its next advance.

    Args:
        every: `n_action_steps`, steps between the queries of training.
        since: steps carried out since the memory last advanced.
    """
    return (False, since) if since < every else (True, since % every)


class QuerySchedule:
    """Decides for each query whether the memory advances with it.

    It does with the first of an episode, and with the first after every `n_action_steps` carried out. Between them the
    policy plans anew from the memory that it has. Where queries are farther apart, it advances with every one.
    """

    def __init__(self, n_action_steps: int):
        self._every = n_action_steps
        self._plan: Tensor | None = None
        self._executed = 0  # steps since the memory last advanced

    def advances(self, left_over: Tensor | None) -> bool:
        """
        Args:
            left_over: [T, A] or [B, T, A], what has not been carried out of the plan before; None where there is none.
        """
        executed = None if self._plan is None or left_over is None else self._place_in_plan(left_over)
        if executed is None:  # a first query, or none of the plan is left
            self._executed = 0
            return True
        advances, self._executed = advance(self._every, self._executed + executed)
        return advances

    def plan(self, actions: Tensor) -> None:
        """[B, T, A] what the query returned."""
        self._plan = actions

    def _place_in_plan(self, left_over: Tensor) -> int | None:
        """How many steps of the plan come before what is left of it; None when that is not of the plan."""
        assert self._plan is not None, "looked up only where there is one"
        plan, first = self._plan[0], left_over.reshape(-1, left_over.shape[-1])[0]
        if first.shape != plan[0].shape:
            return None
        found = (plan == first.to(plan)).all(dim=-1).nonzero()
        return int(found[0]) if len(found) else None
