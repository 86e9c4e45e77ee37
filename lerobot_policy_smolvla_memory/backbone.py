"""The SmolVLM-with-expert forward, written for speed. The weights and, up to rounding, the numbers are LeRobot's.

A prefix is encoded block by block. The tokens of a block see each other and every block before, never one behind,
so keys and values of a block stay as they are when another is appended:

    context   images and language: all K queries of a clip at once
    state     one token
    memory    M tokens, of all queries at once and in one pass with the state, or query after query where the memory
              awaits their output (or, at the start, in one block with the context)

Then the action expert attends to the keys and values of all of them. What makes it fast:

- While nothing before the state learns, no graph is recorded of the context: its tensors need no gradient. It may
  even come from an earlier pass (`Prefix.encoded`). Where vision, connector or text model do learn, or memory stands
  in front, autograd records it as it should.
- Of a block whose output nobody reads, the last layer computes keys and values only.
- Grouped heads: the query heads that share keys are laid out as further queries, so that no key is repeated. A
  block needs no square mask either: all its tokens see the same. Only where state and memory share a pass, it has one.
- The expert's keys and values of the prefix are projected once per query, not once per denoising step.
- Attention is torch's fused one, in the precision of its inputs.

With `checkpoints`, autograd keeps of a layer what goes in and computes the rest anew on the way back: for less memory,
one more forward of all that learns.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import BackwardCFunction, FunctionCtx
from torch.utils.checkpoint import checkpoint

from lerobot_policy_smolvla_memory.memory import RecurrentMemory
from lerobot_policy_smolvla_memory.prefix import Prefix, clip_major

if TYPE_CHECKING:
    from lerobot.policies.smolvla.smolvlm_with_expert import SmolVLMWithExpertModel
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm

ROPE_MAX_WAVELENGTH = 10_000
UNSEEN = torch.finfo(torch.float32).min  # as LeRobot


@dataclass(frozen=True)
class Encoded:
    """What later tokens need of tokens that went through the vision-language model.

    Args:
        keys, values: of each layer, [B, L, G, D]; positions are rotated into the keys.
        bias: [B, L] what attention adds to a token's scores, whoever looks; see `attention_bias`.
        next_position: [B] position of the token that comes next.
    """

    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    bias: Tensor
    next_position: Tensor

    def packed(self) -> Tensor:
        """[B, layers, 2, L, G × D] keys and values."""
        pairs = zip(self.keys, self.values, strict=True)
        return torch.stack([torch.stack(pair, dim=1) for pair in pairs], dim=1).flatten(-2)

    def query(self, number: int, queries: int) -> "Encoded":
        """The rows of query `number` of every clip."""
        return self._map(lambda tensors: tensors[0][number::queries], [self])

    @classmethod
    def interleave(cls, queries: "Sequence[Encoded]") -> "Encoded":
        """One per query, of all clips → the rows of all queries, clip-major."""
        return queries[0] if len(queries) == 1 else cls._map(clip_major, queries)

    @staticmethod
    def _map(function: Callable[[Sequence[Tensor]], Tensor], encoded: "Sequence[Encoded]") -> "Encoded":
        return Encoded(
            [function(layer) for layer in zip(*(each.keys for each in encoded), strict=True)],
            [function(layer) for layer in zip(*(each.values for each in encoded), strict=True)],
            function([each.bias for each in encoded]),
            function([each.next_position for each in encoded]),
        )


@dataclass(frozen=True)
class ExpertPrefix:
    """A prefix as the expert's layers attend to it, for any number of (noise, time) draws.

    Args:
        keys, values: of each expert layer, [B, L, G, D].
        bias: [B, 1, L] of cross-attention: every valid token is seen, the memory more faintly.
        causal_bias: [B, T, L + T] of self-attention: that, and the actions so far.
        rotation: of the actions' positions behind the prefix.
    """

    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    bias: Tensor
    causal_bias: Tensor
    rotation: tuple[Tensor, Tensor]

    @property
    def batch_size(self) -> int:
        return len(self.bias)

    @property
    def device(self) -> torch.device:
        return self.bias.device

    def repeat(self, draws: int) -> Self:
        """Every row `draws` times in a row."""
        if draws == 1:
            return self
        return type(self)(
            [keys.repeat_interleave(draws, dim=0) for keys in self.keys],
            [values.repeat_interleave(draws, dim=0) for values in self.values],
            self.bias.repeat_interleave(draws, dim=0),
            self.causal_bias.repeat_interleave(draws, dim=0),
            (self.rotation[0].repeat_interleave(draws, dim=0), self.rotation[1].repeat_interleave(draws, dim=0)),
        )


class FastForward:
    """LeRobot's `SmolVLMWithExpertModel`, run block by block. Holds no weights of its own.

    Args:
        vlm_with_expert: the model.
        chunk_size: T.
        mem_at_start, mem_at_end: where memory tokens stand in the prefix.
        compile_expert: run the expert's layers through torch.compile.
        checkpoints: keep only the inputs of a layer for the backward pass (Chen et al. 2016, arXiv 1604.06174).
    """

    def __init__(
        self,
        vlm_with_expert: "SmolVLMWithExpertModel",
        *,
        chunk_size: int,
        mem_at_start: bool,
        mem_at_end: bool,
        compile_expert: bool,
        checkpoints: bool,
    ):
        self.model = vlm_with_expert
        self.chunk_size, self.mem_at_start, self.mem_at_end = chunk_size, mem_at_start, mem_at_end
        self.attend, self.checkpoints = attend, checkpoints
        self.attend_prefix: Callable[[ExpertPrefix, Tensor], Tensor] = (
            torch.compile(self._expert) if compile_expert else self._expert
        )

    # ------------------------------------------------------------------ prefix

    def begin(self, prefix: Prefix, queries: int, memory: RecurrentMemory | None = None) -> "Encoding":
        """Start encoding the prefixes of K consecutive queries; see `Encoding`."""
        return Encoding(self, prefix, queries, memory)

    def context(self, prefix: Prefix) -> Encoded:
        """Images and language, which see nothing but each other: through the model, or as they went through it."""
        bias = attention_bias(prefix.valid)
        if prefix.encoded is None:
            return self.append(prefix.context, bias)[1]
        encoded = prefix.encoded.to(prefix.context.dtype)
        longer = prefix.valid.shape[1] - encoded.shape[3]  # by padding alone, or shorter by it
        if longer:
            encoded = F.pad(encoded, (0, 0, 0, longer))
        keys, values = encoded.unflatten(-1, (-1, self._head_dim)).unbind(dim=2)
        return Encoded(keys.unbind(dim=1), values.unbind(dim=1), bias, prefix.valid.sum(dim=1))

    def append(
        self,
        tokens: Tensor,
        bias: Tensor,
        before: Encoded | None = None,
        *,
        first_position: Tensor | int = 0,
        places: int | None = None,
        read: bool = False,
    ) -> tuple[Tensor | None, Encoded]:
        """A block of tokens through the vision-language model.

        Args:
            tokens: [B, N, H] embeddings.
            bias: [B, N] what attention adds to their scores; `UNSEEN` for padding, which takes no position either.
            before: the blocks before; None for the first block.
            first_position: of the first block.
            places: how many of the tokens, from the first on, take one in the count of positions; None is all. What
                comes next stands where it would without the others. Where some take one and some do not, they are two
                blocks in one pass: the former do not see the latter.
            read: whether the output is wanted.

        Returns:
            The model's final-norm output [B, N, H], None where it is not wanted, and the keys and values of the blocks
            before and of this one.
        """
        text_model = self.model.get_vlm_model().text_model
        last = text_model.layers[-1]
        positions, biases = (bias > UNSEEN).cumsum(dim=1), bias
        if before is None:
            positions = positions + first_position
        else:
            positions, biases = positions + before.next_position[:, None], torch.cat([before.bias, bias], dim=1)
        next_position = positions[:, -1] if places is None or before is None else before.next_position + places
        seen = biases[:, None]
        if places:
            seen = seen.repeat(1, tokens.shape[1], 1)
            seen[:, :places, places - tokens.shape[1] :].fill_(UNSEEN)
        rotation = rotation_at(positions - 1, last.self_attn.head_dim)
        hidden = tokens.to(last.self_attn.k_proj.weight.dtype)
        keys, values = list[Tensor](), list[Tensor]()
        for index, layer in enumerate(text_model.layers):
            past = () if before is None else (before.keys[index], before.values[index])
            if layer is last and not read:
                normed = _rms_norm(layer.input_layernorm, hidden)
                key, value = _following(past, _keys_and_values(layer, normed, rotation))
                return None, Encoded([*keys, key], [*values, value], biases, next_position)
            work = partial(self._prefix_layer, layer)
            key, value, hidden = self._kept_for_backward(work, hidden, *rotation, seen, *past)
            keys.append(key)
            values.append(value)
        return _rms_norm(text_model.norm, hidden), Encoded(keys, values, biases, next_position)

    def _prefix_layer(
        self, layer: "LlamaDecoderLayer", hidden: Tensor, cos: Tensor, sin: Tensor, seen: Tensor, *past: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values of a block and those before, and the block's hidden states [B, N, H] after the layer.

        Args:
            seen: [B, N, L + N] the bias of all that each token sees, or [B, 1, L + N] when it is the same for all.
            past: keys and values [B, L, G, D] of the blocks before, where there are any.
        """
        normed = _rms_norm(layer.input_layernorm, hidden)
        key, value = _following(past, _keys_and_values(layer, normed, (cos, sin)))
        query = rotate(_heads(layer, "q_proj", normed), (cos, sin))
        return key, value, _finish_layer(layer, hidden, self.attend(query, key, value, seen))

    def _kept_for_backward[*P, T](self, work: Callable[[*P], T], *inputs: *P) -> T:
        """`work(*inputs)`, of which autograd keeps everything, or the inputs."""
        if not self.checkpoints or not torch.is_grad_enabled():
            return work(*inputs)
        return checkpoint(work, *inputs, use_reentrant=False)

    # ------------------------------------------------------------------ expert

    def expert_prefix(self, encoded: Encoded) -> ExpertPrefix:
        """Once per query: all that the expert's layers need of the prefix."""
        keys, values = [], []
        for index, layer, crosses in self.expert_layers():
            key, value = encoded.keys[index], encoded.values[index]
            if crosses:
                key, value = (
                    _heads(layer, name, each.flatten(2)) for name, each in (("k_proj", key), ("v_proj", value))
                )
            keys.append(key)
            values.append(value)
        bias = encoded.bias[:, None]
        steps = torch.arange(self.chunk_size, device=bias.device)
        causal = attention_bias(steps[:, None] >= steps).expand(len(bias), -1, -1)
        return ExpertPrefix(
            keys,
            values,
            bias,
            torch.cat([bias.expand(-1, self.chunk_size, -1), causal], dim=2),
            rotation_at(encoded.next_position[:, None] + steps, self._head_dim),
        )

    def _expert(self, prefix: ExpertPrefix, hidden: Tensor) -> Tensor:
        """The expert over action embeddings [B, T, H_expert], attending to the prefix: [B, T, H_expert]."""
        hidden = hidden.to(self.model.lm_expert.norm.weight.dtype)
        own_rotation = rotation_at(torch.arange(hidden.shape[1], device=hidden.device)[None], self._head_dim)
        for (_, layer, crosses), key, value in zip(self.expert_layers(), prefix.keys, prefix.values, strict=True):
            seen = (*own_rotation, prefix.bias) if crosses else (*prefix.rotation, prefix.causal_bias)
            work = partial(self._expert_layer, layer, crosses)
            hidden = self._kept_for_backward(work, hidden, key, value, *seen)
        return _rms_norm(self.model.lm_expert.norm, hidden)

    def _expert_layer(
        self,
        layer: "LlamaDecoderLayer",
        crosses: bool,
        hidden: Tensor,
        key: Tensor,
        value: Tensor,
        cos: Tensor,
        sin: Tensor,
        bias: Tensor,
    ) -> Tensor:
        """Hidden states [B, T, H_expert] after a layer that attends across to the prefix alone, or to both."""
        normed = _rms_norm(layer.input_layernorm, hidden)
        query = rotate(_heads(layer, "q_proj", normed), (cos, sin))
        if not crosses:  # where it does, positions count from 0, and the keys come as the prefix left them
            key, value = _following((key, value), _keys_and_values(layer, normed, (cos, sin)))  # in the wider type
        return _finish_layer(layer, hidden, self.attend(query, key, value, bias))

    def expert_layers(self) -> Iterator[tuple[int, "LlamaDecoderLayer", bool]]:
        """(index of the VLM's layer it reads, expert layer, whether it attends across to the prefix alone)."""
        model = self.model
        every = max(model.num_vlm_layers // model.num_expert_layers, 1)
        for number, layer in enumerate(model.lm_expert.layers[: model.num_vlm_layers]):
            index = number * every
            own = model.self_attn_every_n_layers > 0 and index % model.self_attn_every_n_layers == 0
            yield index, layer, "cross" in model.attention_mode and not own

    @property
    def _head_dim(self) -> int:
        return self.model.vlm.config.text_config.head_dim


class Encoding:
    """The prefixes of K consecutive queries, while memory passes from one to the next.

    `query` is called for 0, 1, … K − 1 with the memory's tokens; `finish` gives what the expert attends to.
    Without memory only `finish` is called.
    """

    def __init__(self, forward: FastForward, prefix: Prefix, queries: int, memory: RecurrentMemory | None):
        self.forward, self.prefix, self.queries, self.memory = forward, prefix, queries, memory
        self.remembered: list[Encoded] = []  # per query: all blocks, the memory's among them
        self.state_goes_with_memory = memory is not None and not memory.awaits_backbone
        self.shared = None if forward.mem_at_start else self._without_memory()

    def _without_memory(self) -> Encoded:
        """What does not depend on memory, of all queries at once: the context, and the state where it goes alone."""
        context = self.forward.context(self.prefix)
        return context if self.state_goes_with_memory else self._with_state(context, self.prefix.state)

    def _with_state(self, before: Encoded, state: Tensor) -> Encoded:
        return self.forward.append(state, _unbiased(state), before)[1]

    def query(self, number: int, tokens: Tensor) -> Tensor | None:
        """Memory tokens [clips, M, H] through the model in query `number`: their output, where the memory awaits it."""
        assert self.memory is not None
        forward, awaited = self.forward, self.memory.awaits_backbone
        bias = self.memory.key_bias.expand(tokens.shape[:2])
        if self.shared is not None:
            before, places = self.shared.query(number, self.queries), 0
            if self.state_goes_with_memory:
                state = self.prefix.state[number :: self.queries]
                tokens, bias = torch.cat([state, tokens], dim=1), torch.cat([_unbiased(state), bias], dim=1)
                places = state.shape[1]
            output, blocks = forward.append(tokens, bias, before, places=places, read=awaited)
            self.remembered.append(blocks)
            return output
        prefix = self.prefix.query(number, self.queries)
        block = torch.cat([tokens.to(prefix.context.dtype), prefix.context], dim=1)
        biases = torch.cat([bias, attention_bias(prefix.valid)], dim=1)
        first_position, ends = self.memory.first_position, forward.mem_at_end
        output, blocks = forward.append(block, biases, first_position=first_position, read=awaited and not ends)
        blocks = self._with_state(blocks, prefix.state)
        if ends:
            output, blocks = forward.append(tokens, bias, blocks, places=0, read=awaited)
        self.remembered.append(blocks)
        return None if output is None else output[:, : tokens.shape[1]]

    def finish(self) -> ExpertPrefix:
        if not self.remembered:
            return self.forward.expert_prefix(self._without_memory() if self.shared is None else self.shared)
        return self.forward.expert_prefix(Encoded.interleave(self.remembered))


def attention_bias(sees: Tensor) -> Tensor:
    """What attention adds to its scores: 0 where a token is seen, else `UNSEEN`."""
    return torch.zeros(sees.shape, device=sees.device).masked_fill_(~sees, UNSEEN)


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """Grouped-query attention.

    Args:
        query: [B, N, heads, D]. The heads of a group are neighbours.
        key, value: [B, L, G, D].
        bias: [B, N, L] what is added to the scores, or [B, 1, L] when it is the same for all queries.

    Returns:
        [B, N, heads × D].
    """
    B, N, heads, D = query.shape
    G = key.shape[2]
    group = heads // G
    query = query.view(B, N, G, group, D).permute(0, 2, 3, 1, 4).reshape(B, G, group * N, D)
    if bias.shape[1] > 1 and group > 1:
        bias = bias.repeat(1, group, 1)
    key, value = (each.transpose(1, 2).to(query.dtype) for each in (key, value))
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=bias[:, None].to(query.dtype))
    return attended.view(B, G, group, N, D).permute(0, 3, 1, 2, 4).reshape(B, N, heads * D)


def rotation_at(positions: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosine and signed sine [B, N, 1, D] of rotary positions [B, N], float32 (Su et al. 2021, arXiv 2104.09864)."""
    exponents = torch.arange(head_dim // 2, dtype=torch.float32, device=positions.device) * (2.0 / head_dim)
    radians = positions[..., None, None].float() / ROPE_MAX_WAVELENGTH**exponents
    cos, sin = radians.cos(), radians.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(heads: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Positions into queries or keys [B, N, heads, D], computed in float32."""
    return _Rotation.apply(heads, *rotation)


class _Rotation(torch.autograd.Function):
    """One node of the graph instead of three: the gradient of a rotation is the rotation back."""

    @staticmethod
    def forward(ctx: FunctionCtx, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(heads, cos, sin, forth=1)

    @staticmethod
    def backward(ctx: BackwardCFunction, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors  # type: ignore[misc] # torch's stub knows of one tensor only
        return _turn(gradient, cos, sin, forth=-1), None, None


def _turn(heads: Tensor, cos: Tensor, sin: Tensor, *, forth: int) -> Tensor:
    """The two halves of a head are the coordinates; `forth` is -1 for the way back."""
    halves_exchanged = heads.float().roll(heads.shape[-1] // 2, dims=-1)
    return torch.addcmul(heads * cos, halves_exchanged, sin, value=forth).to(heads.dtype)


def _heads(layer: "LlamaDecoderLayer", projection: str, hidden: Tensor) -> Tensor:
    """[B, N, H] projected and split: [B, N, heads, D]."""
    linear = getattr(layer.self_attn, projection)
    return linear(hidden.to(linear.weight.dtype)).unflatten(-1, (-1, layer.self_attn.head_dim))


def _keys_and_values(
    layer: "LlamaDecoderLayer", normed: Tensor, rotation: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """[B, N, G, D] each, of the layer's normed inputs [B, N, H]."""
    return rotate(_heads(layer, "k_proj", normed), rotation), _heads(layer, "v_proj", normed)


def _following(past: Sequence[Tensor], own: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Keys and values [B, L + N, G, D]: those of the blocks before, if there are any, then a block's own."""
    key, value = (torch.cat(pair, dim=1) for pair in zip(past, own, strict=True)) if past else own
    return key, value


def _finish_layer(layer: "LlamaDecoderLayer", hidden: Tensor, attended: Tensor) -> Tensor:
    """What follows attention: output projection and feed-forward, each added to the residual stream."""
    hidden = hidden + layer.self_attn.o_proj(attended.to(layer.self_attn.o_proj.weight.dtype))
    return hidden + layer.mlp(_rms_norm(layer.post_attention_layernorm, hidden))


def _rms_norm(norm: "LlamaRMSNorm", hidden: Tensor) -> Tensor:
    """transformers' RMSNorm in one operation."""
    return F.rms_norm(hidden, hidden.shape[-1:], norm.weight.to(hidden.dtype), norm.variance_epsilon)


def _unbiased(tokens: Tensor) -> Tensor:
    """[B, N, H] → [B, N] zeros."""
    return torch.zeros(tokens.shape[:2], device=tokens.device)
