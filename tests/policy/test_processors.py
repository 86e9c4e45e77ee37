"""What the trainer puts into a batch arrives at the policy."""

import pytest
import torch
from lerobot.policies.factory import make_pre_post_processors
from tiny_sizes import ACTION_DIM, CAMERAS, CHUNK, STATE_DIM

OWN_KEYS = {
    "action_is_pad": torch.tensor([[False] * CHUNK, [True] * CHUNK]),
    "action_dim_is_pad": torch.tensor([[False, False, True, True], [False] * 4]),
    "query_is_pad": torch.tensor([False, True]),
    "observation.memory_reset": torch.tensor([True, False]),
}


def statistics():
    return {
        "observation.state": {"mean": torch.ones(STATE_DIM), "std": torch.full((STATE_DIM,), 2.0)},
        "action": {"mean": torch.ones(ACTION_DIM), "std": torch.full((ACTION_DIM,), 4.0)},
    }


@pytest.fixture(params=["made", "reopened"])
def processors(request, make_config, tmp_path):
    """As the factory makes them, and as they are opened from a checkpoint."""
    config = make_config()
    made = make_pre_post_processors(config, dataset_stats=statistics())
    if request.param == "made":
        return made
    for pipeline in made:
        pipeline.save_pretrained(tmp_path)
    return make_pre_post_processors(config, pretrained_path=str(tmp_path))


def test_every_key_of_the_policy_survives(processors):
    batch = {
        **{camera: torch.rand(2, 3, 32, 32) for camera in CAMERAS},
        "observation.state": torch.full((2, STATE_DIM), 5.0),
        "action": torch.full((2, CHUNK, ACTION_DIM), 5.0),
        "task": ["put the red block", "into the box"],
        **OWN_KEYS,
    }
    ready = processors[0](batch)
    for key, value in OWN_KEYS.items():
        assert torch.equal(ready[key], value), key
        assert ready[key].dtype == torch.bool
    assert torch.equal(ready["observation.state"], torch.full((2, STATE_DIM), 2.0))
    assert torch.equal(ready["action"], torch.full((2, CHUNK, ACTION_DIM), 1.0))


def test_a_whole_step_from_a_raw_batch(processors, make_policy):
    before, after = processors
    policy = make_policy()
    batch = {
        **{camera: torch.rand(2, 3, 32, 32) for camera in CAMERAS},
        "observation.state": torch.zeros(2, STATE_DIM),
        "task": ["put the red block", "into the box"],
        "action_dim_is_pad": OWN_KEYS["action_dim_is_pad"],
    }
    actions = after(policy.select_action(before(batch)))
    assert actions.shape == (2, ACTION_DIM)
    # 0 in the normalized space is the mean in robot units: a wrapper must leave these dimensions out.
    assert torch.equal(actions[0, 2:], torch.ones(2))
