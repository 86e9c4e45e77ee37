"""Saving, loading, starting from plain SmolVLA, and which parameter belongs where."""

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies.factory import get_policy_class, make_policy_config, make_pre_post_processors
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from safetensors.torch import load_file, save_file
from tiny_sizes import ACTION_DIM, CHUNK

from lerobot_policy_smolvla_memory import SmolVLAMemoryConfig, SmolVLAMemoryPolicy
from lerobot_policy_smolvla_memory.pretrained_weights import UnfitWeights

STANDING = ("model.memory.key_bias", "model.memory.first_position")  # among the other tokens


@pytest.fixture
def plain_checkpoint(make_config, tmp_path):
    """A checkpoint as LeRobot's own SmolVLA writes it."""
    config = make_config()
    names = SmolVLAConfig.__dataclass_fields__
    policy = SmolVLAPolicy(SmolVLAConfig(**{name: getattr(config, name) for name in names}))
    policy.save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


def edit_weights(folder, edit):
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("tokens", [0, 2])
def test_a_checkpoint_is_the_same_policy_again(make_policy, make_batch, tmp_path, tokens):
    policy = make_policy(num_mem_tokens=tokens, read_mem_from_cache=True, mem_cache_size=3).eval()
    policy.save_pretrained(tmp_path)
    again = SmolVLAMemoryPolicy.from_pretrained(tmp_path)
    assert replace(again.config, vlm_model_name=policy.config.vlm_model_name) == policy.config
    for (name, weight), (other_name, other) in zip(
        policy.state_dict().items(), again.state_dict().items(), strict=True
    ):
        assert name == other_name
        assert torch.equal(weight, other), name
    noise = torch.randn(2, 6, 8)
    for seed in range(2):
        actions = [each.predict_action_chunk(make_batch(2, seed=seed), noise) for each in (policy, again)]
        assert torch.equal(*actions)


def open_as_any_lerobot_tool_does(folder):
    config = PreTrainedConfig.from_pretrained(folder)
    policy = get_policy_class(config.type).from_pretrained(folder, config=config)
    return policy, *make_pre_post_processors(config, pretrained_path=str(folder))


def test_a_checkpoint_opens_where_nothing_else_of_its_run_is_left(
    make_policy, make_config, make_batch, tiny_vlm, tmp_path
):
    run = tmp_path / "run"
    shutil.copytree(tiny_vlm, run / "vlm_of_the_run")
    policy = make_policy(vlm_model_name=str(run / "vlm_of_the_run"))
    pipelines = make_pre_post_processors(policy.config, dataset_stats={})
    batch = {key: value for key, value in make_batch(2).items() if "language" not in key}
    batch["task"] = ["put the red block into the box", "take it out"]
    expected = pipelines[0](batch)
    for each in (policy, *pipelines):
        each.save_pretrained(run / "checkpoint")
    shutil.copytree(run / "checkpoint", tmp_path / "moved")
    shutil.rmtree(run)

    policy, *pipelines = open_as_any_lerobot_tool_does(tmp_path / "moved")
    for each in (policy, *pipelines):
        each.save_pretrained(tmp_path / "saved again")
    shutil.rmtree(tmp_path / "moved")
    assert str(tmp_path) not in (tmp_path / "saved again" / "config.json").read_text()

    policy, preprocessor, _ = open_as_any_lerobot_tool_does(tmp_path / "saved again")
    ready = preprocessor(batch)
    assert torch.equal(ready["observation.language.tokens"], expected["observation.language.tokens"])
    assert policy.predict_action_chunk(ready).shape == (2, 6, 4)


def test_a_checkpoint_keeps_the_name_of_a_vlm_that_comes_from_the_hub(make_policy, tmp_path):
    policy = make_policy()
    policy.config.vlm_model_name = "someone/their-vlm"
    policy.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["vlm_model_name"] == "someone/their-vlm"
    again = SmolVLAMemoryPolicy.from_pretrained(tmp_path)  # by its own description, without the hub
    assert again.config.vlm_model_name == str(tmp_path / "vlm")


def test_a_checkpoint_without_its_description_of_the_vlm_is_refused(make_policy, tmp_path):
    make_policy().save_pretrained(tmp_path)
    shutil.rmtree(tmp_path / "vlm")
    with pytest.raises(FileNotFoundError, match="vlm must hold the config and tokenizer"):
        SmolVLAMemoryPolicy.from_pretrained(tmp_path)


def test_a_plain_checkpoint_loads_and_only_the_memory_is_new(make_config, plain_checkpoint):
    stored = load_file(plain_checkpoint / "model.safetensors")
    policy = SmolVLAMemoryPolicy.from_pretrained(plain_checkpoint, config=make_config(num_mem_tokens=2))
    new = {name for name in policy.state_dict() if name not in stored}
    assert new == {*policy.parameter_groups()["memory"], *STANDING}
    for name, weight in stored.items():
        assert torch.equal(policy.state_dict()[name], weight), name


@pytest.mark.parametrize(
    ("settings", "each"),
    [({"mem_weight": 1.0}, 1 / 2), ({"mem_weight": 1.0, "mem_at_start": True}, 1 / 4), ({"mem_weight": 9.0}, 1)],
    ids=["at one end", "at both", "not more than any other token"],
)
def test_a_memory_that_joins_weighs_as_many_tokens_as_asked(make_config, plain_checkpoint, settings, each):
    policy = SmolVLAMemoryPolicy.from_pretrained(plain_checkpoint, config=make_config(**settings))
    assert policy.model.memory.key_bias.exp().item() == pytest.approx(each)


@pytest.mark.parametrize(("frozen", "expected"), [(False, [0.5, 0.75, 1, 1]), (True, [0.5] * 4)])
def test_a_memory_that_has_joined_grows_to_full_weight_in_training_alone(
    make_config, plain_checkpoint, make_batch, frozen, expected
):
    config = make_config(mem_weight=1.0, mem_growth=1.5)  # of 2 tokens, so that each begins with a half
    policy = SmolVLAMemoryPolicy.from_pretrained(plain_checkpoint, config=config)
    policy.model.memory.requires_grad_(not frozen)
    weights = [policy.model.memory.key_bias.exp().item()]
    for _ in range(3):
        policy.train().forward(make_batch(2))
        policy.eval().forward(make_batch(2))
        weights.append(policy.model.memory.key_bias.exp().item())
    assert weights == pytest.approx(expected)


def test_a_plain_checkpoint_brings_its_own_configuration(plain_checkpoint):
    policy = SmolVLAMemoryPolicy.from_pretrained(plain_checkpoint)
    assert isinstance(policy.config, SmolVLAMemoryConfig)
    assert policy.config.num_mem_tokens == 4
    assert policy.config.chunk_size == 6


def test_memory_from_an_embedding_starts_from_the_loaded_one(make_config, plain_checkpoint):
    policy = SmolVLAMemoryPolicy.from_pretrained(plain_checkpoint, config=make_config(mem_init="embedding"))
    stored = load_file(plain_checkpoint / "model.safetensors")
    token = policy.model.vlm_with_expert.processor.tokenizer.end_of_utterance_token_id
    embedding = stored["model.vlm_with_expert.vlm.model.text_model.embed_tokens.weight"][token]
    assert torch.equal(policy.model.memory.initial(1).tokens, embedding.expand(1, 2, -1))


def test_loading_a_learnt_memory_does_not_start_it_from_the_embedding_again(make_policy, tmp_path):
    policy = make_policy(mem_init="embedding")
    torch.nn.init.ones_(policy.model.memory.mem_tokens)
    policy.save_pretrained(tmp_path)
    assert (SmolVLAMemoryPolicy.from_pretrained(tmp_path).model.memory.mem_tokens == 1).all()


def test_a_trained_memory_keeps_how_it_stands_among_the_other_tokens(make_policy, make_config, tmp_path):
    """Whatever the configuration says of one that joins; a memory from before there was a choice stays as it was."""
    policy = make_policy()
    policy.model.memory.weigh_as(0.25)
    policy.save_pretrained(tmp_path)
    for expected in ([math.log(0.25 / 2), -2], [0, 0]):
        policy = SmolVLAMemoryPolicy.from_pretrained(tmp_path, config=make_config(mem_weight=0.01))
        assert [policy.get_buffer(name).item() for name in STANDING] == pytest.approx(expected)
        edit_weights(tmp_path, lambda weights: [weights.pop(name, None) for name in STANDING])


def test_a_memory_that_was_trained_without_reading_the_context_stays_without(make_policy, make_batch, tmp_path):
    policy = make_policy(mem_reads_context=False, mem_action_loss=0.0).eval()
    policy.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    for key in ("mem_reads_context", "mem_action_loss"):
        del settings[key]  # as a checkpoint from before there was a choice
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.warns(UserWarning, match="was trained with mem_reads_context=false and stays without"):
        loaded = SmolVLAMemoryPolicy.from_pretrained(tmp_path).eval()
    assert (loaded.config.mem_reads_context, loaded.model.memory.reader) == (False, None)
    vlm, loaded_vlm = (each.model.vlm_with_expert for each in (policy, loaded))
    assert [each.requires_grad for each in loaded_vlm.parameters()] == [each.requires_grad for each in vlm.parameters()]
    batch, noise = make_batch(2), torch.randn(2, CHUNK, 8)
    for _ in range(2):
        assert torch.equal(loaded.predict_action_chunk(batch, noise), policy.predict_action_chunk(batch, noise))


def test_a_memory_with_an_earlier_form_of_reading_the_context_is_refused(make_policy, tmp_path):
    make_policy().save_pretrained(tmp_path)
    edit_weights(
        tmp_path,
        lambda weights: [
            weights.update({name.replace(".reader.", ".context_reader."): weights.pop(name)})
            for name in [name for name in weights if ".reader." in name]
        ],
    )
    with pytest.raises(UnfitWeights, match=r"model\.memory\.reader\.key\.weight is missing"):
        SmolVLAMemoryPolicy.from_pretrained(tmp_path)


def test_the_memorys_head_is_taken_over_where_it_fits_and_begins_anew_for_other_actions(
    make_policy, make_config, tmp_path
):
    policy = make_policy()
    policy.save_pretrained(tmp_path)
    same = SmolVLAMemoryPolicy.from_pretrained(tmp_path)
    assert torch.equal(same.model.memory.head.out.weight, policy.model.memory.head.out.weight)
    longer = SmolVLAMemoryPolicy.from_pretrained(tmp_path, config=make_config(chunk_size=CHUNK + 1))
    assert longer.model.memory.head.shape == (CHUNK + 1, ACTION_DIM)
    assert torch.equal(longer.model.memory.update.gate.weight, policy.model.memory.update.gate.weight)
    without = SmolVLAMemoryPolicy.from_pretrained(tmp_path, config=make_config(mem_action_loss=0.0))
    assert without.model.memory.head is None


@pytest.mark.parametrize(
    ("edit", "complaint"),
    [
        (lambda weights: weights.pop("model.state_proj.weight"), "model.state_proj.weight is missing"),
        (lambda weights: weights.update(extra=torch.zeros(1)), "extra is not part of this policy"),
        (
            lambda weights: weights.update({"model.state_proj.bias": torch.zeros(7)}),
            r"model.state_proj.bias is of shape \(7,\), this policy's of \(32,\)",
        ),
        (lambda weights: weights.pop("model.memory.mem_tokens"), "model.memory.mem_tokens is missing"),
    ],
)
def test_weights_that_do_not_fit_are_refused(make_policy, tmp_path, edit, complaint):
    make_policy().save_pretrained(tmp_path)
    edit_weights(tmp_path, edit)
    with pytest.raises(ValueError, match=f"1 of its weights\n  {complaint}"):
        SmolVLAMemoryPolicy.from_pretrained(tmp_path)


def test_a_memory_of_another_size_and_a_memory_nobody_asked_for_are_refused(make_policy, make_config, tmp_path):
    make_policy(num_mem_tokens=4).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"mem_tokens is of shape \(4, 1, 32\), this policy's of \(2, 1, 32\)"):
        SmolVLAMemoryPolicy.from_pretrained(tmp_path, config=make_config(num_mem_tokens=2))
    with pytest.raises(ValueError, match="key_bias is not part of this policy"):
        SmolVLAMemoryPolicy.from_pretrained(tmp_path, config=make_config(num_mem_tokens=0))


def test_weights_of_fewer_dimensions_are_widened_and_compute_the_old_ones_as_before(
    make_policy, make_config, make_batch, tmp_path
):
    policy = make_policy().eval()
    policy.save_pretrained(tmp_path)
    wider = SmolVLAMemoryPolicy.from_pretrained(tmp_path, config=make_config(max_state_dim=11, max_action_dim=10))
    assert wider.widened == {"state_proj": (8, 11), "action_in_proj": (8, 10), "action_out_proj": (8, 10)}
    stored, loaded = policy.state_dict(), wider.state_dict()
    for name, weight in stored.items():
        assert torch.equal(loaded[name][tuple(slice(size) for size in weight.shape)], weight), name
    noise = torch.randn(2, 6, 10)
    batch = make_batch(2)
    actions = wider.eval().predict_action_chunk(batch, noise)
    assert torch.allclose(actions, policy.predict_action_chunk(batch, noise[..., :8]), atol=1e-6)

    batch["observation.state"] = torch.randn(2, 11)
    batch["action"] = torch.randn(2, 6, 10)
    wider.config.output_features["action"].shape = (10,)
    wider.train().forward(batch)[0].backward()
    for weight in (wider.model.state_proj.weight, wider.model.action_in_proj.weight):
        assert weight.grad[:, 8:].abs().min() > 0  # what is new learns from the first step on
    assert wider.model.action_out_proj.weight.grad[8:].abs().min() > 0


def test_weights_of_more_dimensions_than_the_policy_are_refused(make_policy, make_config, tmp_path):
    make_policy().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="max_action_dim must be at least 8, what the weights were"):
        SmolVLAMemoryPolicy.from_pretrained(tmp_path, config=make_config(max_action_dim=6))


def test_of_many_problems_the_first_ten_are_listed(make_policy, tmp_path):
    make_policy().save_pretrained(tmp_path)
    edit_weights(tmp_path, lambda weights: [weights.pop(name) for name in list(weights) if "vlm." in name])
    with pytest.raises(ValueError, match="is missing") as error:
        SmolVLAMemoryPolicy.from_pretrained(tmp_path)
    assert str(error.value).count("is missing") == 10


def test_a_checkpoint_of_an_older_lerobot_says_how_it_is_brought_up_to_date(make_policy, tmp_path):
    make_policy().save_pretrained(tmp_path)
    edit_weights(
        tmp_path, lambda weights: weights.update({"normalize_inputs.buffer_observation_state.mean": torch.ones(1)})
    )
    with pytest.raises(ValueError, match="older LeRobot; lerobot"):
        SmolVLAMemoryPolicy.from_pretrained(tmp_path)


def test_missing_weights_are_never_replaced_by_random_ones(make_policy, tmp_path):
    make_policy().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model.safetensors"):
        SmolVLAMemoryPolicy.from_pretrained(tmp_path)


def test_weights_of_a_vision_language_model_that_do_not_fit_are_refused(make_config, tiny_vlm, tmp_path):
    folder = tmp_path / "vlm"
    shutil.copytree(tiny_vlm, folder)
    config = make_config(vlm_model_name=str(folder), load_vlm_weights=True)
    SmolVLAMemoryPolicy(config)  # whole, it is taken
    edit_weights(folder, lambda weights: weights.update({"model.text_model.norm.weight": torch.zeros(3)}))
    with pytest.raises(ValueError, match=r"text_model.norm.weight is of shape \(3,\), its config's of \(32,\)"):
        SmolVLAMemoryPolicy(config)
    edit_weights(folder, lambda weights: [weights.pop(name) for name in list(weights) if "t_model.layers.1." in name])
    with pytest.raises(ValueError, match=r"10 of its weights\n  .*layers.1.input_layernorm.weight is missing"):
        SmolVLAMemoryPolicy(config)


@pytest.mark.parametrize("tokens", [0, 2])
def test_every_parameter_is_in_exactly_one_group(make_policy, tokens):
    policy = make_policy(num_mem_tokens=tokens, read_mem_from_cache=True)
    groups = policy.parameter_groups()
    assert list(groups) == [
        "vision",
        "connector",
        "vlm_text",
        "expert",
        "state_proj",
        "action_proj",
        "memory",
    ]
    named = sorted(name for names in groups.values() for name in names)
    assert named == sorted(name for name, _ in policy.named_parameters())
    assert [group for group, names in groups.items() if not names] == ([] if tokens else ["memory"])
    assert sorted(groups["action_proj"]) == sorted(
        f"model.action_{layer}.{kind}"
        for layer in ("in_proj", "out_proj", "time_mlp_in", "time_mlp_out")
        for kind in ("weight", "bias")
    )
    assert not any("lm_expert" in name for name in groups["vlm_text"])


def test_a_parameter_of_no_group_is_an_error(make_policy):
    policy = make_policy()
    policy.model.memory_of_another_kind = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"model.memory_of_another_kind.weight belongs to none of the groups"):
        policy.parameter_groups()


def test_lerobots_factories_know_the_policy(make_config, tmp_path):
    assert get_policy_class("smolvla_memory") is SmolVLAMemoryPolicy
    assert isinstance(make_policy_config("smolvla_memory", device="cpu"), SmolVLAMemoryConfig)
    config = make_config(num_mem_tokens=8, mem_update="overwrite")
    config.save_pretrained(tmp_path)
    assert PreTrainedConfig.from_pretrained(tmp_path) == config
