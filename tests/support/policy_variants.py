"""The policy's layouts and what of it is frozen, and a step of learning to compare between them."""

import pytest

LAYOUTS = {
    "start": {"mem_at_start": True, "mem_at_end": False},
    "both": {"mem_at_start": True, "mem_at_end": True},
    "end": {"mem_at_start": False, "mem_at_end": True},
}
FREEZING = {
    "nothing frozen": {"freeze_vision_encoder": False, "train_expert_only": False},
    "vision frozen": {"freeze_vision_encoder": True, "train_expert_only": False},
    "VLM frozen": {"freeze_vision_encoder": True, "train_expert_only": True},
    "VLM and state frozen": {"freeze_vision_encoder": True, "train_expert_only": True, "train_state_proj": False},
}
every_layout = pytest.mark.parametrize("layout", LAYOUTS)
both_forwards = pytest.mark.parametrize("fast_forward", [True, False], ids=["fast", "lerobot"])


def learn(policy, batch, draws):
    """Losses, memory and gradients of a step."""
    queries = 1 if policy.model.memory is None else 2
    loss, output = policy(dict(batch), **draws, reduction="none", queries=queries)
    loss.sum().backward()
    memory = output["memory"]
    gradients = {name: parameter.grad for name, parameter in policy.named_parameters() if parameter.requires_grad}
    return loss.detach(), memory and memory.tokens, gradients
