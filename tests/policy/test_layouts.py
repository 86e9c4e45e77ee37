"""Where the memory stands in the prefix, who sees it, and what it leaves alone."""

from dataclasses import replace

import pytest
import torch
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from policy_variants import LAYOUTS, both_forwards, every_layout
from tiny_sizes import CHUNK, PREFIX_LENGTH

from lerobot_policy_smolvla_memory.lerobot_forward import PrefixTokens
from lerobot_policy_smolvla_memory.memory import MemoryState
from lerobot_policy_smolvla_memory.prefix import Prefix

# Who sees whom. Columns: what is seen; 1 sees, 0 does not. M memory, I image, L language, P padding, S state,
# A an action token, W the written memory. Nobody looks at what padding sees.
SEES = {
    "start": """
          M M I L P S
        M 1 1 1 1 0 0
        M 1 1 1 1 0 0
        I 1 1 1 1 0 0
        L 1 1 1 1 0 0
        S 1 1 1 1 0 1
        A 1 1 1 1 0 1
        W 1 1 1 1 0 1
    """,
    "both": """
          M M I L P S
        M 1 1 1 1 0 0
        M 1 1 1 1 0 0
        I 1 1 1 1 0 0
        L 1 1 1 1 0 0
        S 1 1 1 1 0 1
        M 1 1 1 1 0 1
        M 1 1 1 1 0 1
        A 1 1 1 1 0 1
        W 1 1 1 1 0 1
    """,
    "end": """
          M M I L P S
        I 0 0 1 1 0 0
        L 0 0 1 1 0 0
        S 0 0 1 1 0 1
        M 1 1 1 1 0 1
        M 1 1 1 1 0 1
        A 1 1 1 1 0 1
        W 1 1 1 1 0 1
    """,
}
PLACES = {"start": "MMILPS", "both": "MMILPSMM", "end": "ILPSMM"}


@both_forwards
@every_layout
def test_every_token_sees_what_the_table_says(make_policy, layout, fast_forward):
    """Measured by gradients through the whole model, not read off a mask: what is not seen has none."""
    model = make_policy(fast_forward=fast_forward, **LAYOUTS[layout]).model
    hidden = model.state_proj.out_features
    torch.manual_seed(0)
    embeddings = torch.randn(1, 4, hidden, requires_grad=True)  # I L P S
    memory = torch.randn(1, 2, hidden, requires_grad=True)
    prefix = Prefix(embeddings[:, :3], torch.tensor([[True, True, False]]), embeddings[:, 3:])
    encoded, written, _ = model.encode(prefix, MemoryState(memory))
    outputs = [(name, _keys(encoded)[-1][:, place]) for place, name in enumerate(PLACES[layout])]
    outputs += [("A", model.velocity(encoded, torch.randn(1, CHUNK, 8), torch.tensor([0.5])))]
    outputs += [("W", written.tokens)]

    rows = []
    for name, output in outputs:
        if name == "P":
            continue
        weights = torch.randn(output.shape)  # against sums that cancel
        gradients = torch.autograd.grad(
            (output * weights).sum(), [memory, embeddings], retain_graph=True, allow_unused=True
        )
        seen = [
            torch.zeros(length) if gradient is None else gradient.abs().sum((0, 2))
            for gradient, length in zip(gradients, (2, 4), strict=True)
        ]
        rows.append([name, *("1" if value > 0 else "0" for value in torch.cat(seen))])
    assert rows == [line.split() for line in SEES[layout].strip().splitlines()[1:]]


def test_memory_moves_no_other_position_and_padding_takes_none():
    prefix = PrefixTokens.counted(
        torch.zeros(1, 4, 3),
        torch.tensor([[True, True, False, True]]),
        torch.tensor([[False, False, False, True]]),
    )
    memory, bias = torch.zeros(1, 2, 3), torch.tensor(-3.0)
    start = prefix.with_memory_at_start(memory, bias, torch.tensor(-2))
    both = start.with_memory_at_end(memory, bias)
    end = prefix.with_memory_at_end(memory, bias)
    assert start.positions[start.valid].tolist() == [-2, -1, 0, 1, 2]
    assert both.positions[both.valid].tolist() == [-2, -1, 0, 1, 2, 3, 4]
    assert end.positions[end.valid].tolist() == [0, 1, 2, 3, 4]
    assert [layout.next_position.item() for layout in (prefix, start, both, end)] == [3, 3, 3, 3]


@both_forwards
@every_layout
def test_a_memory_that_nobody_hears_changes_nothing(make_policy, make_batch, make_noise, layout, fast_forward):
    """Neither attention nor positions: what a trained policy does before its new memory has learnt anything."""
    policies = [make_policy(fast_forward=fast_forward, num_mem_tokens=0)]
    for weight in (1e-12, 0.1, 2):
        policies.append(make_policy(fast_forward=fast_forward, **LAYOUTS[layout]))
        policies[-1].model.memory.weigh_as(weight)
        policies[-1].load_state_dict(policies[0].state_dict(), strict=False)
    without, unheard, faint, loud = (
        policy.eval()(make_batch(4), **make_noise(4), reduction="none")[0].detach() for policy in policies
    )
    torch.testing.assert_close(unheard, without)
    assert (faint - without).abs().mean() < 0.2 * (loud - without).abs().mean()


def test_end_layout_leaves_the_context_bit_identical_and_the_state_up_to_rounding(make_policy, make_batch):
    """The state goes through the model in one pass with the memory, which rounds otherwise than a pass of its own."""
    policies = [make_policy(num_mem_tokens=tokens) for tokens in (2, 0)]
    policies[1].load_state_dict(policies[0].state_dict(), strict=False)
    with_memory, without = (_keys(policy.encode(make_batch(3))[0]) for policy in policies)
    for keys, plain in zip(with_memory, without, strict=True):
        assert torch.equal(keys[:, : PREFIX_LENGTH - 1], plain[:, :-1])  # keys carry their positions
        torch.testing.assert_close(keys[:, PREFIX_LENGTH - 1], plain[:, -1])
        assert keys.shape[1] == PREFIX_LENGTH + 2


@pytest.mark.parametrize("reads_context", [True, False], ids=["reads the context", "awaits the model's output"])
def test_no_value_of_the_memory_changes_a_bit_before_it(make_policy, make_batch, reads_context):
    policy = make_policy(mem_reads_context=reads_context)
    states = [policy.model.memory.initial(3)]
    states += [replace(states[0], tokens=factor * torch.randn_like(states[0].tokens)) for factor in (1, 1e3)]
    first, *others = (_keys(policy.encode(make_batch(3), state)[0]) for state in states)
    for other in others:
        for keys, plain in zip(other, first, strict=True):
            assert torch.equal(keys[:, :PREFIX_LENGTH], plain[:, :PREFIX_LENGTH])
            assert keys.shape[1] == PREFIX_LENGTH + 2


def _keys(encoded) -> list[torch.Tensor]:
    """Of each layer [B, L, heads, D]."""
    return getattr(encoded, "keys", None) or [layer.keys.transpose(1, 2) for layer in encoded.cache.layers]


def test_end_layout_leaves_the_positions_of_the_actions(make_config, make_policy, make_batch, monkeypatch):
    """Compared with those that LeRobot's own policy hands to the backbone."""
    config = make_config(fast_forward=False)
    lerobots = SmolVLAPolicy(
        SmolVLAConfig(**{name: getattr(config, name) for name in SmolVLAConfig.__dataclass_fields__})
    )
    seen = []
    for policy in (make_policy(fast_forward=False), lerobots):
        positions, backbone = [], policy.model.vlm_with_expert
        forward = backbone.forward

        def record(*, position_ids, inputs_embeds, forward=forward, positions=positions, **kwargs):
            if inputs_embeds[0] is None:
                positions.append(position_ids)
            return forward(position_ids=position_ids, inputs_embeds=inputs_embeds, **kwargs)

        monkeypatch.setattr(backbone, "forward", record)
        policy.select_action(make_batch(3))
        seen.append(torch.stack(positions))
    assert torch.equal(*seen)


@both_forwards
@every_layout
def test_padding_to_a_fixed_prefix_length_changes_nothing(make_policy, make_batch, make_noise, layout, fast_forward):
    batch, results = make_batch(4), []
    for prefix_length in (-1, PREFIX_LENGTH + 3):
        policy = make_policy(prefix_length=prefix_length, fast_forward=fast_forward, **LAYOUTS[layout])
        loss, output = policy(dict(batch), **make_noise(4), queries=2, reduction="none")
        results.append((loss, output["memory"].tokens))
    for tight, padded in zip(*results, strict=True):
        torch.testing.assert_close(tight, padded)


def test_padded_language_is_not_seen_by_the_memory(make_policy, make_batch, make_noise):
    policy, batch = make_policy(), make_batch(2)
    padding = ~batch["observation.language.attention_mask"]
    written = []
    for token in (8, 99):
        batch["observation.language.tokens"][padding] = token
        written.append(policy(dict(batch), **make_noise(2))[1]["memory"].tokens)
    assert torch.equal(*written)
