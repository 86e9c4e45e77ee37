"""A training step that is followed without values holds what a real one does, however the policy is made."""

import multiprocessing
from contextlib import nullcontext

import pytest
import torch
from policy_variants import FREEZING, LAYOUTS
from saved_tensors import SavedTensors

from kuavo_train.training.step_memory import step_memory
from lerobot_policy_smolvla_memory.configuration_smolvla_memory import image_features_key

FRAMES = {"mem_frames": 2, "mem_backprop_depth": 2}
VARIANTS = {
    "no memory": {"num_mem_tokens": 0},
    "memory at the start": LAYOUTS["start"],
    "memory at both ends, awaiting the backbone": {**LAYOUTS["both"], "mem_reads_context": False},
    "memory with a cache and no loss of its own": {"read_mem_from_cache": True, "mem_action_loss": 0.0},
    "frames": {**FRAMES, "num_mem_tokens": 0},
    "frames and tokens, checkpointed": {**FRAMES, "gradient_checkpointing": True},
    "draws": {"flow_draws": 3, "rtc_training_delay": 2},
    "VLM frozen": FREEZING["VLM frozen"],
    "an empty camera and brackets": {"empty_cameras": 1, "add_image_special_tokens": True},
    "compiled": {"compile_model": True},
}
ROWS, K = 8, 2


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_holds_what_a_real_step_does(make_policy, make_batch, variant):
    policy, batch = make_policy(**VARIANTS[variant]), make_batch(ROWS)
    if variant == "VLM frozen":
        for camera in list(policy.config.image_features):
            batch[image_features_key(camera)] = policy.embed_camera(batch.pop(camera)).detach()
    buffers, state = {name: value.clone() for name, value in policy.named_buffers()}, torch.get_rng_state()
    sample = {name: value[:1] for name, value in batch.items()}
    step = step_memory(policy.eval(), sample, samples=ROWS, queries=K, autocast=nullcontext)
    assert torch.equal(torch.get_rng_state(), state)
    assert not policy.training
    for name, value in policy.named_buffers():
        assert torch.equal(value, buffers[name]), name
    assert all(parameter.grad is None for parameter in policy.parameters())
    saved = SavedTensors(policy.train())
    with saved.counted(), torch.compiler.set_stance("force_eager"):
        loss, _ = policy(batch, queries=K)
    assert loss.requires_grad
    assert step.held == pytest.approx(saved.bytes, rel=0.1)


def test_a_process_that_has_followed_a_step_may_fork_others_that_learn(make_policy, make_batch):
    policy, batch = make_policy(), make_batch(K)
    step_memory(policy, {name: value[:1] for name, value in batch.items()}, samples=K, queries=K, autocast=nullcontext)
    learner = multiprocessing.get_context("fork").Process(target=lambda: policy(batch, queries=K)[0].backward())
    learner.start()
    learner.join(timeout=60)
    assert learner.exitcode == 0
