"""Memory through time: what is handed on, how far gradients reach, and what stays apart."""

import pytest
import torch
from policy_variants import LAYOUTS, every_layout

STATE = "observation.state"
RESET = "observation.memory_reset"


def gradient_of_loss(policy, batch, noise, *, row, queries, memory=None):
    """Per row of the batch, how much the loss of `row` depends on what the policy saw there."""
    state = batch[STATE].clone().requires_grad_()
    loss, _ = policy({**batch, STATE: state}, **noise, queries=queries, memory=memory, reduction="none")
    (gradient,) = torch.autograd.grad(loss[row], state)
    return gradient.abs().sum(1)


@pytest.mark.parametrize("layout", ["both", "end"])  # in the start layout memory does not see the state
def test_a_loss_reaches_the_writes_of_all_queries_before_it(make_policy, make_batch, make_noise, layout):
    policy = make_policy(**LAYOUTS[layout])
    reached = gradient_of_loss(policy, make_batch(4), make_noise(4), row=2, queries=4)
    assert (reached > 0).tolist() == [True, True, True, False]


def test_gradients_end_where_the_memory_was_handed_over(make_policy, make_batch, make_noise):
    """Queries 0–1 in one step, 2–3 in the next: the loss of query 3 reaches the write of 2 and no further."""
    policy, batch = make_policy(), make_batch(4)
    early = {key: value[:2].clone().requires_grad_(key == STATE) for key, value in batch.items()}
    _, output = policy(early, **make_noise(2), queries=2)
    late = {key: value[2:].clone().requires_grad_(key == STATE) for key, value in batch.items()}
    loss, _ = policy(late, **make_noise(2), queries=2, memory=output["memory"], reduction="none")
    before, after = torch.autograd.grad(loss[1], [early[STATE], late[STATE]], allow_unused=True)
    assert before is None
    assert (after.abs().sum(1) > 0).all()


def test_a_reset_cuts_values_and_gradients(make_policy, make_batch, make_noise):
    policy, batch = make_policy(), make_batch(4)
    batch[RESET] = torch.tensor([False, False, True, False])
    reached = gradient_of_loss(policy, batch, make_noise(4), row=3, queries=4)
    assert (reached > 0).tolist() == [False, False, True, True]

    afresh, _ = policy({key: value[2:] for key, value in batch.items()}, queries=2, **rows_of(make_noise(4), 2))
    after_reset, _ = policy(batch, **make_noise(4), queries=4, reduction="none")
    torch.testing.assert_close(after_reset[2:].mean(), afresh)


def rows_of(noise, first):
    return {key: value[first:] for key, value in noise.items()}


@every_layout
def test_lanes_never_mix(make_policy, make_batch, make_noise, layout):
    policy = make_policy(**LAYOUTS[layout])
    reached = gradient_of_loss(policy, make_batch(6), make_noise(6), row=4, queries=3)  # clip 1, query 1
    assert (reached[:3] == 0).all()
    together, output = policy(make_batch(6), **make_noise(6), queries=3, reduction="none")
    second = {key: value[3:] for key, value in make_batch(6).items()}
    alone, output_alone = policy(second, **rows_of(make_noise(6), 3), queries=3, reduction="none")
    torch.testing.assert_close(together[3:], alone)
    torch.testing.assert_close(output["memory"].select([1]).tokens, output_alone["memory"].tokens)


@every_layout
@pytest.mark.parametrize("cache", [False, True])
def test_queries_in_one_call_equal_queries_one_by_one(make_policy, make_batch, make_noise, layout, cache):
    policy = make_policy(read_mem_from_cache=cache, mem_cache_size=2, **LAYOUTS[layout])
    if cache:
        torch.nn.init.ones_(policy.model.memory.look_back.gain)
    batch, noise = make_batch(8), make_noise(8)
    batch[RESET] = torch.tensor([0, 0, 0, 0, 0, 0, 1, 0]).bool()
    batch["query_is_pad"] = torch.tensor([0, 0, 1, 0, 0, 0, 0, 1]).bool()
    at_once, output = policy(dict(batch), **noise, queries=4, reduction="none")
    memory, one_by_one = None, []
    for query in range(4):
        rows = {key: value[query::4] for key, value in batch.items()}
        loss, carried = policy(rows, noise["noise"][query::4], noise["time"][query::4], memory=memory, reduction="none")
        memory = carried["memory"]
        one_by_one.append(loss)
    torch.testing.assert_close(at_once, torch.stack(one_by_one, dim=1).flatten())
    torch.testing.assert_close(output["memory"].tokens, memory.tokens)
    if cache:
        torch.testing.assert_close(output["memory"].cache, memory.cache)
        assert output["memory"].cache_length.tolist() == [2, 1]


@every_layout
def test_training_and_inference_write_the_same_memory(make_policy, make_batch, layout):
    policy = make_policy(**LAYOUTS[layout]).eval()
    trained = sampled = None
    for query in range(3):
        batch = make_batch(2, seed=query)
        trained = policy(dict(batch), memory=trained)[1]["memory"]
        _, sampled = policy.sample_actions_with(batch, sampled)
    assert torch.equal(trained.tokens, sampled.tokens)


def test_a_row_that_fills_up_a_lane_neither_counts_nor_is_remembered(make_policy, make_batch, make_noise):
    policy, results = make_policy(), []
    for value in (0.0, 9.0):
        batch = make_batch(2)
        batch["query_is_pad"] = torch.tensor([False, True])
        batch[STATE][1] = value
        batch["action"][1] = value
        loss, output = policy(batch, **make_noise(2), queries=2)
        results.append((loss, output["memory"].tokens))
    first = {key: value[:1] for key, value in make_batch(2).items()}
    loss, output = policy(first, **{key: value[:1] for key, value in make_noise(2).items()})
    results.append((loss, output["memory"].tokens))
    for other in results[1:]:
        torch.testing.assert_close(results[0], other)


def test_the_write_path_is_trained_from_the_second_query_on(make_policy, make_batch, make_noise):
    """With K = 1 nothing but the memory's own head reads what was written: the classic recipe."""
    for queries, trained in ((1, False), (2, True)):
        policy = make_policy(mem_action_loss=0.0)
        policy(make_batch(4), **make_noise(4), queries=queries)[0].backward()
        for parameter in policy.model.memory.update.parameters():
            assert (parameter.grad is not None and bool(parameter.grad.any())) == trained


def test_the_head_trains_writing_within_a_single_query_and_touches_nothing_but_memory_and_vlm(
    make_policy, make_batch, make_noise
):
    policy = make_policy(freeze_vision_encoder=True, train_expert_only=True)
    loss, outputs = policy(make_batch(4), **make_noise(4))
    (loss - policy.eval()(make_batch(4), **make_noise(4))[0]).backward()  # what is left is the head's
    torch.testing.assert_close(outputs["memory_loss"], (loss - outputs["loss"]).detach())
    for name in ("update.candidate", "reader.query", "reader.value", "head.out"):
        assert policy.get_parameter(f"model.memory.{name}.weight").grad.any(), name
    assert not policy.model.action_out_proj.weight.grad.abs().max() > 1e-6


def test_without_training_the_loss_is_that_of_the_flow_alone(make_policy, make_batch, make_noise):
    policy = make_policy()
    _, trained = policy(make_batch(4), **make_noise(4), queries=2)
    loss, outputs = policy.eval()(make_batch(4), **make_noise(4), queries=2)
    assert "memory_loss" not in outputs
    torch.testing.assert_close(loss, trained["loss"])


def test_the_memory_learns_while_the_vlm_is_frozen(make_policy, make_batch, make_noise):
    policy = make_policy(freeze_vision_encoder=True, train_expert_only=True)
    policy.train()
    policy(make_batch(4), **make_noise(4), queries=2)[0].backward()
    learning = {
        group
        for group, names in policy.parameter_groups().items()
        if any(policy.get_parameter(name).grad is not None for name in names)
    }
    assert learning == {"expert", "state_proj", "action_proj", "memory"}
    assert all(parameter.grad.any() for parameter in policy.model.memory.parameters())


@pytest.mark.parametrize(
    ("reads_context", "with_state", "through_the_model"),
    [
        pytest.param(True, 1, [6], id="reads the context"),
        pytest.param(False, 0, [2, 2, 2], id="awaits the model's output"),
    ],
)
def test_memory_tokens_of_all_queries_go_through_the_model_at_once_and_with_the_state_unless_it_writes_them(
    make_policy, make_batch, make_noise, reads_context, with_state, through_the_model
):
    policy, blocks = make_policy(mem_reads_context=reads_context), []
    first_layer = policy.model.vlm_with_expert.get_vlm_model().text_model.layers[0]
    first_layer.self_attn.k_proj.register_forward_hook(lambda _module, _inputs, keys: blocks.append(keys.shape[:2]))
    policy(make_batch(6), **make_noise(6), queries=3)
    memory = policy.config.num_mem_tokens + with_state
    assert [rows for rows, tokens in blocks if tokens == memory] == through_the_model


def test_the_last_layer_and_the_final_norm_learn_when_the_vlm_does_and_its_output_is_written(
    make_policy, make_batch, make_noise
):
    """LeRobot freezes both as unused."""
    policy = make_policy(mem_reads_context=False)
    policy(make_batch(4), **make_noise(4), queries=2)[0].backward()
    text_model = policy.model.vlm_with_expert.get_vlm_model().text_model
    assert text_model.norm.weight.grad.any()
    assert all(parameter.grad.any() for parameter in text_model.layers[-1].parameters())


def test_all_that_may_learn_has_a_gradient(make_policy, make_batch, make_noise):
    """What nothing depends on must stay frozen: several processes would wait for its gradient."""
    policy = make_policy()
    policy(make_batch(4), **make_noise(4), queries=2)[0].backward()
    assert not [name for name, each in policy.named_parameters() if each.requires_grad and each.grad is None]


def test_rows_that_are_no_lanes_and_a_foreign_memory_are_refused(make_policy, make_batch):
    policy = make_policy()
    with pytest.raises(ValueError, match="3 rows of a batch do not divide into clips of 2 queries"):
        policy(make_batch(3), queries=2)
    with pytest.raises(ValueError, match="memory is of 3 elements, the batch of 2"):
        policy(make_batch(4), queries=2, memory=policy.model.memory.initial(3))
    with pytest.raises(ValueError, match=r"must be of shapes .*\(2, 2, 32\)}, got .*\(2, 4, 32\)}"):
        policy(make_batch(2), memory=make_policy(num_mem_tokens=4).model.memory.initial(2))
