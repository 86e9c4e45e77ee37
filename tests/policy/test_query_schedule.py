"""Under real-time chunking a memory advances at the rate it was trained with, however often the policy is queried."""

import pytest
import torch

from lerobot_policy_smolvla_memory.query_schedule import QuerySchedule

PLAN = 50  # steps


def advances(every: int, executed: list[int]) -> list[bool]:
    """Whether the memory advances at the first query and after each of these numbers of steps carried out."""
    schedule, generator, advanced, left = QuerySchedule(every), torch.Generator().manual_seed(0), [], None
    for steps in (0, *executed):
        advanced.append(schedule.advances(left if left is None else left[:, steps:][0]))
        left = torch.randn(1, PLAN, 20, generator=generator)
        schedule.plan(left)
    return advanced


@pytest.mark.parametrize(
    ("executed", "expected"),
    [
        ([8, 8, 8], [True, True, True, True]),  # as in training
        ([4, 4, 4, 4], [True, False, True, False, True]),  # queried twice as often
        ([5, 5, 5, 5, 5, 5, 5, 5], [True, False, True, False, True, True, False, True, True]),  # 40 steps, 5 advances
        ([20, 20, 20], [True, True, True, True]),  # queried too seldom: with every query
        ([0, 0, 8], [True, False, False, True]),  # nothing was carried out in between
    ],
)
def test_it_advances_once_for_every_n_action_steps_carried_out(executed: list[int], expected: list[bool]) -> None:
    assert advances(8, executed) == expected


def test_it_advances_where_nothing_shows_how_much_was_carried_out() -> None:
    schedule = QuerySchedule(8)
    assert schedule.advances(None)
    schedule.plan(torch.ones(1, PLAN, 20))
    assert schedule.advances(None)
    assert schedule.advances(torch.zeros(10, 20))  # what LeRobot gives when the plan was used up
    assert schedule.advances(torch.zeros(10, 16))
