"""What preflight says that training takes in memory, held against what is measured of a stage's own steps."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
from saved_tensors import SavedTensors
from stages import run
from torch import Tensor
from torch.utils._pytree import tree_leaves

from kuavo_train.config import RunConfig
from kuavo_train.data.images.plan import size_text
from kuavo_train.stage.description import describe
from kuavo_train.stage.preflight import examine_stage
from kuavo_train.training.learner import Learner

Configs = Callable[..., list[RunConfig]]
FINETUNE = ("expert_only", "lora", "end_to_end")
STEPS = {"max_steps": 1, "batch_size": 8, "ema": 0.9}


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Bytes of what the last training step of this process held, under preflight's names."""
    learn, found = Learner.learn, {}

    def learn_and_measure(learner: Learner, *batches: Any, **how: Any) -> dict[str, float]:
        policy, backward = learner.bare_policy, learner.accelerator.backward
        saved = SavedTensors(policy)

        def measure_and_go_back(loss: Tensor) -> None:
            found["activations"] = saved.bytes
            backward(loss)
            found["gradients"] = sum(each.grad.nbytes for each in policy.parameters() if each.grad is not None)

        monkeypatch.setattr(learner.accelerator, "backward", measure_and_go_back)
        with saved.counted():
            values = learn(learner, *batches, **how)
        found["weights"] = sum(each.nbytes for each in policy.parameters())
        found["optimizer"] = _bytes_of(learner.optimizer.state_dict()["state"])
        found["average"] = _bytes_of(learner.average.state_dict()["averages"])
        return values

    monkeypatch.setattr(Learner, "learn", learn_and_measure)
    return found


def _bytes_of(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


@pytest.mark.parametrize(("finetune", "checkpoints"), itertools.product(FINETUNE, (False, True)))
def test_a_stage_takes_what_preflight_says(
    small_configs: Configs, measured: dict[str, int], finetune: str, checkpoints: bool
) -> None:
    words = ("learn=[moving_grasp]", f"finetune={finetune}", "allow_random_frozen_vlm=true")
    configs = small_configs(*words, training=STEPS, policy={"gradient_checkpointing": checkpoints})
    findings = examine_stage(configs[0], [config.stage for config in configs])
    assert findings.problems == []
    assert run(configs) == 0
    said = findings.facts["memory_bytes"]
    assert {name: said[name] for name in measured} == pytest.approx(measured, rel=0.1)
    step = findings.facts["step"]
    assert step["fixed"] + 8 * step["per_sample"] == said["activations"]
    assert f"  activations: 8 samples × {size_text(step['per_sample'])} + " in describe(findings)


def test_the_optimizer_that_holds_less_is_said_to(small_configs: Configs, measured: dict[str, int]) -> None:
    configs = small_configs("learn=[moving_grasp]", training={**STEPS, "optimizer": "muon"})
    findings = examine_stage(configs[0], [config.stage for config in configs])
    assert run(configs) == 0
    said = findings.facts["memory_bytes"]
    assert said["optimizer"] == pytest.approx(measured["optimizer"], rel=0.1)
    assert said["optimizer"] < 1.9 * said["gradients"]
