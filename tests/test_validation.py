"""Validation alone, of policies that say what they were asked."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lerobot.utils.constants import ACTION

from kuavo_train.config import RunConfig
from kuavo_train.data.dataset import MixedDataset
from kuavo_train.data.normalization import fit_normalization
from kuavo_train.data.task import open_task
from kuavo_train.evaluation.predictions import stratified_time
from kuavo_train.evaluation.validation import Validator, shared_out
from kuavo_train.runs.records import HeldOutScores

OFF_BY = {
    "left_arm": 0.5,
    "right_arm": 0.25,
    "claws": 1.0,
    "base_position": 2.0,
    "base_yaw": 3.0,
    "base_mode": 4.0,
}  # normalised


@dataclass(frozen=True)
class Age:
    """A memory that knows how many queries it has seen, [B]."""

    queries: torch.Tensor

    def select(self, lanes: torch.Tensor) -> "Age":
        return Age(self.queries[lanes])


class Witness(torch.nn.Module):
    """Its loss is the age of its memory plus what noise and time make of it; its actions are off by `OFF_BY`."""

    def __init__(self, validator: Validator, *, memory: bool, noisy: bool = False):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(chunk_size=6, max_action_dim=32, n_action_steps=4, has_memory=memory)
        self.noisy = noisy
        groups = validator.normalization.space.action_groups()
        self.off_by = torch.zeros(sum(map(len, groups.values())))
        for group, columns in groups.items():
            self.off_by[columns] = OFF_BY[group]

    def encode(self, batch: dict[str, Any], memory: Age | None) -> tuple[torch.Tensor, Age]:
        age = torch.zeros(len(batch["task"])) if memory is None else memory.queries
        return age, Age(age + 1)

    def flow_loss(self, age: torch.Tensor, batch: Any, noise: torch.Tensor, time: torch.Tensor, _: str) -> torch.Tensor:
        assert not self.training
        said = (noise.mean(dim=(1, 2)) * time).unflatten(0, (len(age), -1)).mean(dim=1)
        return age + said if self.noisy else age

    def draw_noise(self, generators: Sequence[np.random.Generator]) -> torch.Tensor:
        return torch.from_numpy(np.stack([each.standard_normal((6, 32), dtype=np.float32) for each in generators]))

    def denoise(self, age: torch.Tensor, batch: dict[str, Any], noise: torch.Tensor) -> torch.Tensor:
        torch.rand(3)  # whatever a policy draws is nobody else's business
        return batch[ACTION] + self.off_by


@pytest.fixture(scope="module")
def validator(configs: list[RunConfig]) -> Validator:
    tasks = [open_task(config.stage, config.data) for config in configs]
    normalization = fit_normalization(tasks, "joint")

    def no_picture(_camera: str, rows: np.ndarray) -> torch.Tensor:
        return torch.zeros(len(rows), 3, 2, 2, dtype=torch.uint8)

    dataset = MixedDataset(tasks, [no_picture] * len(tasks), normalization, actions=range(6))
    return Validator(dataset, normalization, dict, draws=3, batch_size=64, autocast=nullcontext, progress=False)


def names(validator: Validator) -> list[str]:
    return [task.name for task in validator.dataset.tasks]


def asked(validator: Validator, policy: Witness, *tasks: str) -> dict[str, HeldOutScores]:
    """Task → its scores, without the time they took."""
    found = validator.validate_all_tasks(policy, tasks or names(validator))
    return {scores.task: replace(scores, seconds=None) for scores in found}


def test_the_same_questions_give_the_same_digits_in_any_company(validator: Validator) -> None:
    policy = Witness(validator, memory=True, noisy=True)
    once = asked(validator, policy)
    assert asked(validator, policy) == once
    assert asked(validator, policy, "sorting") == {"sorting": once["sorting"]}
    one_by_one = asked(replace(validator, batch_size=1), policy)
    for task, scores in once.items():
        assert one_by_one[task].loss == pytest.approx(scores.loss, rel=1e-6)
    losses = [scores.loss for scores in once.values()]
    assert len(set(losses)) == len(losses)  # other tasks, other noise


@pytest.mark.parametrize("memory", [False, True], ids=["queries alone", "walks"])
def test_processes_share_the_questions_and_come_to_the_same_digits(validator: Validator, *, memory: bool) -> None:
    policy, validator = Witness(validator, memory=memory, noisy=True), replace(validator, batch_size=2)
    shares = [validator.measure(policy, names(validator), process=process, processes=3) for process in range(3)]
    asked_by = [sum(len(each) for part in share.values() for each in part.by_episode.values()) for share in shares]
    parts = [number for share in shares for number in share]
    assert sorted(parts) == list(range(len(parts)))
    assert min(asked_by) > sum(asked_by) / 3 / 2
    found = validator.scores(reversed(shares), names(validator))
    assert {scores.task: replace(scores, seconds=None) for scores in found} == asked(validator, policy)


def test_a_share_of_what_is_too_little_for_all_may_be_nothing() -> None:
    assert shared_out([5, 3, 3], 2) == [[0], [1, 2]]
    assert shared_out([5], 3) == [[0], [], []]


def test_nothing_of_training_is_touched(validator: Validator) -> None:
    policy = Witness(validator, memory=True).train()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    asked(validator, policy)
    assert torch.equal(torch.get_rng_state(), before)
    assert policy.training
    assert policy.weight.grad is None


@pytest.mark.parametrize("batch_size", [1, 64])
@pytest.mark.parametrize(("memory", "age"), [(True, (0 + 1 + 2 + 3) / 4), (False, 0)])
def test_memory_is_carried_through_an_episode_and_never_beyond(
    validator: Validator, batch_size: int, memory: bool, age: float
) -> None:
    found = asked(replace(validator, batch_size=batch_size), Witness(validator, memory=memory))
    for task in validator.dataset.tasks:
        episodes = found[task.name].episodes
        assert [episode.episode for episode in episodes] == list(task.held_out_episodes)
        assert [episode.loss for episode in episodes] == [age] * 2
        assert [episode.frames for episode in episodes] == [4] * 2  # 14 frames, a query every 4


def test_the_action_error_is_told_normalised_and_per_joint_group_in_robot_units(validator: Validator) -> None:
    found = asked(validator, Witness(validator, memory=False))
    std = validator.normalization.array(ACTION, "std")
    groups = validator.normalization.space.action_groups()
    for task in validator.dataset.tasks:
        errors = found[task.name].action_error_by_group
        assert list(errors) == ["left_arm", "claws", "right_arm", "base_position", "base_yaw", "base_mode"]
        for group, columns in groups.items():
            absent = group.startswith("base") and task.name != "sorting"
            assert errors[group] == (None if absent else pytest.approx(OFF_BY[group] * std[columns].mean(), rel=1e-4))
    arms_and_claws = (7 * 0.5 + 7 * 0.25 + 2 * 1.0) / 16
    assert found["weighing"].action_error == pytest.approx(arms_and_claws, rel=1e-4)
    assert found["sorting"].action_error == pytest.approx((16 * arms_and_claws + 11.0) / 20, rel=1e-4)


def test_times_divide_the_training_distribution_into_equal_parts() -> None:
    times = np.array([stratified_time(draw, 10) for draw in range(10)])
    assert ((times - 0.001) / 0.999) ** 1.5 == pytest.approx((np.arange(10) + 0.5) / 10)  # Beta(1.5, 1) up to t: t^1.5
