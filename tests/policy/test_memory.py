"""The recurrent memory alone."""

import pytest
import torch

from lerobot_policy_smolvla_memory.memory import MemoryState, RecurrentMemory


def parameters(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.fixture
def memory():
    torch.manual_seed(0)
    return RecurrentMemory(4, 16)


@pytest.mark.parametrize(("tokens", "count"), [(2, 1920), (4, 3840), (8, 7680), (16, 15360)])
def test_parameters_at_the_width_of_smolvlm2_500m(tokens, count):
    memory = RecurrentMemory(tokens, 960, cache_size=8)
    assert memory.mem_tokens.shape == (tokens, 1, 960)
    assert memory.mem_tokens.numel() == count
    assert parameters(memory) < 0.01 * 450e6


@pytest.mark.parametrize("init", ["normal", "zeros", "embedding"])
def test_memory_starts_where_it_is_said_to(init):
    embedding = torch.arange(64.0)
    tokens = RecurrentMemory(200, 64, init=init, embedding=embedding).initial(3).tokens
    assert tokens.shape == (3, 200, 64)
    assert torch.equal(tokens[0], tokens[2])
    if init == "normal":
        assert tokens.std().item() == pytest.approx(0.02, rel=0.05)
    else:
        assert torch.equal(tokens[0, 7], embedding if init == "embedding" else torch.zeros(64))


def test_an_embedding_to_start_from_must_be_given():
    with pytest.raises(ValueError, match="mem_init 'embedding' needs the embedding"):
        RecurrentMemory(4, 16, init="embedding")


def test_reading_brings_every_scale_to_that_of_the_prefix(memory):
    """The initial std of 0.02 and a final norm's output of any size arrive alike, at RMS 1 and a little."""
    torch.nn.init.zeros_(memory.slots)
    for scale in (0.02, 1.0, 50.0):
        tokens = memory.read(MemoryState(torch.randn(2, 4, 16) * scale))
        torch.testing.assert_close(tokens.square().mean(-1), torch.ones(2, 4), rtol=0.01, atol=0)


def test_equal_contents_are_distinguished_by_their_slot(memory):
    tokens = memory.read(MemoryState(torch.ones(1, 4, 16)))[0]
    assert torch.cdist(tokens, tokens)[~torch.eye(4, dtype=torch.bool)].min() > 0.1


def test_a_closed_gate_keeps_and_an_open_gate_replaces(memory):
    state = MemoryState(torch.nn.functional.rms_norm(torch.randn(2, 4, 16), (16,)))
    output = torch.randn(2, 4, 16) * 5
    for bias, expected in ((-50.0, state.tokens), (50.0, torch.nn.functional.rms_norm(output, (16,)))):
        torch.nn.init.constant_(memory.update.gate.bias, bias)
        torch.testing.assert_close(memory.write(state, output=output).tokens, expected)


def test_the_first_writes_take_a_tenth_of_the_new(memory):
    old = torch.nn.functional.rms_norm(torch.randn(1, 4, 16), (16,))
    new = torch.nn.functional.rms_norm(torch.randn(1, 4, 16), (16,))
    written = memory.write(MemoryState(old), output=new).tokens
    torch.testing.assert_close(written, torch.nn.functional.rms_norm(0.9 * old + 0.1 * new, (16,)))


def test_overwriting_forgets_all_that_was_before():
    memory = RecurrentMemory(4, 16, update="overwrite")
    output = torch.randn(1, 4, 16)
    written = [memory.write(MemoryState(torch.randn(1, 4, 16)), output=output).tokens for _ in range(2)]
    assert torch.equal(*written)
    torch.testing.assert_close(written[0].square().mean(-1), torch.ones(1, 4))


@pytest.mark.parametrize("cache_size", [0, 3])
def test_reset_begins_anew_for_the_masked_elements_only(cache_size):
    memory = RecurrentMemory(4, 16, cache_size=cache_size)
    state = memory.initial(3)
    for _ in range(2):
        state = memory.write(state, output=torch.randn(3, 4, 16))
    reset = memory.reset(state, torch.tensor([False, True, False]))
    fresh = memory.initial(3)
    for name in state.shapes:
        new, old, first = (getattr(each, name) for each in (reset, state, fresh))
        assert torch.equal(new[1], first[1])
        assert torch.equal(new[[0, 2]], old[[0, 2]])
        assert not torch.equal(old[1], first[1])


def test_elements_can_be_taken_out_and_put_back(memory):
    state = MemoryState(torch.randn(3, 4, 16))
    taken = state.select([2, 0])
    assert torch.equal(taken.tokens, state.tokens[[2, 0]])
    put = state.put([2, 0], MemoryState(torch.stack([torch.zeros(4, 16), torch.ones(4, 16)])))
    assert put.tokens[:, 0, 0].tolist() == [1.0, state.tokens[1, 0, 0], 0.0]


def test_the_cache_holds_the_latest_states_newest_first():
    memory = RecurrentMemory(2, 8, cache_size=3)
    states = [memory.initial(1)]
    for _ in range(5):
        states.append(memory.write(states[-1], output=torch.randn(1, 2, 8)))
    assert [state.cache_length.item() for state in states] == [0, 1, 2, 3, 3, 3]
    for age in range(3):
        assert torch.equal(states[5].cache[:, age], states[4 - age].tokens)


def test_looking_back_changes_nothing_until_it_is_trained_and_sees_only_what_is_filled():
    torch.manual_seed(0)
    memory = RecurrentMemory(2, 8, cache_size=3)
    state = memory.write(memory.initial(1), output=torch.randn(1, 2, 8))
    alone = memory.read_norm(state.tokens) + memory.slots
    assert torch.equal(memory.read(state), alone)

    torch.nn.init.ones_(memory.look_back.gain)
    assert not torch.allclose(memory.read(state), alone)
    beyond = state.cache.clone()
    beyond[:, 1:] = 7.0
    assert torch.equal(memory.read(state), memory.read(MemoryState(state.tokens, beyond, state.cache_length)))
    empty = memory.initial(1)
    torch.testing.assert_close(memory.read(empty), memory.read_norm(empty.tokens) + memory.slots)


@pytest.mark.parametrize("cache_size", [0, 3])
def test_the_state_is_float32_under_mixed_precision(cache_size):
    memory = RecurrentMemory(4, 16, cache_size=cache_size)
    output = torch.randn(2, 4, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        state = memory.write(memory.initial(2), output=output.bfloat16())
        tokens = memory.read(state)
    assert (state.tokens.dtype, tokens.dtype) == (torch.float32, torch.float32)
    expected = memory.write(memory.initial(2), output=output.bfloat16().float())
    assert torch.equal(state.tokens, expected.tokens)


def test_what_is_written_comes_from_the_context_but_not_from_its_padding():
    memory = RecurrentMemory(2, 16, context_heads=4)
    state, embeddings = memory.initial(3), torch.randn(3, 5, 16)
    valid = torch.ones(3, 5, dtype=torch.bool)
    valid[:, 4] = False

    def written(embeddings: torch.Tensor) -> torch.Tensor:
        return memory.write(state, memory.context([embeddings], valid)).tokens

    padding, seen = embeddings.clone(), embeddings.clone()
    padding[:, 4], seen[:, 3] = 100.0, -seen[:, 3]
    torch.testing.assert_close(written(padding), written(embeddings))
    assert (written(seen) - written(embeddings)).abs().amax(dim=(1, 2)).gt(1e-3).all()


def test_the_context_of_a_query_is_its_own_rows():
    memory = RecurrentMemory(2, 16, context_heads=4)
    embeddings, valid = torch.randn(6, 5, 16), torch.ones(6, 5, dtype=torch.bool)
    second = memory.context([embeddings], valid).queries(3)[1]
    alone = memory.context([embeddings[1::3]], valid[1::3])
    torch.testing.assert_close((second.keys, second.values), (alone.keys, alone.values))


def test_blocks_are_read_as_if_they_were_one_and_only_what_learns_is_recorded():
    memory = RecurrentMemory(2, 16, context_heads=4)
    learns, frozen, valid = torch.randn(3, 1, 16, requires_grad=True), torch.randn(3, 5, 16), torch.ones(3, 6).bool()
    shapes = []
    memory.reader.key.register_full_backward_hook(lambda _module, inputs, _outputs: shapes.append(inputs[0]))
    apart, joined = memory.context([learns, frozen], valid), memory.context([torch.cat([learns, frozen], 1)], valid)
    torch.testing.assert_close((apart.keys, apart.values), (joined.keys, joined.values))
    apart.keys.sum().backward()
    assert [None if gradient is None else gradient.shape[1] for gradient in shapes] == [None, 1]


def test_where_something_is_seen_decides_what_is_written():
    """Of two lamps the one on the left is lit, or the one on the right: the same embeddings, in other places."""
    memory = RecurrentMemory(2, 32, context_heads=4)
    state, embeddings = memory.initial(1), torch.randn(1, 6, 32)
    exchanged, valid = embeddings[:, [0, 4, 2, 3, 1, 5]], torch.ones(1, 6, dtype=torch.bool)
    left, right = (memory.write(state, memory.context([each], valid)).tokens for each in (embeddings, exchanged))
    assert (left - right).abs().max() > 0.05


def test_every_head_and_slot_begins_with_tokens_of_its_own():
    """An even attention is that of all of them, and what one of many tokens shows is lost in the mean."""
    torch.manual_seed(0)
    memory = RecurrentMemory(4, 96, context_heads=4)
    reader, context = memory.reader, memory.context([torch.randn(8, 32, 96)], torch.ones(8, 32).bool())
    query = reader.query(memory.read(memory.initial(8))).unflatten(-1, (4, -1)).transpose(1, 2)
    weights = (query @ context.keys.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(dim=-1)
    assert weights.amax(dim=-1).mean() > 4 / 32
    assert len(weights.mean(dim=0).argmax(dim=-1).unique()) >= 8
