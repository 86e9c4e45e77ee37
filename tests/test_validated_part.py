"""Which held-out episodes are validated where tasks are many."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
from stages import changed

from kuavo_train.config import RunConfig
from kuavo_train.data.task import Task, open_task
from kuavo_train.data.validated import queries, validated_part, validations

STRIDE, EPOCHS = 4, 4


@pytest.fixture(scope="module")
def tasks(configs: list[RunConfig]) -> list[Task]:
    """Of five episodes each, four of which are held out."""
    return [open_task(config.stage, replace(config.data, held_out_episodes=4)) for config in configs]


def part(config: RunConfig, tasks: Sequence[Task], share: float | None) -> dict[str, tuple[int, ...]]:
    settings = changed(config, validation={"share": share, "every_epochs": 2}, training={"epochs": EPOCHS})
    return validated_part(settings, tasks, STRIDE)


def cost(tasks: Sequence[Task], chosen: Mapping[str, Sequence[int]]) -> float:
    """Queries per sample of the shortest stage, once all tasks are learnt."""
    asked = sum(queries(task, chosen[task.name], STRIDE) for task in tasks)
    return validations(EPOCHS, 2) * asked / (EPOCHS * min(len(task.train_rows) for task in tasks))


def test_as_many_episodes_are_validated_as_the_share_allows_and_two_at_least(
    configs: list[RunConfig], tasks: list[Task]
) -> None:
    everything = {task.name: task.held_out_episodes for task in tasks}
    assert part(configs[0], tasks, None) == everything
    three = part(configs[0], tasks, cost(tasks, everything) * 0.99)
    assert {len(episodes) for episodes in three.values()} == {3}
    assert cost(tasks, three) <= cost(tasks, everything) * 0.99
    assert {len(episodes) for episodes in part(configs[0], tasks, 1e-6).values()} == {2}


def test_a_smaller_part_is_of_the_larger_one_so_that_runs_compare_on_what_both_have(
    configs: list[RunConfig], tasks: list[Task]
) -> None:
    three = part(configs[0], tasks, cost(tasks, {task.name: task.held_out_episodes for task in tasks}) * 0.99)
    for task, episodes in part(configs[0], tasks, 1e-6).items():
        assert set(episodes) < set(three[task])


def test_the_part_depends_on_the_seed_of_the_split_and_on_no_order_strategy_or_seed_of_training(
    configs: list[RunConfig], tasks: list[Task]
) -> None:
    chosen = part(configs[0], tasks, 1e-6)
    assert part(changed(configs[0], seed=7), tasks[::-1], 1e-6) == chosen
    joint = changed(configs[0], strategy="joint", mixture="all_tasks", passes={task.name: EPOCHS for task in tasks})
    assert part(joint, tasks, 1e-6) == chosen
    assert part(changed(configs[0], data={"split_seed": 1}), tasks, 1e-6) != chosen


def test_a_limit_on_steps_leaves_a_joint_stage_the_same_part(configs: list[RunConfig], tasks: list[Task]) -> None:
    alone = changed(configs[0], training={"max_steps": 2, "batch_size": 7})
    together = changed(
        alone, strategy="joint", mixture="all_tasks", training={"max_steps": 8}, passes=dict.fromkeys("abcd", EPOCHS)
    )
    share = 4 * 2 * queries(tasks[0], tasks[0].held_out_episodes[:3], STRIDE) / 14
    assert part(alone, tasks, share) == part(together, tasks, share)
    assert {len(episodes) for episodes in part(alone, tasks, share).values()} == {3}


def test_more_tasks_leave_fewer_episodes_to_each(configs: list[RunConfig], tasks: list[Task]) -> None:
    share = cost(tasks[:1], {tasks[0].name: tasks[0].held_out_episodes})
    assert {len(episodes) for episodes in part(configs[0], tasks[:1], share).values()} == {4}
    assert {len(episodes) for episodes in part(configs[0], tasks, share).values()} == {2}
