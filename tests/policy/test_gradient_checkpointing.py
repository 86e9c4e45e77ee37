"""With gradient checkpointing a step keeps less until its backward pass, and comes to the same numbers."""

import pytest
import torch
from policy_variants import FREEZING, LAYOUTS, learn
from saved_tensors import SavedTensors

MEMORIES = {
    "none": {"num_mem_tokens": 0},
    **LAYOUTS,
    "awaiting the backbone": {**LAYOUTS["both"], "mem_reads_context": False},
}
LEARN = ["nothing frozen", "vision frozen", "VLM frozen"]
PRECISIONS = {"float32": False, "bfloat16": True}
CASES = [  # freezing, memory, precision
    *(("nothing frozen", memory, precision) for memory in MEMORIES for precision in PRECISIONS),
    ("vision frozen", "end", "bfloat16"),
    ("VLM frozen", "start", "bfloat16"),
]
DRAWS = 2


@pytest.fixture
def make_twins(make_policy):
    """The same policy without and with checkpointing."""

    def make(**changes):
        twins = [
            make_policy(gradient_checkpointing=checkpoints, flow_draws=DRAWS, **changes).train()
            for checkpoints in (False, True)
        ]
        twins[1].load_state_dict(twins[0].state_dict())
        return twins

    return make


@pytest.fixture
def batch(make_batch):
    """Two clips of two queries, one of which begins anew and one of which is padding."""
    rows = make_batch(4)
    rows["observation.memory_reset"] = torch.tensor([True, False, True, True])
    rows["query_is_pad"] = torch.tensor([False, True, False, False])
    return rows


@pytest.mark.parametrize(("freezing", "memory", "precision"), CASES)
def test_loss_memory_and_gradients_are_the_same(make_twins, batch, make_noise, freezing, memory, precision):
    kept, recomputed = make_twins(**FREEZING[freezing], **MEMORIES[memory])
    found = []
    for policy in (kept, recomputed):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=PRECISIONS[precision]):
            found.append(learn(policy, batch, make_noise(DRAWS * 4)))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("freezing", LEARN)
def test_less_is_kept_until_the_backward_pass(make_twins, batch, make_noise, freezing):
    sizes = []
    for policy in make_twins(**FREEZING[freezing]):
        saved = SavedTensors(policy)
        with saved.counted():
            loss, _ = policy(dict(batch), **make_noise(DRAWS * 4), queries=2)
        sizes.append(saved.bytes)
        loss.backward()
    assert sizes[1] < 0.75 * sizes[0]


def test_the_vision_encoder_too_is_computed_again(make_twins, batch, make_noise):
    for policy, times in zip(make_twins(), (1, 2), strict=True):
        seen = []
        layer = policy.model.vlm_with_expert.get_vlm_model().vision_model.encoder.layers[0]
        layer.self_attn.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        policy(dict(batch), **make_noise(DRAWS * 4), queries=2)[0].backward()
        assert len(seen) == times * 2  # of two cameras
