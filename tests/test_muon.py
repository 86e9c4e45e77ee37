"""Muon steps matrices between hidden states orthogonally, and the rest as AdamW does."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from kuavo_train.config import TrainingConfig
from kuavo_train.errors import ConfigError
from kuavo_train.training.muon import MOMENTUM, RMS, Muon, between_hidden_states, orthogonalized
from kuavo_train.training.optimizer import build_optimizer

ADAMW = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}


def some_parameters(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    return parameters


@pytest.mark.parametrize("shape", [(64, 64), (64, 192), (192, 64)])
def test_what_is_orthogonalized_moves_as_far_in_all_directions(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    matrix = u @ torch.diag(torch.logspace(-1, 1, min(shape))) @ v
    step = orthogonalized(matrix)
    values = torch.linalg.svdvals(step)
    assert step.shape == shape
    assert values.min() > 0.6
    assert values.max() < 1.3
    assert torch.nn.functional.cosine_similarity(step.flatten(), (u @ v).flatten(), dim=0) > 0.97


def test_a_matrix_between_hidden_states_takes_steps_as_large_as_adamws() -> None:
    (matrix,) = some_parameters((96, 192))
    before = matrix.detach().clone()
    Muon([matrix], **ADAMW | {"weight_decay": 0.0}).step()
    assert (matrix.detach() - before).square().mean().sqrt() == pytest.approx(ADAMW["lr"] * RMS, rel=0.2)


def test_momentum_and_decay_are_those_of_its_definition() -> None:
    (matrix,) = some_parameters((64, 64))
    optimizer, expected = Muon([matrix], **ADAMW), matrix.detach().clone()
    momentum = torch.zeros_like(expected)
    for _ in range(3):
        gradient = torch.randn_like(expected)
        matrix.grad = gradient.clone()
        optimizer.step()
        momentum = MOMENTUM * momentum + (1 - MOMENTUM) * gradient
        step = orthogonalized((1 - MOMENTUM) * gradient + MOMENTUM * momentum)
        expected = expected * (1 - ADAMW["lr"] * 0.1) - ADAMW["lr"] * RMS * 8 * step
    torch.testing.assert_close(matrix.detach(), expected)


def test_all_else_is_stepped_by_adamw_to_the_bit() -> None:
    shapes = [(32, 96), (96, 32), (96,), (1024, 96), (8, 3, 4, 4)]
    mine, theirs = some_parameters(*shapes) + some_parameters((96, 96)), some_parameters(*shapes)
    for optimizer in (Muon(mine, **ADAMW), torch.optim.AdamW(theirs, fused=True, **ADAMW)):
        optimizer.step()
        optimizer.step()
    assert not any(between_hidden_states(each) for each in theirs)
    for ours, other in zip(mine, theirs, strict=False):
        torch.testing.assert_close(ours, other, rtol=0, atol=0)


def test_its_state_survives_a_checkpoint_and_the_schedule_reaches_both_parts() -> None:
    run, again = some_parameters((96, 96), (96,)), some_parameters((96, 96), (96,))
    first, second = Muon(run, **ADAMW), Muon(again, **ADAMW)
    first.step()
    for parameter, other in zip(run, again, strict=True):
        other.data.copy_(parameter.data)
    second.load_state_dict(deepcopy(first.state_dict()))
    for optimizer in (first, second):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3
        optimizer.step()
    for parameter, other in zip(run, again, strict=True):
        torch.testing.assert_close(parameter, other, rtol=0, atol=0)
    before = run[1].detach().clone()
    for group in first.param_groups:
        group["lr"] = 0.0
    first.step()
    torch.testing.assert_close(run[1].detach(), before, rtol=0, atol=0)


def test_the_setting_chooses_it_and_another_name_is_refused() -> None:
    settings = {"epochs": 1, "lr": 1e-3, "warmup_steps": 1, "decay_steps": 10}
    parameters = some_parameters((96, 96), (96,))
    assert isinstance(build_optimizer(parameters, TrainingConfig(**settings, optimizer="muon"), steps=10)[0], Muon)
    assert isinstance(build_optimizer(parameters, TrainingConfig(**settings), steps=10)[0], torch.optim.AdamW)
    with pytest.raises(ConfigError, match=r"training\.optimizer must be one of adamw, muon, got .sgd."):
        TrainingConfig(**settings, optimizer="sgd")
