"""The precisions that SmolVLA is run in."""

import torch
from policy_variants import LAYOUTS, every_layout

from lerobot_policy_smolvla_memory import SmolVLAMemoryPolicy


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
def test_a_vlm_in_bfloat16_as_the_hub_has_it(make_config, make_batch, make_noise, hub, layout):
    torch.manual_seed(0)
    policy = SmolVLAMemoryPolicy(make_config(**hub, train_expert_only=True, **LAYOUTS[layout]))
    assert policy.model.vlm_with_expert.vlm.dtype == torch.bfloat16
    loss, output = policy(make_batch(4), **make_noise(4), queries=2)
    loss.backward()
    assert policy.model.memory.update.gate.weight.grad.any()
    policy.select_action(make_batch(2))
    assert output["memory"].tokens.dtype == policy.get_memory().tokens.dtype == torch.float32
