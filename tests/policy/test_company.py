"""Processes that share the batches of a step learn what one process with all of the samples does."""

import json
import os
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from tiny_sizes import ACTION_DIM, CHUNK
from together import together

from kuavo_train.config import TrainingConfig
from kuavo_train.data.batch import ACTION_DIM_IS_PAD, ACTION_IS_PAD, MEMORY_RESET, QUERY_IS_PAD, Batch, Origin
from kuavo_train.training.carried_memory import CarriedMemory
from kuavo_train.training.learner import Learner
from kuavo_train.training.step_metrics import MetricsWindow
from lerobot_policy_smolvla_memory import SmolVLAMemoryPolicy

CLIPS, QUERIES = 4, 2
ROWS = CLIPS * QUERIES
MEMORY = {
    "mem_backprop_depth": QUERIES,
    "flow_draws": 2,
    "rtc_training_delay": 2,
    "freeze_vision_encoder": True,
    "train_expert_only": True,
}
TRAINING = TrainingConfig(epochs=1, lr=1e-3, warmup_steps=5, decay_steps=50)
Inputs = dict[str, torch.Tensor]


@pytest.fixture
def masked_batch(make_batch: Callable[..., Inputs]) -> Callable[[int], Inputs]:
    """Chunks that end with the episode, of tasks that lack a dimension, and a row that fills up a clip: most of what is
    valid is in the first half."""

    def make(number: int) -> Inputs:
        lengths = torch.tensor([CHUNK, CHUNK, CHUNK, 4, 2, 1, 1, CHUNK])
        return {
            **make_batch(ROWS, seed=number),
            ACTION_IS_PAD: torch.arange(CHUNK) >= lengths[:, None],
            ACTION_DIM_IS_PAD: (torch.arange(ROWS) >= 6)[:, None] & (torch.arange(ACTION_DIM) == ACTION_DIM - 1),
            QUERY_IS_PAD: torch.arange(ROWS) == ROWS - 1,
            MEMORY_RESET: torch.arange(ROWS) == 2 * (number % CLIPS),
        }

    return make


def part_of(inputs: Inputs, accelerator: Accelerator) -> Batch:
    """The clips of this process; every clip has its stream."""
    rows = torch.arange(ROWS).chunk(accelerator.num_processes)[accelerator.process_index]
    origin = Origin(*[torch.zeros(len(rows), dtype=torch.long)] * 3, rows // QUERIES)
    return Batch({key: value[rows] for key, value in inputs.items()}, ["go"] * len(rows), origin, QUERIES)


def learner_of(policy: SmolVLAMemoryPolicy) -> Learner:
    accelerator = Accelerator(cpu=True)
    memory = policy.model.memory
    carried = None if memory is None else CarriedMemory(memory.initial(CLIPS), exchange=accelerator.gather)
    return Learner.of(policy.train(), dict, TRAINING, accelerator=accelerator, steps=50, recurrence=carried)


def learn(
    policy: SmolVLAMemoryPolicy, masked_batch: Callable[[int], Inputs], steps: int, per_step: int
) -> list[dict[str, float]]:
    """What is logged of every step."""
    learner = learner_of(policy)
    logged = []
    for step in range(steps):
        numbers = range(step * per_step, (step + 1) * per_step)
        batches = [part_of(masked_batch(number), learner.accelerator) for number in numbers]
        logged.append(learner.learn(batches, step=step, seed=step, window=MetricsWindow({})))
    return logged


@pytest.mark.parametrize(
    ("changes", "steps", "per_step"),
    [(MEMORY, 50, 1), ({"num_mem_tokens": 0, "fast_forward": False}, 5, 2)],
    ids=["with memory", "without, in accumulated batches"],
)
def test_two_processes_learn_what_one_does(
    make_policy, masked_batch, tmp_path: Path, changes, steps: int, per_step: int
) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)

    def learn_a_half() -> int:
        logged = learn(make_policy(**changes), masked_batch, steps, per_step)
        (tmp_path / os.environ["RANK"]).write_text(json.dumps(logged))
        return 0

    assert together(learn_a_half) == [0, 0]
    alone = learn(make_policy(**changes), masked_batch, steps, per_step)
    first, second = (json.loads((tmp_path / rank).read_text()) for rank in "01")
    assert first == second
    assert len(alone) == steps
    for one, two in zip(alone, first, strict=True):
        assert two == pytest.approx(one, rel=1e-5)
    assert alone[-1]["loss"] < alone[0]["loss"]


FETCHES = ("tolist", "item", "numpy", "cpu", "__float__", "__int__", "__bool__", "__index__")
"""What waits until a GPU has come to the tensor."""


@pytest.mark.parametrize("changes", [MEMORY, {"num_mem_tokens": 0}], ids=["memory", "without memory"])
def test_a_step_waits_once_for_the_device(make_policy, masked_batch, monkeypatch: pytest.MonkeyPatch, changes) -> None:
    """As far as this project's own lines go."""
    AcceleratorState._reset_state(reset_partial_state=True)
    learner = learner_of(make_policy(**changes))
    batches = [part_of(masked_batch(number), learner.accelerator) for number in range(4)]
    learner.learn(batches[:2], step=0, seed=0, window=MetricsWindow({}))
    on_the_host = {each.untyped_storage().data_ptr() for batch in batches for each in batch.origin}
    fetched = list[str]()

    def counted(name: str) -> Callable:
        fetch = getattr(torch.Tensor, name)

        def count(tensor: torch.Tensor, *arguments: object) -> object:
            caller = "".join(traceback.format_stack(limit=2)[:1])
            if tensor.untyped_storage().data_ptr() not in on_the_host and "site-packages" not in caller:
                fetched.append(caller)
            return fetch(tensor, *arguments)

        return count

    for name in FETCHES:
        monkeypatch.setattr(torch.Tensor, name, counted(name))
    learner.learn(batches[2:], step=1, seed=1, window=MetricsWindow({}))
    assert len(fetched) == 1, "\n".join(fetched)


@pytest.mark.parametrize("changes", [MEMORY, {"num_mem_tokens": 0}], ids=["memory", "without memory"])
def test_one_process_draws_in_the_forward_as_it_always_did(make_policy, masked_batch, changes) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    policy = make_policy(**changes).train()
    batch = part_of(masked_batch(0), Accelerator(cpu=True))
    carried = {} if policy.model.memory is None else {"memory": policy.model.memory.initial(CLIPS), "queries": QUERIES}
    with torch.no_grad():
        torch.manual_seed(7)
        _, drawn_by_itself = policy(dict(batch.inputs), **carried)
        torch.manual_seed(7)
        draws = policy.draw_training(ROWS, torch.device("cpu"))
        policy = make_policy(**changes).train()
        _, drawn_before = policy(dict(batch.inputs), **carried, **draws)
    assert torch.equal(drawn_before["loss"], drawn_by_itself["loss"])
    learnt = learner_of(make_policy(**changes)).learn([batch], step=0, seed=7, window=MetricsWindow({}))
    assert learnt["loss"] == drawn_by_itself["loss"].item()
