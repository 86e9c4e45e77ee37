"""Action dimensions a task does not have: neither input, nor target, nor output."""

import pytest
import torch
from tiny_sizes import ACTION_DIM, CHUNK

with_and_without_memory = pytest.mark.parametrize("tokens", [0, 2])
ABSENT = torch.tensor([[False, False, False, False], [False, True, False, True]])


@with_and_without_memory
def test_they_carry_no_gradient_and_what_stands_there_does_not_matter(make_policy, make_batch, make_noise, tokens):
    losses = []
    for value in (0.0, 5.0, float("nan")):
        policy, noise = make_policy(num_mem_tokens=tokens), make_noise(2)
        batch = {**make_batch(2), "action_dim_is_pad": ABSENT}
        batch["action"] = batch["action"].masked_fill(ABSENT[:, None], value).requires_grad_()
        noise["noise"].requires_grad_()
        losses.append(policy(batch, **noise, reduction="none")[0])
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(losses[0], losses[2])
    gradients = torch.autograd.grad(losses[2].sum(), [batch["action"], noise["noise"]])
    for gradient in gradients:
        touched = gradient[:, :, :ACTION_DIM].abs().sum(1) > 0
        assert torch.equal(touched, ~ABSENT)


@with_and_without_memory
def test_the_loss_is_the_mean_over_the_dimensions_there_are(make_policy, make_batch, make_noise, tokens):
    policy, noise = make_policy(num_mem_tokens=tokens).eval(), make_noise(2)
    with torch.no_grad():  # so that the loss of an entry is known: the model answers 0
        policy.model.action_out_proj.weight.zero_()
        policy.model.action_out_proj.bias.zero_()
    batch = {**make_batch(2), "action_dim_is_pad": ABSENT}
    batch["action_is_pad"] = torch.arange(CHUNK) >= torch.tensor([[CHUNK], [2]])
    errors = (noise["noise"][:, :, :ACTION_DIM] - batch["action"]).square()
    rows = torch.stack([errors[0].mean(), errors[1][:2][:, [0, 2]].mean()])
    valid = torch.cat([errors[0].flatten(), errors[1][:2][:, [0, 2]].flatten()])
    torch.testing.assert_close(policy(dict(batch), **noise, reduction="none")[0], rows)
    torch.testing.assert_close(policy(dict(batch), **noise)[0], valid.mean())


@with_and_without_memory
def test_they_come_out_as_zero_and_do_not_steer_the_others(make_policy, make_batch, tokens):
    policy, actions = make_policy(num_mem_tokens=tokens).eval(), []
    for value in (0.0, 5.0):
        noise = torch.randn(2, CHUNK, 8, generator=torch.Generator().manual_seed(3))
        noise[:, :, :ACTION_DIM] = noise[:, :, :ACTION_DIM].masked_fill(ABSENT[:, None], value)
        batch = {**make_batch(2), "action_dim_is_pad": ABSENT}
        actions.append(policy.sample_actions_with(batch, None, noise)[0])
    assert torch.equal(*actions)
    assert not actions[0][1][:, [1, 3]].any()
    assert actions[0][0].all()
    assert actions[0][1][:, [0, 2]].all()


def test_no_absent_dimension_changes_nothing(make_policy, make_batch, make_noise):
    policy = make_policy()
    plain, _ = policy(make_batch(2), **make_noise(2))
    masked, _ = policy({**make_batch(2), "action_dim_is_pad": torch.zeros(2, 4).bool()}, **make_noise(2))
    torch.testing.assert_close(plain, masked)
