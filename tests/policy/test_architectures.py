"""The variants of SmolVLA, and the precisions it is run in."""

import pytest
import torch
from test_layouts import LAYOUTS, every_layout

from lerobot_policy_smolvla_memory import SmolVLAMemoryPolicy


@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"attention_mode": "self_attn"},
        {"num_expert_layers": 2, "self_attn_every_n_layers": 4},
        {"add_image_special_tokens": True},
        {"prefix_length": 24},
        {"num_vlm_layers": 2, "self_attn_every_n_layers": -1},
    ],
    ids=lambda variant: " ".join(variant) or "standard",
)
def test_prefix_and_actions_in_two_passes_are_lerobots_single_pass(make_policy, make_batch, make_noise, variant):
    """With memory a loss comes from `encode` and `velocity`; without, from LeRobot's forward. Same numbers."""
    policy, batch = make_policy(num_mem_tokens=0, **variant), make_batch(3)
    noise, time = make_noise(3).values()
    actions = policy.prepare_action(batch)
    expected = policy.model.forward(*policy._observation(batch), actions, noise, time)
    prefix, _ = policy.model.encode(policy.model.embed(*policy._observation(batch)))
    t = time[:, None, None]
    velocity = policy.model.velocity(prefix, t * noise + (1 - t) * actions, time)
    torch.testing.assert_close((noise - actions - velocity).square(), expected, rtol=1e-4, atol=1e-5)


@every_layout
def test_mixed_precision_trains_and_keeps_the_memory_in_float32(make_policy, make_batch, make_noise, layout):
    policy = make_policy(**LAYOUTS[layout])
    exact, _ = policy(make_batch(4), **make_noise(4), queries=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, output = policy(make_batch(4), **make_noise(4), queries=2)
        actions, sampled = policy.sample_actions_with(make_batch(4))
    loss.backward()
    torch.testing.assert_close(loss, exact, rtol=0.05, atol=0)
    assert policy.model.memory.update.gate.weight.grad.any()
    assert output["memory"].tokens.dtype == sampled.tokens.dtype == torch.float32
    assert actions.isfinite().all()


@every_layout
def test_a_vlm_in_bfloat16_as_lerobot_loads_it(make_config, make_batch, make_noise, layout):
    torch.manual_seed(0)
    policy = SmolVLAMemoryPolicy(make_config(load_vlm_weights=True, train_expert_only=True, **LAYOUTS[layout]))
    assert policy.model.vlm_with_expert.vlm.dtype == torch.bfloat16
    loss, output = policy(make_batch(4), **make_noise(4), queries=2)
    loss.backward()
    assert policy.model.memory.update.gate.weight.grad.any()
    policy.select_action(make_batch(2))
    assert output["memory"].tokens.dtype == policy.get_memory().tokens.dtype == torch.float32
