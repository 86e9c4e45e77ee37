"""Impossible settings are refused with key, rule and value."""

import pytest
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig

from lerobot_policy_smolvla_memory import SmolVLAMemoryConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_mem_tokens": -1}, "num_mem_tokens must be 0 (off) or more, got -1"),
        ({"mem_init": "ones"}, "mem_init must be one of normal, zeros, embedding, got 'ones'"),
        ({"mem_update": "sum"}, "mem_update must be one of overwrite, gated, got 'sum'"),
        ({"mem_weight": 0.0}, "mem_weight must be a number of tokens above 0, got 0.0"),
        ({"mem_growth": 0.9}, "mem_growth must be a factor of at least 1, got 0.9"),
        ({"mem_cache_size": 0}, "mem_cache_size must be at least 1, got 0"),
        ({"mem_backprop_depth": -2}, "mem_backprop_depth must be 0 or more queries, got -2"),
        ({"mem_at_end": False}, "num_mem_tokens=4 needs mem_at_start or mem_at_end to be true"),
        ({"mem_frames": -1}, "mem_frames must be 0 (off) or more past queries, got -1"),
        ({"mem_frame_tokens": 0}, "mem_frame_tokens must be at least 1, got 0"),
        ({"mem_frame_sampling": "all"}, "mem_frame_sampling must be one of even, recent, got 'all'"),
        ({"mem_frames": 8}, "mem_frames=8 needs mem_backprop_depth to be at least 1, got 0"),
        (
            {"num_mem_tokens": 0, "mem_frames": 8, "mem_at_end": False, "mem_backprop_depth": 1},
            "mem_frames=8 needs mem_at_start or mem_at_end to be true",
        ),
        ({"flow_draws": 0}, "flow_draws must be at least 1, got 0"),
        ({"sampling_temperature": 1.5}, "sampling_temperature must be in [0, 1], got 1.5"),
        ({"compile_model": True, "fast_forward": False}, "compile_model needs fast_forward=true, got false"),
        (
            {"gradient_checkpointing": True, "compile_model": True},
            "gradient_checkpointing needs fast_forward=true and compile_model=false, got True and True",
        ),
        (
            {"gradient_checkpointing": True, "fast_forward": False},
            "gradient_checkpointing needs fast_forward=true and compile_model=false, got False and False",
        ),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError) as error:
        SmolVLAMemoryConfig(device="cpu", **settings)
    assert message in str(error.value)


def test_without_tokens_the_layout_does_not_matter():
    SmolVLAMemoryConfig(device="cpu", num_mem_tokens=0, mem_at_end=False, compile_model=True)


def test_a_plain_configuration_is_taken_over_whole():
    plain = SmolVLAConfig(device="cpu", chunk_size=20, n_action_steps=5, vlm_model_name="elsewhere")
    config = SmolVLAMemoryConfig.from_smolvla(plain, num_mem_tokens=8, n_action_steps=4)
    assert (config.num_mem_tokens, config.n_action_steps) == (8, 4)
    same = set(SmolVLAConfig.__dataclass_fields__) - {"n_action_steps"}
    assert all(getattr(config, name) == getattr(plain, name) for name in same)
