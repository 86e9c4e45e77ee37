"""The fast forward gives LeRobot's numbers: loss, every gradient, sampled actions, written memory."""

import itertools

import pytest
import torch
from policy_variants import FREEZING, LAYOUTS, every_layout, learn
from tiny_sizes import CAMERAS

from lerobot_policy_smolvla_memory.backbone import attend, attention_bias
from lerobot_policy_smolvla_memory.configuration_smolvla_memory import image_features_key

FRAMES = {"mem_frames": 2, "mem_backprop_depth": 1}
MEMORIES = {
    "none": {"num_mem_tokens": 0},
    **LAYOUTS,
    "overwriting": {**LAYOUTS["end"], "mem_update": "overwrite"},
    "frames at the end": {**LAYOUTS["end"], **FRAMES, "num_mem_tokens": 0},
    "frames at the start": {**LAYOUTS["start"], **FRAMES, "num_mem_tokens": 0},
    "frames and tokens": {**LAYOUTS["both"], **FRAMES},
}
ARCHITECTURES = {
    "cross-attention": {},
    "self-attention": {"attention_mode": "self_attn"},
    "half as many expert layers": {"num_expert_layers": 2, "self_attn_every_n_layers": 4},
    "fewer layers": {"num_vlm_layers": 2, "self_attn_every_n_layers": -1},
    "image tokens in brackets": {"add_image_special_tokens": True},
    "prefix padded": {"prefix_length": 16},
}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture
def make_twins(make_policy):
    """The same policy with the fast forward and with LeRobot's."""

    def make(**changes):
        fast, plain = (make_policy(fast_forward=fast_forward, **changes) for fast_forward in (True, False))
        plain.load_state_dict(fast.state_dict())
        return fast, plain

    return make


def assert_same_learning(fast, plain, batch, draws):
    (loss, memory, gradients), (plain_loss, plain_memory, plain_gradients) = (
        learn(policy, batch, draws) for policy in (fast, plain)
    )
    torch.testing.assert_close(loss, plain_loss, **CLOSE)
    assert (memory is None) == (plain_memory is None)
    if memory is not None:
        torch.testing.assert_close(memory, plain_memory, **CLOSE)
    for name, gradient in plain_gradients.items():
        mine = gradients[name]
        if gradient is None or mine is None:  # not reached; the fast one does not compute what nobody reads
            assert gradient is None or not gradient.any(), name
            assert mine is None or not mine.any(), name
        else:
            scale = gradient.abs().max().clamp_min(1.0)
            torch.testing.assert_close(
                mine / scale, gradient / scale, msg=lambda text, name=name: f"{name}: {text}", **CLOSE
            )


@pytest.mark.parametrize(("freezing", "memory"), itertools.product(FREEZING, MEMORIES))
def test_loss_gradients_and_memory_are_lerobots(make_twins, make_batch, make_noise, freezing, memory):
    twins = make_twins(**FREEZING[freezing], **MEMORIES[memory])
    batch = make_batch(4)  # languages of different lengths, padded
    batch["observation.memory_reset"] = torch.tensor([True, False, True, True])
    batch["query_is_pad"] = torch.tensor([False, True, False, False])
    assert_same_learning(*twins, batch, make_noise(4))


@every_layout
@pytest.mark.parametrize(("key_bias", "first_position"), [(-3.0, -2), (0.0, 0)], ids=["faint", "older"])
def test_it_holds_however_the_memory_stands_among_the_other_tokens(
    make_twins, make_batch, make_noise, layout, key_bias, first_position
):
    twins = make_twins(**LAYOUTS[layout])
    for policy in twins:
        policy.model.memory.key_bias.fill_(key_bias)
        policy.model.memory.first_position.fill_(first_position)
    assert_same_learning(*twins, make_batch(4), make_noise(4))


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_holds_in_every_architecture(make_twins, make_batch, make_noise, architecture, memory):
    twins = make_twins(**ARCHITECTURES[architecture], **MEMORIES[memory])
    assert_same_learning(*twins, make_batch(4), make_noise(4))


@pytest.mark.parametrize("memory", MEMORIES)
def test_it_holds_with_an_empty_camera(make_twins, make_batch, make_noise, memory):
    twins = make_twins(empty_cameras=1, **MEMORIES[memory])
    batch = make_batch(4)
    del batch[CAMERAS[1]]
    assert_same_learning(*twins, batch, make_noise(4))


@pytest.mark.parametrize("memory", MEMORIES)
def test_sampled_actions_are_lerobots(make_twins, make_batch, make_noise, memory):
    noise = make_noise(3)["noise"]
    for policies in (make_twins(**MEMORIES[memory]),):
        carried = [None, None]
        for step in range(3):
            results = [
                policy.eval().sample_actions_with(make_batch(3, seed=step), memory, noise)
                for policy, memory in zip(policies, carried, strict=True)
            ]
            torch.testing.assert_close(results[0][0], results[1][0], **CLOSE)
            carried = [memory for _, memory in results]


def test_several_draws_are_the_mean_of_single_ones(make_policy, make_batch, make_noise):
    policy, batch, draws = make_policy(), make_batch(4), make_noise(12)
    together, _ = policy(dict(batch), **draws, reduction="none", queries=2)
    alone = [
        policy(dict(batch), **{name: value[draw::3] for name, value in draws.items()}, reduction="none", queries=2)[0]
        for draw in range(3)
    ]
    torch.testing.assert_close(together, torch.stack(alone).mean(dim=0))


def test_training_draws_as_often_as_asked(make_policy, make_batch, monkeypatch):
    policy, seen = make_policy(flow_draws=3), []
    velocity = policy.model.velocity
    monkeypatch.setattr(policy.model, "velocity", lambda *given: seen.append(len(given[2])) or velocity(*given))
    policy(make_batch(2))
    assert seen == [6]


@pytest.mark.parametrize("memory", ["none", "start", "end"])
def test_features_stand_in_for_pictures(make_policy, make_batch, make_noise, memory):
    policy = make_policy(**MEMORIES[memory])
    batch = make_batch(2)
    features = {key: value for key, value in batch.items() if key not in CAMERAS}
    for camera in CAMERAS:
        features[image_features_key(camera)] = policy.embed_camera(batch[camera])
    losses = [policy(dict(each), **make_noise(2))[0] for each in (batch, features)]
    torch.testing.assert_close(*losses)
    del features[image_features_key(CAMERAS[1])]
    with pytest.raises(ValueError, match=r"of all cameras or of none.*wrist"):
        policy(features, **make_noise(2))


def test_nothing_is_recorded_of_a_frozen_context(make_policy, make_batch):
    """No graph before the state: this is where most of the time goes."""
    policy = make_policy(**FREEZING["VLM frozen"])
    prefix = policy.model.embed(
        *policy.prepare_images(make_batch(2)),
        *(make_batch(2)[f"observation.language.{key}"] for key in ("tokens", "attention_mask")),
        policy.prepare_state(make_batch(2)),
    )
    output, encoded = policy.model.backbone.append(prefix.context, attention_bias(prefix.valid), read=True)
    assert prefix.state.requires_grad
    assert not any(tensor.requires_grad for tensor in (output, *encoded.keys, *encoded.values))


def test_the_expert_projects_the_prefix_once_per_query(make_policy, make_batch, monkeypatch):
    policy, calls = make_policy(num_steps=5), []
    crossing = [layer for _, layer, crosses in policy.model.backbone.expert_layers() if crosses]
    for layer in crossing:
        layer.self_attn.k_proj.register_forward_hook(lambda *_: calls.append(1))
    policy.eval().sample_actions_with(make_batch(2))
    assert len(calls) == len(crossing)


def test_grouped_heads_attend_as_if_keys_were_repeated():
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 3, 6, 4), torch.randn(2, 5, 2, 4), torch.randn(2, 5, 2, 4)
    sees = torch.rand(2, 3, 5) > 0.4
    sees[..., 0] = True
    expected = torch.nn.functional.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2).repeat_interleave(3, dim=1),
        value.transpose(1, 2).repeat_interleave(3, dim=1),
        attn_mask=sees[:, None],
    )
    torch.testing.assert_close(attend(query, key, value, attention_bias(sees)), expected.transpose(1, 2).flatten(2))
