"""A moving average of the weights: handed on in their place, and never seen by training."""

import contextlib
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import interrupted_in_step
from safetensors.torch import load_file
from stages import run
from torch import nn

from kuavo_train.config import RunConfig
from kuavo_train.errors import ConfigError
from kuavo_train.runs.run_folder import stage_folder
from kuavo_train.training.ema import NoAverage, average_of, check_average

Configs = Callable[..., list[RunConfig]]


def test_the_average_warms_up_and_is_the_one_worked_out_by_hand() -> None:
    layer = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(layer.weight)
    average = average_of(layer, 0.15)
    for value in (1.0, 2.0):
        nn.init.constant_(layer.weight, value)
        average.update()
    first = 0.9  # decay 1/10: 0.1 · 0 + 0.9 · 1
    with average.applied():
        assert layer.weight.item() == pytest.approx(0.15 * first + 0.85 * 2)  # 2/11 would be more than 0.15
    assert layer.weight.item() == 2.0


def test_it_touches_neither_the_random_state_nor_the_weights_and_gives_its_own_only_while_applied() -> None:
    layer, random = nn.Linear(3, 2), torch.get_rng_state()
    before = layer.weight.clone()
    average = average_of(layer, 0.9)
    with torch.no_grad():
        layer.weight += 1
    trained = layer.weight.clone()
    average.update()
    state = average.state_dict()
    with contextlib.suppress(KeyError), average.applied():
        assert not torch.equal(layer.weight, trained)
        assert torch.equal(state["trained"]["weight"], trained)  # what was asked for before does not change
        raise KeyError
    assert torch.equal(layer.weight, trained)
    assert torch.allclose(state["averages"]["weight"], before + 0.9)
    assert torch.equal(torch.get_rng_state(), random)
    average.keep()
    assert torch.equal(layer.weight, state["averages"]["weight"])


def test_the_state_of_another_setting_is_refused() -> None:
    layer = nn.Linear(1, 1)
    with pytest.raises(ConfigError, match=r"training\.ema must be as when the stage began, a number, got null"):
        NoAverage().load_state_dict(average_of(layer, 0.5).state_dict())
    with pytest.raises(ConfigError, match=r"training\.ema must be as when the stage began, got 0\.5"):
        average_of(layer, 0.5).load_state_dict({})


def test_running_statistics_beside_averaged_weights_are_refused() -> None:
    policy = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1))
    check_average(policy, None)
    with pytest.raises(
        ConfigError, match=r"training\.ema must be null for a policy with batch normalization, got 0\.9"
    ):
        check_average(policy, 0.9)


def stored(config: RunConfig) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    checkpoint = stage_folder(config).checkpoints.at("last")
    return load_file(checkpoint.pretrained_model / "model.safetensors"), checkpoint.training_state()


@pytest.mark.parametrize("lora", ["null", pytest.param("{rank: 2}", marks=pytest.mark.slow)], ids=["whole", "adapters"])
def test_training_goes_on_as_without_and_an_interrupted_stage_resumes_to_the_same_bits(
    small_configs: Configs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: str
) -> None:
    """Validated, saved and handed on is the average; what was trained is beside it."""
    ways = ("learn=[moving_grasp]", "validation.result=last", f"training.lora={lora}")
    plain = small_configs(*ways)
    averaged = small_configs(*ways, run="averaged", training={"ema": 0.5})
    cut = [replace(config, outputs=str(tmp_path / "cut")) for config in averaged]
    for configs in (plain, averaged):
        assert run(configs) == 0
    with interrupted_in_step(3):
        assert run(cut) == 128 + signal.SIGTERM
    assert run(cut, resume=True) == 0
    (_, as_without), (weights, state), (resumed, resumed_state) = (
        stored(configs[0]) for configs in (plain, averaged, cut)
    )
    assert all(torch.equal(value, resumed[name]) for name, value in weights.items())
    average, other = (each["average"] for each in (state, resumed_state))
    for kind in ("averages", "trained"):
        assert all(torch.equal(value, other[kind][name]) for name, value in average[kind].items())
    losses = [[record["loss"] for record in stage_folder(c[0]).metrics.read()] for c in (plain, averaged)]
    assert losses[0] == losses[1]
    assert as_without["average"] == {}
    for moments in ("exp_avg", "exp_avg_sq"):
        pairs = zip(as_without["optimizer"]["state"].values(), state["optimizer"]["state"].values(), strict=True)
        assert all(torch.equal(one[moments], another[moments]) for one, another in pairs)
    if lora == "null":
        assert all(torch.equal(weights[name], value) for name, value in average["averages"].items())
        assert not all(torch.equal(weights[name], value) for name, value in average["trained"].items())
    validated = [stage_folder(c[0]).validations.read() for c in (plain, averaged)]
    assert validated[0][-1]["loss"] != validated[1][-1]["loss"]
    epochs = [record["loss"] for record in validated[1] if record["kind"] == "epoch"]
    assert validated[1][-1]["loss"] == pytest.approx(epochs[-1], rel=1e-4)  # adapters are merged by then
    card = (stage_folder(averaged[0]).checkpoints.at("best").pretrained_model / "README.md").read_text()
    assert "their moving average of decay 0.5" in card
