"""LeRobot's own forward with memory tokens in its prefix: the reference that the fast one is held against.

Every query is one pass over the whole prefix, memory included, with LeRobot's masks and positions. Slow and plain;
`fast_forward: false` switches to it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Self

import torch
import torch.nn.functional as F
from lerobot.policies.common.vla_utils import make_att_2d_masks
from lerobot.policies.smolvla.modeling_smolvla import pad_tensor
from lerobot.policies.smolvla.smolvlm_with_expert import SmolVLMWithExpertModel
from torch import Tensor
from transformers import DynamicCache

from lerobot_policy_smolvla_memory.memory import RecurrentMemory
from lerobot_policy_smolvla_memory.prefix import Prefix, clip_major


@dataclass(frozen=True)
class PrefixTokens:
    """The prefix as LeRobot's model takes it.

    Args:
        embeddings: [B, L, H].
        valid: [B, L] bool; false for padding.
        blocks: [B, L] bool; true where a block begins that earlier tokens cannot see.
        bias: [B, L] what attention adds to a token's scores: 0 but for the memory.
        positions: [B, L] position ids.
        next_position: [B] the position of the first action token.
    """

    embeddings: Tensor
    valid: Tensor
    blocks: Tensor
    bias: Tensor
    positions: Tensor
    next_position: Tensor

    @classmethod
    def counted(cls, embeddings: Tensor, valid: Tensor, blocks: Tensor) -> Self:
        """Positions as LeRobot counts them: one per valid token, then the actions."""
        bias = torch.zeros(valid.shape, device=valid.device)
        return cls(embeddings, valid, blocks, bias, valid.cumsum(dim=1) - 1, valid.sum(dim=1))

    @classmethod
    def of(cls, prefix: Prefix, *, length: int) -> Self:
        """Images, language and state, padded on the right up to `length`."""
        embeddings = torch.cat([prefix.context, prefix.state.to(prefix.context.dtype)], dim=1)
        valid = torch.cat([prefix.valid, prefix.valid.new_ones(len(prefix.valid), 1)], dim=1)
        blocks = torch.zeros_like(valid)
        blocks[:, -1] = True
        if valid.shape[1] < length:
            embeddings, valid, blocks = (pad_tensor(each, length, pad_value=0) for each in (embeddings, valid, blocks))
        return cls.counted(embeddings, valid, blocks)

    def with_memory_at_start(self, memory: Tensor, key_bias: Tensor, first_position: Tensor) -> Self:
        """Memory tokens [B, M, H] in front, in one attention block with images and language.

        They count from `first_position` on: from −M they move no other token's position.
        """
        size = memory.shape[1]
        valid, blocks = _flags(self.valid, size)
        positions = (first_position + torch.arange(size, device=memory.device)).expand(len(memory), -1)
        moved = first_position + size
        return type(self)(
            torch.cat([memory.to(self.embeddings.dtype), self.embeddings], dim=1),
            torch.cat([valid, self.valid], dim=1),
            torch.cat([blocks, self.blocks], dim=1),
            torch.cat([key_bias.expand(valid.shape), self.bias], dim=1),
            torch.cat([positions, self.positions + moved], dim=1),
            self.next_position + moved,
        )

    def with_memory_at_end(self, memory: Tensor, key_bias: Tensor) -> Self:
        """Memory tokens [B, M, H] behind, as a block of their own that nothing before can see.

        They stand behind any padding, so their places do not depend on it. Their positions count on from the
        last valid token. So do the actions': a memory at the end moves no other token's position.
        """
        size = memory.shape[1]
        valid, blocks = _flags(self.valid, size)
        blocks[:, 0] = True
        positions = self.next_position[:, None] + torch.arange(size, device=memory.device)
        return type(self)(
            torch.cat([self.embeddings, memory.to(self.embeddings.dtype)], dim=1),
            torch.cat([self.valid, valid], dim=1),
            torch.cat([self.blocks, blocks], dim=1),
            torch.cat([self.bias, key_bias.expand(valid.shape)], dim=1),
            torch.cat([self.positions, positions], dim=1),
            self.next_position,
        )


@dataclass(frozen=True)
class CachedPrefix:
    """What the action expert attends to.

    Args:
        cache: keys and values of each layer, [B, heads, L, D], positions already rotated in.
        valid: [B, L] bool.
        bias: [B, L] what attention adds to a token's scores: 0 but for the memory.
        next_position: [B] the position of the first action token.
    """

    cache: DynamicCache
    valid: Tensor
    bias: Tensor
    next_position: Tensor

    @property
    def batch_size(self) -> int:
        return len(self.valid)

    @property
    def device(self) -> torch.device:
        return self.valid.device

    def repeat(self, draws: int) -> "CachedPrefix":
        """Every row `draws` times in a row."""
        return self._rebuilt([self], lambda tensors: tensors[0].repeat_interleave(draws, dim=0))

    @classmethod
    def interleave(cls, queries: "Sequence[CachedPrefix]") -> "CachedPrefix":
        """One per query, of all clips → the rows of all queries, clip-major."""
        return cls._rebuilt(queries, clip_major)

    @classmethod
    def _rebuilt(
        cls, prefixes: "Sequence[CachedPrefix]", function: Callable[[Sequence[Tensor]], Tensor]
    ) -> "CachedPrefix":
        cache = DynamicCache()
        for index, layers in enumerate(zip(*(prefix.cache.layers for prefix in prefixes), strict=True)):
            cache.update(
                function([layer.keys for layer in layers]), function([layer.values for layer in layers]), index
            )
        rest = (function([getattr(prefix, field.name) for prefix in prefixes]) for field in fields(cls)[1:])
        return cls(cache, *rest)


@contextmanager
def biased_attention(model: SmolVLMWithExpertModel, bias: Tensor) -> Iterator[None]:
    """Let LeRobot's attention add `bias` [B, L] to the scores of the first L keys, whoever looks at them.

    LeRobot's attention knows masks only. So the bias is a further channel of the keys, which every query reads
    with weight 1; where it is 0 all along, attention is LeRobot's untouched.
    """
    if not bias.any():
        yield
        return
    eager = model.eager_attention_forward

    def attention(mask: Tensor, batch: int, size: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scale = (size + 1) ** 0.5  # that `eager` divides the scores by
        channel = F.pad(bias * scale, (0, key.shape[1] - bias.shape[1]))[:, :, None, None]
        query = F.pad(query.float() * (scale / size**0.5), (0, 1), value=1.0)
        key = torch.cat([key.float(), channel.expand(-1, -1, key.shape[2], -1)], dim=-1)
        attended = eager(mask, batch, size + 1, query, key, F.pad(value, (0, 1)))
        return attended.unflatten(-1, (-1, size + 1))[..., :size].flatten(-2)

    model.get_attention_interface = lambda: attention
    try:
        yield
    finally:
        del model.get_attention_interface


def _flags(like: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """`valid` and `blocks` [B, size] of memory tokens that belong to the block before them."""
    return like.new_ones(len(like), size), like.new_zeros(len(like), size)


class LeRobotForward:
    """LeRobot's `SmolVLMWithExpertModel.forward`, prefix first and then the expert.

    Args:
        vlm_with_expert: the model.
        prefix_length: pad the prefix up to it, without memory.
        mem_at_start, mem_at_end: where memory tokens stand in the prefix.
    """

    def __init__(
        self, vlm_with_expert: SmolVLMWithExpertModel, *, prefix_length: int, mem_at_start: bool, mem_at_end: bool
    ):
        self.model = vlm_with_expert
        self.prefix_length, self.mem_at_start, self.mem_at_end = prefix_length, mem_at_start, mem_at_end

    def begin(self, prefix: Prefix, queries: int, memory: RecurrentMemory | None = None) -> "LeRobotEncoding":
        return LeRobotEncoding(self, prefix, queries, memory)

    def prefill(self, tokens: PrefixTokens) -> tuple[Tensor, CachedPrefix]:
        """Final-norm output [B, L, H], and what the expert attends to."""
        with biased_attention(self.model, tokens.bias):
            (output, _), cache = self.model.forward(
                attention_mask=make_att_2d_masks(tokens.valid, tokens.blocks),
                position_ids=tokens.positions,
                past_key_values=None,
                inputs_embeds=[tokens.embeddings, None],
                use_cache=True,
            )
        return output, CachedPrefix(cache, tokens.valid, tokens.bias, tokens.next_position)

    def attend_prefix(self, prefix: CachedPrefix, hidden: Tensor) -> Tensor:
        """The expert over action embeddings [B, T, H_expert]: [B, T, H_expert].

        As LeRobot's `denoise_step`, which counts the actions' positions from the length of the prefix and
        would thus shift them by the memory at the end.
        """
        valid = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        sees_prefix = prefix.valid[:, None, :].expand(-1, valid.shape[1], -1)
        with biased_attention(self.model, prefix.bias):
            (_, output), _ = self.model.forward(
                attention_mask=torch.cat([sees_prefix, make_att_2d_masks(valid, valid)], dim=2),
                position_ids=prefix.next_position[:, None] + valid.cumsum(dim=1) - 1,
                past_key_values=prefix.cache,
                inputs_embeds=[None, hidden],
                use_cache=True,
            )
        prefix.cache.crop(prefix.valid.shape[1])  # self-attention layers have appended the actions
        return output


class LeRobotEncoding:
    """As `backbone.Encoding`, one whole pass per query."""

    def __init__(self, forward: LeRobotForward, prefix: Prefix, queries: int, memory: RecurrentMemory | None):
        self.forward, self.prefix, self.queries, self.memory = forward, prefix, queries, memory
        self.encoded: list[CachedPrefix] = []

    def query(self, number: int, tokens: Tensor) -> Tensor:
        """Memory tokens [clips, M, H] through the model in query `number`: their output [clips, M, H]."""
        assert self.memory is not None
        bias, places = self.memory.key_bias, slice(0, tokens.shape[1])
        prefix = PrefixTokens.of(self.prefix.query(number, self.queries), length=self.forward.prefix_length)
        if self.forward.mem_at_start:
            prefix = prefix.with_memory_at_start(tokens, bias, self.memory.first_position)
        if self.forward.mem_at_end:
            places = slice(prefix.valid.shape[1], None)
            prefix = prefix.with_memory_at_end(tokens, bias)
        output, encoded = self.forward.prefill(prefix)
        self.encoded.append(encoded)
        return output[:, places]

    def finish(self) -> CachedPrefix:
        if not self.encoded:
            return self.forward.prefill(PrefixTokens.of(self.prefix, length=self.forward.prefix_length))[1]
        return CachedPrefix.interleave(self.encoded)
