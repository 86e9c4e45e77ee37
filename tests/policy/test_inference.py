"""On the robot: the policy carries its memory, and advances it once per query."""

import pytest
import torch
from lerobot.policies.rtc.configuration_rtc import RTCConfig
from tiny_sizes import ACTION_DIM, CHUNK


@pytest.fixture
def noise():
    return torch.randn(2, CHUNK, 8, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def count_queries(monkeypatch):
    """The batch size of every query from now on."""

    def count(policy) -> list[int]:
        sizes, encode = [], policy.model.encode

        def recorded(prefix, *args, **kwargs):
            sizes.append(len(prefix.valid))
            return encode(prefix, *args, **kwargs)

        monkeypatch.setattr(policy.model, "encode", recorded)
        return sizes

    return count


def test_memory_advances_once_per_query_not_per_action_or_denoising_step(make_policy, make_batch, noise):
    policy = make_policy(n_action_steps=3)
    expected = None
    for step in range(6):
        policy.select_action(make_batch(2, seed=step), noise)
        if step % 3 == 0:
            _, expected = policy.sample_actions_with(make_batch(2, seed=step), expected, noise)
        assert torch.equal(policy.get_memory().tokens, expected.tokens)


def test_a_chunk_is_a_query_as_well(make_policy, make_batch, noise):
    policy = make_policy().eval()
    first, memory = policy.sample_actions_with(make_batch(2), None, noise)
    second, memory = policy.sample_actions_with(make_batch(2, seed=1), memory, noise)
    assert torch.equal(policy.predict_action_chunk(make_batch(2), noise), first)
    assert torch.equal(policy.predict_action_chunk(make_batch(2, seed=1), noise), second)
    assert torch.equal(policy.get_memory().tokens, memory.tokens)
    assert first.shape == (2, CHUNK, ACTION_DIM)


def test_under_real_time_chunking_memory_advances_by_steps_carried_out_not_by_queries(make_policy, make_batch, noise):
    policy = make_policy(n_action_steps=2, rtc_config=RTCConfig(enabled=True)).eval()
    plan = policy.predict_action_chunk(make_batch(1), noise[:1], inference_delay=0, prev_chunk_left_over=None)
    memories = [policy.get_memory().tokens]
    for step in (1, 2):  # a query after every single step
        left = plan[0, 1:]
        plan = policy.predict_action_chunk(
            make_batch(1, seed=step), noise[:1], inference_delay=0, prev_chunk_left_over=left
        )
        memories.append(policy.get_memory().tokens)
    assert torch.equal(memories[0], memories[1])
    assert not torch.equal(memories[1], memories[2])


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_a_temperature_scales_the_noise_that_actions_begin_from(make_policy, make_batch, noise, temperature):
    as_trained, cooler = make_policy().eval(), make_policy(sampling_temperature=temperature).eval()
    expected, _ = as_trained.sample_actions_with(make_batch(2), None, temperature * noise)
    assert torch.equal(cooler.predict_action_chunk(make_batch(2), noise), expected)
    assert not torch.equal(as_trained.predict_action_chunk(make_batch(2), noise), expected)


def test_sampling_with_a_given_memory_leaves_the_policy_as_it_was(make_policy, make_batch, noise):
    policy = make_policy()
    policy.select_action(make_batch(2), noise)
    before = policy.get_memory()
    policy.sample_actions_with(make_batch(2, seed=1), before, noise)
    assert torch.equal(policy.get_memory().tokens, before.tokens)


def test_reset_begins_a_new_episode(make_policy, make_batch, noise):
    policy = make_policy()
    first = [policy.select_action(make_batch(2, seed=step), noise) for step in range(3)]
    policy.reset()
    assert policy.get_memory() is None
    again = [policy.select_action(make_batch(2, seed=step), noise) for step in range(3)]
    assert torch.equal(torch.stack(first), torch.stack(again))


@pytest.mark.parametrize("by_batch", [False, True])
def test_an_element_reset_on_its_own_starts_anew_and_disturbs_no_other(
    make_policy, make_batch, noise, count_queries, by_batch
):
    """Two environments, the second of which ends in the middle of a chunk."""
    alone = []
    for element, starts in ((0, [0]), (1, [0, 3])):
        policy = make_policy()
        for step in range(6):
            if step in starts:
                policy.reset()
            rows = {key: value[[element]] for key, value in make_batch(2, seed=step).items()}
            alone.append(policy.select_action(rows, noise[[element]]))
    expected = torch.cat(alone).view(2, 6, ACTION_DIM).transpose(0, 1)

    policy = make_policy()
    sizes, actions = count_queries(policy), []
    for step in range(6):
        batch = make_batch(2, seed=step)
        if step == 3 and not by_batch:
            policy.reset([1])
        if by_batch:
            batch["observation.memory_reset"] = torch.tensor([False, step == 3])
        actions.append(policy.select_action(batch, noise))
    torch.testing.assert_close(torch.stack(actions), expected)
    assert sizes == [2, 2, 1, 1, 1]  # steps 0 and 2 together; then 3 and 5 for one, 4 for the other


def test_a_robot_process_can_restart_with_its_memory(make_policy, make_batch, noise):
    policy = make_policy()
    for step in range(2):
        policy.select_action(make_batch(2, seed=step), noise)
    kept = policy.get_memory()
    expected = policy.select_action(make_batch(2, seed=2), noise)

    restarted = make_policy()
    restarted.select_action(make_batch(2, seed=9), noise)
    restarted.set_memory(kept)
    kept.tokens.zero_()  # what was handed over is the policy's own from then on
    assert torch.equal(restarted.select_action(make_batch(2, seed=2), noise), expected)


def test_another_batch_size_is_an_error_in_words(make_policy, make_batch):
    policy = make_policy()
    policy.select_action(make_batch(2))
    with pytest.raises(ValueError, match="batch has 3 elements, but actions are planned for 2; call reset"):
        policy.select_action(make_batch(3))
    with pytest.raises(ValueError, match="memory is of 2 elements, the batch of 3; call reset"):
        policy.predict_action_chunk(make_batch(3))
    policy.set_memory(policy.get_memory())
    with pytest.raises(ValueError, match="memory is of 2 elements, the batch of 3; call reset"):
        policy.select_action(make_batch(3))
    policy.select_action(make_batch(2))  # as if nothing had happened


def test_another_device_is_an_error_in_words(make_policy, make_batch):
    policy = make_policy()
    elsewhere = policy.model.memory.initial(2).to("meta")
    with pytest.raises(ValueError, match="memory is on meta, the batch on cpu"):
        policy.sample_actions_with(make_batch(2), elsewhere)


def test_a_memory_that_does_not_fit_is_refused(make_policy):
    with pytest.raises(ValueError, match="must be of shapes"):
        make_policy(num_mem_tokens=4).set_memory(make_policy().model.memory.initial(1))
    with pytest.raises(ValueError, match="must be of shapes"):
        make_policy(read_mem_from_cache=True).set_memory(make_policy().model.memory.initial(1))
    with pytest.raises(ValueError, match="has no memory"):
        make_policy(num_mem_tokens=0).set_memory(make_policy().model.memory.initial(1))


def test_reset_in_the_batch_is_honoured_as_in_training(make_policy, make_batch, noise):
    policy = make_policy()
    _, carried = policy.sample_actions_with(make_batch(2), None, noise)
    batch = make_batch(2, seed=1)
    batch["observation.memory_reset"] = torch.tensor([True, False])
    actions, _ = policy.sample_actions_with(batch, carried, noise)
    afresh, _ = policy.sample_actions_with(make_batch(2, seed=1), None, noise)
    on, _ = policy.sample_actions_with(make_batch(2, seed=1), carried, noise)
    assert torch.equal(actions, torch.stack([afresh[0], on[1]]))
    assert not torch.equal(afresh, on)


@pytest.mark.parametrize("tokens", [0, 2])
def test_with_memory_actions_depend_on_what_was_seen_before(make_policy, make_batch, noise, tokens):
    policy, last = make_policy(num_mem_tokens=tokens), []
    for seed in (1, 2):
        policy.reset()
        policy.predict_action_chunk(make_batch(2, seed=seed), noise)
        last.append(policy.predict_action_chunk(make_batch(2), noise))
    assert torch.equal(*last) == (tokens == 0)
