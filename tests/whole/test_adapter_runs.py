"""Whole runs with an adapter for each task: nothing is forgotten, and any LeRobot tool opens the result."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import interrupted_in_step
from lerobot.configs import PreTrainedConfig
from lerobot.policies.factory import get_policy_class
from small_datasets import CAMERAS
from stages import assert_equal_weights, changed, records, run, weights

from kuavo_train.config import AdaptersConfig, RunConfig
from kuavo_train.curriculum import train_all_stages
from kuavo_train.data.batch import preprocess
from kuavo_train.data.sampler import Draw
from kuavo_train.probing.recovery import recovery
from kuavo_train.probing.validated_run import NothingToProbe
from kuavo_train.runs.run_folder import stage_folder
from kuavo_train.runs.trained_run import TrainedRun
from kuavo_train.wrapper.policy.smolvla import SmolVLAPolicyWrapper

WITH_ADAPTERS = {"strategy": "adapters", "mixture": "own_task", "adapters": AdaptersConfig(rank=4)}


@pytest.fixture(scope="module")
def trained(
    small_configs_in: Callable[..., list[RunConfig]], tmp_path_factory: pytest.TempPathFactory
) -> list[RunConfig]:
    """A finished run of three tasks, with an average of the weights and a gate."""
    words = ("learn=[moving_grasp,weighing,sorting]", "policy.mem_backprop_depth=2")
    gate = {"budget": 0.01, "on_exceed": "stop"}
    changes = {**WITH_ADAPTERS, "forgetting": gate, "training": {"ema": 0.5, "lr": 1e-2, "warmup_steps": 0}}
    configs = small_configs_in(tmp_path_factory.mktemp("adapters"), *words, **changes)
    assert train_all_stages(configs) == 0
    return configs


def test_a_task_that_was_learnt_keeps_its_losses_to_the_last_digit(trained: list[RunConfig]) -> None:
    def measured(place: int, task: str) -> float:
        (found,) = (each for each in records(stage_folder(trained[place]), "end") if each["task"] == task)
        return found["loss"]

    assert measured(1, "moving_grasp") == measured(2, "moving_grasp")
    assert measured(1, "moving_grasp") == pytest.approx(measured(0, "moving_grasp"), rel=1e-5)  # embeddings are cached
    assert measured(1, "weighing") == measured(2, "weighing")
    assert measured(1, "sorting") != measured(2, "sorting")


def test_the_gate_has_nothing_to_stop(trained: list[RunConfig]) -> None:
    readings = stage_folder(trained[2]).gate.read()
    assert {reading["task"] for reading in readings} == {"moving_grasp", "weighing"}
    assert not any(reading["exceeded"] for reading in readings)


def test_a_robot_gets_the_same_actions_for_a_learnt_task_from_every_later_checkpoint(trained: list[RunConfig]) -> None:
    random = np.random.default_rng(0)
    seen = {f"observation.images.{camera}": random.integers(0, 256, (32, 32, 3), dtype=np.uint8) for camera in CAMERAS}
    seen["observation.state"] = random.normal(size=16).astype(np.float32)

    def action(place: int, task: str) -> np.ndarray:
        folder = stage_folder(trained[place]).path / "checkpoints" / "best"
        return SmolVLAPolicyWrapper.from_pretrained(folder, device="cpu", seed=3).select_action(seen | {"task": task})

    np.testing.assert_array_equal(action(2, "weighing"), action(1, "weighing"))
    np.testing.assert_array_equal(action(2, "moving_grasp"), action(0, "moving_grasp"))


def test_a_later_stage_trains_its_own_adapter_and_changes_nothing_else(trained: list[RunConfig]) -> None:
    first, second, third = (weights(stage_folder(config), "best") for config in trained)
    assert set(second) - set(first) == {name for name in second if name.startswith("model.adapters.of_task.0.")}
    assert set(third) - set(second) == {name for name in third if name.startswith("model.adapters.of_task.1.")}
    assert_equal_weights({name: third[name] for name in first}, first)
    assert_equal_weights({name: third[name] for name in second}, second)
    for name in set(second) - set(first):
        if ".up." in name and "action_out_proj" in name:
            assert second[name].any()


def test_lerobots_classes_open_the_result_and_the_instruction_chooses_row_by_row(trained: list[RunConfig]) -> None:
    opened = TrainedRun.open(trained[0].run_folder)
    checkpoint = opened.checkpoint(opened.stored.finished[-1])
    config = PreTrainedConfig.from_pretrained(checkpoint.pretrained_model)
    policy = get_policy_class(config.type).from_pretrained(checkpoint.pretrained_model, config=config).eval()
    _, preprocessor = opened.policy(checkpoint)
    batch = preprocess(
        opened.dataset(opened.tasks, config).fetch([Draw(place, 0) for place in (2, 0, 1)]), preprocessor, "cpu"
    )
    noise = torch.randn(3, config.chunk_size, config.max_action_dim)
    together, _ = policy.sample_actions_with(batch, noise=noise)
    known = policy.model.adapters.instructions
    for row, place in enumerate((2, 0, 1)):
        alone = {key: value[row : row + 1] for key, value in batch.items() if isinstance(value, torch.Tensor)}
        actions, _ = policy.sample_actions_with(alone, noise=noise[row : row + 1])
        assert policy.model.adapters.choose(known[place], policy.model.word_embeddings) == [place]
        assert torch.allclose(actions[0], together[row], atol=1e-5)


def test_an_instruction_of_a_dataset_is_found_word_for_word(trained: list[RunConfig]) -> None:
    opened = TrainedRun.open(trained[0].run_folder)
    policy, preprocessor = opened.policy(opened.checkpoint(opened.stored.finished[-1]))
    known = dict(policy.model.adapters._known)
    for place in range(3):
        batch = opened.dataset(opened.tasks, policy.config).fetch([Draw(place, 0)])
        policy._choose_adapters(preprocess(batch, preprocessor, "cpu"))
        assert policy.model.adapters._rows == [place]
    assert policy.model.adapters._known == known  # nothing had to be compared


def test_an_interrupted_stage_with_an_adapter_goes_on_to_the_same_weights(
    trained: list[RunConfig], tmp_path: Path
) -> None:
    copy = [changed(config, outputs=str(tmp_path)) for config in trained]
    shutil.copytree(trained[0].run_folder, copy[0].run_folder, symlinks=True)
    shutil.rmtree(stage_folder(copy[2]).path)
    with interrupted_in_step(3):
        assert run(copy, 2) == 143
    assert run(copy, 2, resume=True) == 0
    assert_equal_weights(weights(stage_folder(copy[2])), weights(stage_folder(trained[2])))


def test_nothing_can_be_recovered_where_nothing_can_be_lost(trained: list[RunConfig]) -> None:
    with pytest.raises(NothingToProbe, match="recovery needs weights that later stages change, got strategy=adapters"):
        recovery(TrainedRun.open(trained[0].run_folder))
