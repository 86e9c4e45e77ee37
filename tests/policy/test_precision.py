"""What learns is float32, whatever the vision-language model was stored in; loading rounds nothing."""

import warnings

import pytest
import torch
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from policy_variants import FREEZING, learn
from safetensors.torch import load_file, save_file

from lerobot_policy_smolvla_memory import SmolVLAMemoryPolicy
from lerobot_policy_smolvla_memory.precision import StoredNarrower, make_room, stored_dtypes

VLM = ("vision", "connector", "vlm_text")
FROZEN = FREEZING["VLM frozen"]


@pytest.fixture
def base(make_config, hub, tmp_path):
    """LeRobot's own SmolVLA on it, as LeRobot saves it: the most of its expert in bfloat16."""
    config = make_config(**hub)
    torch.manual_seed(3)
    plain = SmolVLAPolicy(SmolVLAConfig(**{name: getattr(config, name) for name in SmolVLAConfig.__dataclass_fields__}))
    plain.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def dtypes(policy):
    """Group → the types of its parameters."""
    parameters = dict(policy.named_parameters())
    found = {group: {parameters[name].dtype for name in names} for group, names in policy.parameter_groups().items()}
    return {group: next(iter(types)) if len(types) == 1 else types for group, types in found.items()}


def in_vlm(policy):
    found = dtypes(policy)
    assert {found[group] for group in found if group not in VLM} == {torch.float32}
    return [found[group] for group in VLM]


HALF, FULL = torch.bfloat16, torch.float32
HELD = {
    "nothing frozen": [FULL, FULL, FULL],
    "vision frozen": [HALF, FULL, FULL],
    "VLM frozen": [HALF, HALF, HALF],
}


@pytest.mark.parametrize("frozen", HELD)
@pytest.mark.parametrize("source", ["vlm", "base"])
def test_what_learns_is_float32_and_what_is_frozen_stays_as_it_was_stored(make_config, hub, base, frozen, source):
    config = make_config(**hub, **FREEZING[frozen])
    policy = (
        SmolVLAMemoryPolicy(config) if source == "vlm" else SmolVLAMemoryPolicy.from_pretrained(base, config=config)
    )
    assert in_vlm(policy) == HELD[frozen]


def test_a_vlm_without_weights_is_float32_where_it_learns(make_config, hub):
    assert in_vlm(SmolVLAMemoryPolicy(make_config(**hub | {"load_vlm_weights": False}))) == [FULL] * 3


def test_parts_that_are_frozen_later_go_back_to_what_they_were_stored_in(make_config, hub):
    policy = SmolVLAMemoryPolicy(make_config(**hub))
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    policy.model.vlm_with_expert.vlm.requires_grad_(False)
    policy.model.vlm_with_expert.lm_expert.requires_grad_(False)
    policy.settle_precision()
    assert in_vlm(policy) == [HALF] * 3
    assert all(torch.equal(value.float(), before[name].float()) for name, value in policy.state_dict().items())


def test_a_base_in_bfloat16_is_taken_over_exactly_and_said(make_config, hub, base):
    with pytest.warns(StoredNarrower, match=r"^expert of .*base/model.safetensors were stored in less than float32"):
        policy = SmolVLAMemoryPolicy.from_pretrained(base, config=make_config(**hub, **FROZEN))
    stored, held = load_file(base / "model.safetensors"), policy.state_dict()
    assert sum(value.dtype == HALF for name, value in stored.items() if "lm_expert" in name) == 33
    assert all(torch.equal(held[name].float(), value.float()) for name, value in stored.items())


def test_a_checkpoint_holds_float32_and_opens_to_the_same_without_the_vlm_it_began_with(
    make_config, make_batch, hub, tmp_path
):
    policy = SmolVLAMemoryPolicy(make_config(**hub, **FROZEN)).eval()
    with torch.no_grad():
        for parameter in policy.model.vlm_with_expert.lm_expert.parameters():
            parameter.mul_(1 + 1e-4)  # a step that bfloat16 would not see
    policy.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", StoredNarrower)
        again = SmolVLAMemoryPolicy.from_pretrained(tmp_path)
    assert dtypes(again) == dtypes(policy)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in policy.state_dict().items())
    noise = torch.randn(2, 6, 8)
    assert torch.equal(*(each.predict_action_chunk(make_batch(2), noise) for each in (policy, again)))


@pytest.mark.parametrize("frozen", HELD)
def test_a_vlm_stored_in_float32_is_not_rounded(make_config, tiny_vlm, frozen):
    """LeRobot loads every vision-language model in bfloat16."""
    policy = SmolVLAMemoryPolicy(make_config(load_vlm_weights=True, **FREEZING[frozen]))
    assert in_vlm(policy) == [FULL] * 3
    held = policy.model.vlm_with_expert.vlm.state_dict()
    assert all(torch.equal(held[name], value) for name, value in load_file(tiny_vlm / "model.safetensors").items())


def test_float32_weights_are_not_rounded_into_a_policy_made_for_bfloat16(make_config, hub, base):
    config, file = make_config(**hub, **FROZEN), base / "model.safetensors"
    torch.manual_seed(4)
    save_file({name: torch.randn_like(value.float()) for name, value in load_file(file).items()}, file)
    policy = SmolVLAMemoryPolicy.from_pretrained(base, config=config)
    assert in_vlm(policy) == [FULL] * 3
    assert all(torch.equal(policy.state_dict()[name], value) for name, value in load_file(file).items())


def test_tied_embeddings_stay_tied(make_config, hub, tmp_path):
    policy = SmolVLAMemoryPolicy(make_config(**hub, **FROZEN))

    def tie(policy):
        vlm = policy.model.vlm_with_expert.vlm
        vlm.lm_head.weight = vlm.model.text_model.embed_tokens.weight
        return vlm

    tie(policy)
    policy.save_pretrained(tmp_path)
    for tied in (policy, SmolVLAMemoryPolicy(make_config(**hub | {"load_vlm_weights": False}))):
        vlm = tie(tied)
        SmolVLAMemoryPolicy._load_as_safetensor(tied, str(tmp_path / "model.safetensors"), "cpu", True)
        assert vlm.lm_head.weight is vlm.model.text_model.embed_tokens.weight
        assert vlm.lm_head.weight.dtype == vlm.model.text_model.layers[0].self_attn.q_proj.weight.dtype


@pytest.mark.parametrize("tokens", [0, 2])
@pytest.mark.parametrize("frozen", FREEZING)
def test_the_fast_forward_is_lerobots_but_for_the_rounding_of_the_frozen_part(
    make_policy, make_batch, make_noise, hub, frozen, tokens
):
    """With the same noise: the loss, and the gradient of all that learns, in direction and size."""
    fast, plain = (
        make_policy(fast_forward=fast_forward, num_mem_tokens=tokens, **hub, **FREEZING[frozen])
        for fast_forward in (True, False)
    )
    (loss, _, gradients), (expected, _, other) = (
        learn(policy, make_batch(4), make_noise(4)) for policy in (fast, plain)
    )
    torch.testing.assert_close(loss, expected, rtol=2e-2, atol=0)
    mine, theirs = (
        torch.cat([each[name].flatten() for name, value in other.items() if value is not None])
        for each in (gradients, other)
    )
    assert mine.dtype == FULL
    assert (mine - theirs).norm() < 0.05 * theirs.norm()


def test_a_connector_that_learns_takes_what_a_frozen_vision_encoder_sees(make_policy, make_batch, make_noise, hub):
    policy = make_policy(**hub, **FREEZING["vision frozen"])
    _, _, gradients = learn(policy, make_batch(4), make_noise(4))
    connector = gradients["model.vlm_with_expert.vlm.model.connector.modality_projection.proj.weight"]
    assert connector.dtype == FULL
    assert connector.any()


def test_float32_weights_are_not_rounded_into_parts_that_are_held_in_bfloat16(make_config, hub, base):
    policy, file = SmolVLAMemoryPolicy(make_config(**hub, **FROZEN)), base / "model.safetensors"
    weights = {name: torch.randn_like(value.float()) for name, value in load_file(file).items()}
    save_file(weights, file)
    assert in_vlm(policy) == [HALF] * 3
    make_room(policy, stored_dtypes(str(file)))
    policy.load_state_dict(weights, strict=False)  # it has a memory beside
    assert all(torch.equal(policy.state_dict()[name], value) for name, value in weights.items())
