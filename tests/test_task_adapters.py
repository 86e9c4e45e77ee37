"""Adapters of single tasks beside layers that stay, without a policy around them."""

import pytest
import torch
from torch import nn

from lerobot_policy_smolvla_memory.adapters import BASE, TaskAdapters

GRASP, WEIGH, STACK = (1, 2, 3), (4, 5, 6), (4, 5, 7)
EMBEDDINGS = torch.eye(10)


@pytest.fixture
def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 3)


@pytest.fixture
def adapters(layer: nn.Linear) -> TaskAdapters:
    """Of three tasks, those of the second and the third differ."""
    made = TaskAdapters({"some.layer": layer}, [[GRASP], [WEIGH], [STACK]], rank=2)
    with torch.no_grad():
        for place, adapter in enumerate(made.of_task):
            for values in adapter.up.values():
                values.fill_(place + 1.0)
    return made


def test_the_first_task_is_computed_to_the_last_bit_as_without_adapters(
    layer: nn.Linear, adapters: TaskAdapters
) -> None:
    inputs = torch.randn(2, 5, 4)
    adapters.choose([GRASP, GRASP], EMBEDDINGS)
    assert torch.equal(layer(inputs), torch.nn.functional.linear(inputs, layer.weight, layer.bias))


def test_rows_of_several_tasks_in_a_batch_are_computed_as_each_alone_with_all_their_draws(
    layer: nn.Linear, adapters: TaskAdapters
) -> None:
    inputs, rows = torch.randn(6, 5, 4), [STACK, GRASP, WEIGH]
    adapters.choose(rows, EMBEDDINGS)
    together = layer(inputs)  # two draws of each row, next to each other
    for place, tokens in enumerate(rows):
        adapters.choose([tokens], EMBEDDINGS)
        draws = slice(2 * place, 2 * place + 2)
        assert torch.allclose(layer(inputs[draws]), together[draws])
    assert not torch.allclose(together[0], layer(inputs[:1])[0])


def test_an_instruction_that_was_not_learnt_takes_the_task_of_the_most_similar_one(adapters: TaskAdapters) -> None:
    assert adapters.choose([(4, 5, 7, 9), (2, 1), WEIGH], EMBEDDINGS) == [2, BASE, 1]


def test_a_new_adapter_begins_as_that_of_the_most_similar_task_or_at_nothing(
    layer: nn.Linear, adapters: TaskAdapters
) -> None:
    assert adapters.begin(EMBEDDINGS) == 1
    assert all(
        torch.equal(mine, other)
        for mine, other in zip(adapters.of_task[1].parameters(), adapters.of_task[0].parameters(), strict=True)
    )
    like_the_first = TaskAdapters({"some.layer": layer}, [[GRASP], [WEIGH], [(1, 2)]], rank=2)
    assert like_the_first.begin(EMBEDDINGS) == BASE
    assert not any(values.any() for values in like_the_first.of_task[1].up.values())


def test_a_batch_of_other_rows_than_adapters_were_chosen_for_is_refused(
    layer: nn.Linear, adapters: TaskAdapters
) -> None:
    adapters.choose([WEIGH, STACK], EMBEDDINGS)
    with pytest.raises(ValueError, match=r"3 rows were given to some.layer, but adapters are chosen for 2"):
        layer(torch.randn(3, 5, 4))
