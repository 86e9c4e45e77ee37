"""A chunk that is planned while the one before is carried out: guided at inference, or learnt in training."""

import pytest
import torch
from policy_variants import both_forwards
from tiny_sizes import ACTION_DIM, CHUNK

DELAY = 2


def test_a_time_of_each_step_is_that_of_the_chunk_where_all_are_the_same(make_policy, make_batch, make_noise) -> None:
    policy, batch, draws = make_policy().eval(), make_batch(2), make_noise(2)
    prefix, _ = policy.encode(batch)
    x_t, time = draws["noise"], draws["time"]
    with torch.no_grad():
        whole = policy.model.velocity(prefix, x_t, time)
        each = policy.model.velocity(prefix, x_t, time[:, None].expand(-1, CHUNK))
    torch.testing.assert_close(each, whole)


@both_forwards
@pytest.mark.parametrize("memory", [0, 2], ids=["without memory", "with memory"])
def test_steps_that_are_given_clean_are_no_question_and_have_no_noise(
    make_policy, make_batch, make_noise, monkeypatch, fast_forward, memory
) -> None:
    """Neither their noise nor, in the loss, how well they are answered matters; the rest of the chunk is asked."""
    policy = make_policy(
        fast_forward=fast_forward, num_mem_tokens=memory, mem_action_loss=0.0, rtc_training_delay=DELAY
    ).train()
    batch, draws = make_batch(2), make_noise(2)
    monkeypatch.setattr(torch, "randint", lambda _most, shape, **_: torch.full(shape, DELAY))
    with torch.no_grad():
        loss, _ = policy(dict(batch), **draws)
        noisier = draws["noise"].clone()
        noisier[:, :DELAY] += 5
        assert torch.equal(policy(dict(batch), **(draws | {"noise": noisier}))[0], loss)
        noisier[:, DELAY] += 5
        assert not torch.equal(policy(dict(batch), **(draws | {"noise": noisier}))[0], loss)


def test_the_lengths_are_drawn_from_none_to_all_and_only_in_training(make_policy, make_noise) -> None:
    policy, noise = make_policy(rtc_training_delay=DELAY).train(), make_noise(200)["noise"]
    torch.manual_seed(0)
    clean = policy._clean_steps(noise)
    assert set(clean.sum(dim=1).tolist()) == {0, 1, 2}
    assert bool((clean[:, :-1] | ~clean[:, 1:]).all())  # from the first step on
    assert policy.eval()._clean_steps(noise) is None
    assert make_policy().train()._clean_steps(noise) is None


@pytest.mark.parametrize("trained", [0, DELAY], ids=["guided", "trained"])
def test_a_plan_begins_with_the_steps_that_are_carried_out_meanwhile(
    make_policy, make_batch, make_noise, trained
) -> None:
    policy, batch, noise = (
        make_policy(rtc_training_delay=trained, num_steps=10).eval(),
        make_batch(2),
        make_noise(2)["noise"],
    )
    free, _ = policy.sample_actions_with(batch, noise=noise)
    left_over = free[:, 1:] + 1.0
    handover = {"prev_chunk_left_over": left_over, "inference_delay": DELAY, "execution_horizon": CHUNK - 1}
    planned, _ = policy.sample_actions_with(batch, noise=noise, **handover)
    assert planned.shape == (2, CHUNK, ACTION_DIM)
    torch.testing.assert_close(planned[:, :DELAY], left_over[:, :DELAY], atol=0.0 if trained else 0.05, rtol=0.0)
    assert not torch.allclose(planned[:, DELAY:], free[:, DELAY:], atol=1e-3)


def test_a_trained_plan_shows_the_steps_held_as_clean_and_the_others_with_the_noise_of_their_time(
    make_policy, make_batch, make_noise, monkeypatch
) -> None:
    policy = make_policy(rtc_training_delay=DELAY, num_steps=4).eval()
    velocity, asked = policy.model.velocity, []
    monkeypatch.setattr(
        policy.model, "velocity", lambda prefix, x_t, time: [asked.append((x_t, time)), velocity(prefix, x_t, time)][1]
    )
    left_over = torch.ones(2, CHUNK - 1, ACTION_DIM)
    handover = {"prev_chunk_left_over": left_over, "inference_delay": DELAY, "execution_horizon": CHUNK - 1}
    policy.sample_actions_with(make_batch(2), noise=make_noise(2)["noise"], **handover)
    assert len(asked) == 4
    for place, (x_t, time) in enumerate(asked):
        assert torch.equal(x_t[:, :DELAY, :ACTION_DIM], left_over[:, :DELAY])
        assert bool((time[:, :DELAY] == 0).all())
        torch.testing.assert_close(time[:, DELAY:], torch.full((2, CHUNK - DELAY), 1 - place / 4))


def test_more_steps_than_were_trained_are_guided(make_policy, make_batch, make_noise) -> None:
    trained, guided = make_policy(rtc_training_delay=1).eval(), make_policy().eval()
    batch, noise = make_batch(2), make_noise(2)["noise"]
    left_over = torch.zeros(2, CHUNK - 1, ACTION_DIM)
    handover = {"prev_chunk_left_over": left_over, "inference_delay": DELAY, "execution_horizon": CHUNK - 1}
    plans = [policy.sample_actions_with(batch, noise=noise, **handover)[0] for policy in (trained, guided)]
    assert torch.equal(*plans)


@pytest.mark.parametrize("delay", [-1, CHUNK])
def test_a_delay_of_a_whole_chunk_is_refused(make_config, delay) -> None:
    with pytest.raises(
        ValueError, match=rf"rtc_training_delay must be 0 .* fewer than chunk_size={CHUNK}, got {delay}"
    ):
        make_config(rtc_training_delay=delay)
