"""With 0 memory tokens and LeRobot's forward the policy is LeRobot's SmolVLA: not alike, equal.

The fast forward gives the same up to rounding: see test_fast_forward.py.
"""

import pytest
import torch
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from tiny_sizes import CHUNK


@pytest.fixture
def twins(make_config, make_policy):
    """Ours without memory and LeRobot's, with the same weights."""
    ours = make_policy(num_mem_tokens=0, fast_forward=False)
    config = make_config(num_mem_tokens=0)
    names = SmolVLAConfig.__dataclass_fields__
    theirs = SmolVLAPolicy(SmolVLAConfig(**{name: getattr(config, name) for name in names}))
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def test_the_weights_have_the_same_names(twins):
    ours, theirs = twins
    assert list(ours.state_dict()) == list(theirs.state_dict())


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_loss_and_gradients_are_equal(twins, make_batch, make_noise, reduction, padded):
    ours, theirs = twins
    batch = make_batch(3)
    if padded:
        batch["action_is_pad"] = torch.arange(CHUNK) >= torch.tensor([[6], [4], [1]])
    losses = [policy(dict(batch), **make_noise(3), reduction=reduction)[0] for policy in (ours, theirs)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.sum().backward()
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (mine.grad is None) == (other.grad is None), name
        assert mine.grad is None or torch.equal(mine.grad, other.grad), name


def test_noise_and_time_are_drawn_in_the_same_order(twins, make_batch):
    losses = []
    for policy in twins:
        torch.manual_seed(7)
        losses.append(policy(make_batch(2))[0])
    assert torch.equal(*losses)


def test_sampled_actions_are_equal(twins, make_batch):
    chosen = []
    for policy in twins:
        torch.manual_seed(7)
        chosen.append([policy.select_action(make_batch(2, seed=step)) for step in range(5)])
    for mine, other in zip(*chosen, strict=True):
        assert torch.equal(mine, other)
