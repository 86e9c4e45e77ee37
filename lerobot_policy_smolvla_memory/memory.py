"""The memory alone: tensors in, tensors out. It knows nothing of SmolVLA.

Once per policy query, `read` turns the carried state into the embeddings of M memory tokens, which stand in the
vision-language model's prefix, and `write` turns what the tokens find among the embeddings of that query into the next
state:

    state = memory.initial(batch_size)
    contexts = memory.context(blocks, valid).queries(K)     # computed for all queries at once
    for each query of an episode:
        tokens = memory.read(state)                         # into the prefix
        state = memory.write(state, contexts[number])

So nothing that recurs waits for the vision-language model, which then takes all queries at once. Without a context of
its own a memory `awaits_backbone`, query after query, and writes the model's output at its places:

        output = backbone(..., tokens)
        state = memory.write(state, output=output)

This is the recurrent memory transformer (Bulatov et al. 2022, arXiv 2207.06881) with two things that make it
learn inside a pretrained model: both ends of the loop are normalised, so that an initial std of 0.02 and a
final norm's output arrive in the prefix at one and the same scale; and a gate (Cho et al. 2014) lets a memory
outlast the queries that have nothing to add.

Behind the M tokens that recur, or instead of them, stand those of past frames (frames.py): nothing is written there
but what a query saw.

Letters: B batch, M memory tokens that recur, H hidden size, P tokens of the context, Q past states in the cache,
n frames of p tokens.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lerobot_policy_smolvla_memory.frames import PastFrames

INITIAL_STD = 0.02
INITIAL_WRITE_GATE = 0.1  # share of the new in the first writes; a memory then lasts about ten queries
SLOT_STD = 0.3  # keeps tokens of like content distinct without drowning the contents (RMS 1)
CACHE_KEY_SIZE = 64
HEAD_WIDTH = 256
READER_GAIN = 2.0  # of queries and of keys, over torch's first weights: the first scores have a deviation of about 2
LONGEST_PLACE = 10000.0  # of places the longest wave, divided by 2π
RMS_EPS = 1e-6


@dataclass(frozen=True)
class MemoryState:
    """What is carried from one query to the next, for B batch elements. Always float32.

    Args:
        tokens: [B, M, H].
        cache: [B, Q, M, H] the states before this one, newest first, or None when no cache is kept.
        cache_length: [B] how many of the Q are filled.
        frames: [B, n, p, H] what past queries saw, or None when no frames are kept.
        queries: [B] how many queries there have been, which says which of them the frames are of.
    """

    tokens: Tensor
    cache: Tensor | None = None
    cache_length: Tensor | None = None
    frames: Tensor | None = None
    queries: Tensor | None = None

    @property
    def batch_size(self) -> int:
        return self.tokens.shape[0]

    @property
    def device(self) -> torch.device:
        return self.tokens.device

    @property
    def vectors(self) -> Tensor:
        """[B, M + n, H] all that is held, at one scale: the tokens, and of each frame the mean; 0 for an empty slot."""
        if self.frames is None:
            return self.tokens
        return torch.cat([self.tokens, _rms_norm(self.frames.mean(dim=2))], dim=1)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors()}

    def tensors(self) -> list[tuple[str, Tensor]]:
        """All that is carried, by name."""
        values = [(field.name, getattr(self, field.name)) for field in fields(self)]
        return [(name, value) for name, value in values if value is not None]

    def detach(self) -> Self:
        """The same values, with no gradient to where they came from."""
        return self._each(lambda tensor: tensor.detach())

    def clone(self) -> Self:
        """A copy that shares no storage."""
        return self._each(lambda tensor: tensor.clone())

    def contiguous(self) -> Self:
        """The same values, laid out as what later queries leave."""
        return self._each(lambda tensor: tensor.contiguous())

    def to(self, device: torch.device | str) -> Self:
        return self._each(lambda tensor: tensor.to(device))

    def select(self, indices: Tensor | list[int]) -> Self:
        """The states of some batch elements, in the order of `indices`."""
        index = torch.as_tensor(indices, dtype=torch.long, device=self.device)
        return self._each(lambda tensor: tensor[index])

    @classmethod
    def joined(cls, states: Sequence[Self]) -> Self:
        """The elements of all states as one batch."""
        names = [name for name, _ in states[0].tensors()]
        return replace(states[0], **{name: torch.cat([getattr(state, name) for state in states]) for name in names})

    def where(self, mask: Tensor, other: "MemoryState") -> Self:
        """`other` for the elements where `mask` [B] is true, this state for the rest."""
        pairs = {
            name: torch.where(mask.view(-1, *[1] * (mine.dim() - 1)), getattr(other, name), mine)
            for name, mine in self.tensors()
        }
        return replace(self, **pairs)

    def put(self, indices: Tensor | list[int], other: "MemoryState") -> Self:
        """This state with the elements `indices` taken from `other`, whose batch size is len(indices)."""
        index = torch.as_tensor(indices, dtype=torch.long, device=self.device)
        return replace(self, **{name: mine.index_copy(0, index, getattr(other, name)) for name, mine in self.tensors()})

    def _each(self, function: Callable[[Tensor], Tensor]) -> Self:
        return replace(self, **{name: function(value) for name, value in self.tensors()})


@dataclass(frozen=True)
class Context:
    """What the memory tokens may attend to in a query, beside the backbone.

    Args:
        keys, values: [B, heads, P, H / heads].
        bias: [B, 1, 1, P] what attention adds to a token's scores: 0, or minus infinity where there is none.
    """

    keys: Tensor
    values: Tensor
    bias: Tensor

    def queries(self, count: int) -> list[Self]:
        """Of `count` consecutive queries of each stream, in whose order the rows are: the rows of each query."""
        of_each = (getattr(self, field.name).unflatten(0, (-1, count)).unbind(1) for field in fields(self))
        return [type(self)(*rows) for rows in zip(*of_each, strict=True)]


class RecurrentMemory(nn.Module):
    """M memory tokens of width H: where they start, how they are read, how they are written; and past frames.

    Two numbers say how all of them stand among the other tokens: `key_bias` is added to their scores in attention,
    whoever looks at them, and in front of the prefix they count from `first_position`, minus their number, so that they
    move no other token's position. Both are kept with the weights, which have grown used to them.

    Args:
        num_tokens: M; 0 with `frames` alone, and then whatever is said of the M has no meaning.
        hidden_size: H of the vision-language model.
        init: "normal" (std 0.02), "zeros", or "embedding" (needs `embedding`).
        update: "overwrite" or "gated".
        cache_size: Q past states that reading may look back at; 0 keeps none.
        context_heads: with how many heads writing attends to the context itself; 0: it does not.
        predicts: [T, A], the actions that `head` predicts; None makes no head.
        frames: of past queries, which are kept and read besides; None keeps none.
        embedding: [H], the start of every token for init "embedding".
    """

    key_bias: Tensor
    first_position: Tensor

    def __init__(
        self,
        num_tokens: int,
        hidden_size: int,
        *,
        init: str = "normal",
        update: str = "gated",
        cache_size: int = 0,
        context_heads: int = 0,
        predicts: tuple[int, int] | None = None,
        frames: PastFrames | None = None,
        embedding: Tensor | None = None,
    ):
        super().__init__()
        self.init, self.hidden_size = init, hidden_size
        self.frames = frames
        self.size = num_tokens + (0 if frames is None else frames.size)
        self.register_buffer("key_bias", torch.tensor(0.0))
        self.register_buffer("first_position", torch.tensor(-self.size))
        self.look_back = self.reader = self.head = None
        self.recurs = num_tokens > 0
        if not self.recurs:
            return
        self.mem_tokens = nn.Parameter(torch.empty(num_tokens, 1, hidden_size))
        self.initialize_tokens(embedding)
        self.slots = nn.Parameter(torch.randn(num_tokens, hidden_size) * SLOT_STD)
        self.read_norm = nn.RMSNorm(hidden_size, eps=RMS_EPS)
        self.update = {"overwrite": OverwriteUpdate, "gated": GatedUpdate}[update](hidden_size)
        self.look_back = LookBack(cache_size, hidden_size) if cache_size else None
        self.reader = ContextReader(hidden_size, context_heads) if context_heads else None
        self.head = ActionHead(num_tokens, hidden_size, *predicts) if predicts else None

    @torch.no_grad()
    def initialize_tokens(self, embedding: Tensor | None = None) -> None:
        """Set the initial tokens as `init` says. `embedding` [H] is needed by "embedding" only."""
        if not self.recurs:
            return
        if self.init == "normal":
            self.mem_tokens.normal_(std=INITIAL_STD)
        elif self.init == "zeros":
            self.mem_tokens.zero_()
        elif embedding is None:
            raise ValueError("mem_init 'embedding' needs the embedding to start from, got None")
        else:
            self.mem_tokens.copy_(embedding.expand_as(self.mem_tokens))

    def weigh_as(self, tokens: float) -> None:
        """Let all tokens together weigh as much in attention as so many others that score alike; no more than all."""
        self.key_bias.fill_(math.log(min(1.0, tokens / self.size)))

    def grow(self, factor: float) -> None:
        """Let each token weigh `factor` times as much, until it weighs as much as any other that scores alike."""
        self.key_bias = (self.key_bias + math.log(factor)).clamp(max=0.0)  # in place, it would spoil a graph in use

    def initial(self, batch_size: int) -> MemoryState:
        """The memory at the start of an episode, for B elements."""
        if self.recurs:
            tokens = self.mem_tokens.transpose(0, 1).expand(batch_size, -1, -1)
        else:
            tokens = self.key_bias.new_zeros(batch_size, 0, self.hidden_size)
        past = (None, None) if self.look_back is None else self.look_back.empty(tokens)
        return MemoryState(tokens, *past, *(() if self.frames is None else self.frames.empty(batch_size)))

    def read(self, state: MemoryState) -> Tensor:
        """Embeddings [B, M + n · p, H] of the memory tokens, float32: those that recur, then the frames'.

        Their RMS is about 1: between the embeddings of language and state (0.35 in a small trained SmolVLA)
        and of images (8), and the scale at which new memory tokens disturbed a trained action expert least.
        """
        with _in_float32(state.device):
            if self.frames is None:
                return self._read_recurrent(state)
            assert state.frames is not None
            assert state.queries is not None
            frames = self.frames(state.frames, state.queries)
            return torch.cat([self._read_recurrent(state), frames], dim=1) if self.recurs else frames

    def _read_recurrent(self, state: MemoryState) -> Tensor:
        tokens = self.read_norm(state.tokens)
        if self.look_back is not None:
            tokens = self.look_back(tokens, state.cache, state.cache_length)
        return tokens + self.slots

    def context(self, blocks: Sequence[Tensor], valid: Tensor) -> Context | None:
        """What `write` attends to, of blocks [B, N, H] of P embeddings in all, valid [B, P]; None where it does not.

        Nothing is recorded of a block that needs no gradient, such as what a frozen model makes of pictures.
        """
        if self.reader is None:
            return None
        with _in_float32(valid.device):
            return self.reader.context(blocks, valid)

    @property
    def awaits_backbone(self) -> bool:
        """Whether `write` needs the backbone's output."""
        return self.recurs and self.reader is None

    def write(
        self,
        state: MemoryState,
        context: Context | None = None,
        *,
        read: Tensor | None = None,
        output: Tensor | None = None,
        frame: Tensor | None = None,
    ) -> MemoryState:
        """The next state.

        Args:
            context: of the query, see `context`.
            read: what `read` gives of this state, where that was computed before.
            output: [B, M + n · p, H], the backbone's at the memory's places, where the memory `awaits_backbone`; that
                at the frames' is not looked at.
            frame: [B, p, H], what the query saw, see `PastFrames.frame`.
        """
        written = self._write_recurrent(state, context, read, output) if self.recurs else state
        if self.frames is None:
            return written
        assert frame is not None, "a memory of frames is written with the query's"
        assert state.frames is not None
        assert state.queries is not None
        frames, queries = self.frames.remember(state.frames, state.queries, frame)
        return replace(written, frames=frames, queries=queries)

    def _write_recurrent(
        self, state: MemoryState, context: Context | None, read: Tensor | None, output: Tensor | None
    ) -> MemoryState:
        count = state.tokens.shape[1]
        with _in_float32(state.device):
            if self.reader is not None:
                assert context is not None, "a memory that reads the context is written with it"
                found = self.reader(self._read_recurrent(state) if read is None else read[:, :count], context)
            else:
                assert output is not None, "a memory that awaits the backbone is written with its output"
                found = output[:, :count].float()
            tokens = self.update(state.tokens, found)
        if self.look_back is None:
            return MemoryState(tokens)
        return MemoryState(tokens, *self.look_back.remember(state))

    def reset(self, state: MemoryState, mask: Tensor) -> MemoryState:
        """Back to the initial memory for the elements where `mask` [B] is true."""
        return state.where(mask, self.initial(state.batch_size))


class OverwriteUpdate(nn.Module):
    """What is found is the next memory: m' = RMSNorm(found)."""

    def __init__(self, hidden_size: int):
        super().__init__()

    def forward(self, memory: Tensor, found: Tensor) -> Tensor:
        """memory, found [B, M, H] → next memory [B, M, H]."""
        return _rms_norm(found)


class GatedUpdate(nn.Module):
    """A gate decides per channel what is kept.

        u = RMSNorm(found)    z = sigmoid(gate([u, m]))    m' = RMSNorm((1 − z) m + z A u)

    A starts as the identity and z at 0.1 everywhere. 2H² + H + H² parameters: 2.8M at H = 960, which is 0.6 %
    of SmolVLA.
    """

    def __init__(self, hidden_size: int):
        super().__init__()
        self.gate = nn.Linear(2 * hidden_size, hidden_size)
        self.candidate = nn.Linear(hidden_size, hidden_size, bias=False)
        nn.init.zeros_(self.gate.weight)
        nn.init.constant_(self.gate.bias, math.log(INITIAL_WRITE_GATE / (1 - INITIAL_WRITE_GATE)))
        nn.init.eye_(self.candidate.weight)

    def forward(self, memory: Tensor, found: Tensor) -> Tensor:
        """memory, found [B, M, H] → next memory [B, M, H]."""
        update = _rms_norm(found)
        gate = torch.sigmoid(self.gate(torch.cat([update, memory], dim=-1)))
        return _rms_norm(torch.lerp(memory, self.candidate(update), gate))


class ContextReader(nn.Module):
    """Memory tokens attend to the embeddings of state, images and language: multi-head attention, 4H² parameters.

    The backbone's own way from a picture to the memory's places may be frozen and faint; this one is trained whatever
    is frozen, and at full strength from the first step on, since it disturbs nothing but the memory.

    Keys know their place in the prefix, by sinusoids (Vaswani et al. 2017) as large as the embeddings. Without, the
    first attention is the same wherever something is seen: of two lamps it finds that one is lit, and not which. The
    first attention is far from even, so that every head and slot begins with tokens of its own.

    What the backbone makes of the tokens is not written. It was tried beside what is found: at full strength it drowned
    that, through a gain from zero it made learning slower, and every query had to wait for the one before.
    """

    def __init__(self, hidden_size: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(hidden_size, hidden_size, bias=False) for _ in range(4))
        with torch.no_grad():
            for linear in (self.query, self.key):
                linear.weight.mul_(READER_GAIN)

    def context(self, blocks: Sequence[Tensor], valid: Tensor) -> Context:
        """Embeddings in blocks [B, N, H], P in all, and valid [B, P] → keys and values."""
        normed = [_rms_norm(block.float()) for block in blocks]
        places = _places(valid.shape[1], blocks[0].shape[2], valid.device).split([block.shape[1] for block in blocks])
        keys = torch.cat([self.key(block + there) for block, there in zip(normed, places, strict=True)], dim=1)
        values = torch.cat([self.value(block) for block in normed], dim=1)
        bias = torch.zeros(valid.shape, device=valid.device).masked_fill_(~valid, -math.inf)
        return Context(self._in_heads(keys), self._in_heads(values), bias[:, None, None])

    def forward(self, tokens: Tensor, context: Context) -> Tensor:
        """tokens [B, M, H] → what they find [B, M, H]."""
        query = self._in_heads(self.query(tokens))
        found = F.scaled_dot_product_attention(query, context.keys, context.values, attn_mask=context.bias)
        return self.out(found.transpose(1, 2).flatten(-2))

    def _in_heads(self, tokens: Tensor) -> Tensor:
        """[B, N, H] → [B, heads, N, H / heads]."""
        return tokens.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class ActionHead(nn.Module):
    """Actions straight from the memory, for training alone.

    The expert learns to read a memory only once something is written there that helps it, and writing is learnt only
    through what reads it. This reader has the memory before it with nothing in between, so that writing is learnt at
    once; what is written then serves the expert.
    """

    def __init__(self, num_tokens: int, hidden_size: int, steps: int, dimensions: int):
        super().__init__()
        self.shape = (steps, dimensions)
        self.inner = nn.Linear((num_tokens + 2) * hidden_size, HEAD_WIDTH)
        self.out = nn.Linear(HEAD_WIDTH, steps * dimensions)

    def forward(self, tokens: Tensor, seen: Tensor) -> Tensor:
        """Memory after a query [B, M, H], and a summary of what is seen in it [B, 2, H] → actions [B, T, A]."""
        with _in_float32(tokens.device):
            inner = F.gelu(self.inner(torch.cat([tokens, _rms_norm(seen)], dim=1).flatten(1)))
            return self.out(inner).unflatten(1, self.shape)


class LookBack(nn.Module):
    """The memory tokens attend to the memory's own past: single-head attention over Q past states.

    What is found is added through a gain that starts at zero, so that switching the cache on changes nothing
    before it is trained.
    """

    def __init__(self, cache_size: int, hidden_size: int):
        super().__init__()
        self.cache_size = cache_size
        self.query = nn.Linear(hidden_size, CACHE_KEY_SIZE, bias=False)
        self.key = nn.Linear(hidden_size, CACHE_KEY_SIZE, bias=False)
        self.age = nn.Parameter(torch.zeros(cache_size, 1, CACHE_KEY_SIZE))
        self.gain = nn.Parameter(torch.zeros(hidden_size))

    def empty(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """No past for tokens [B, M, H]: cache [B, Q, M, H] and its length [B]."""
        batch_size, *token_shape = tokens.shape
        cache = tokens.new_zeros(batch_size, self.cache_size, *token_shape)
        return cache, torch.zeros(batch_size, dtype=torch.long, device=tokens.device)

    def remember(self, state: MemoryState) -> tuple[Tensor, Tensor]:
        """The cache and its length with the tokens of `state` put in front; the oldest drops out."""
        assert state.cache is not None
        assert state.cache_length is not None
        cache = torch.cat([state.tokens[:, None], state.cache[:, :-1]], dim=1)
        return cache, (state.cache_length + 1).clamp(max=self.cache_size)

    def forward(self, tokens: Tensor, cache: Tensor, cache_length: Tensor) -> Tensor:
        """tokens [B, M, H], cache [B, Q, M, H], cache_length [B] → tokens [B, M, H]."""
        past = _rms_norm(cache)
        keys = (self.key(past) + self.age).flatten(1, 2)
        filled = torch.arange(self.cache_size, device=cache.device) < cache_length[:, None]
        filled = filled.repeat_interleave(cache.shape[2], dim=1)[:, None]  # [B, 1, Q·M]
        scores = self.query(tokens) @ keys.transpose(1, 2) / math.sqrt(CACHE_KEY_SIZE)
        # A finite "minus infinity": with an empty cache the softmax is then uniform over zeros, not NaN.
        weights = scores.masked_fill(~filled, torch.finfo(scores.dtype).min).softmax(dim=-1)
        return tokens + self.gain * (weights @ past.flatten(1, 2))


def _places(count: int, size: int, device: torch.device) -> Tensor:
    """Sinusoids [count, size] of RMS 1, one row for each place."""
    pairs = (size + 1) // 2
    rates = LONGEST_PLACE ** -(torch.arange(pairs, device=device) / pairs)
    angles = torch.arange(count, device=device)[:, None] * rates
    return math.sqrt(2) * torch.cat([angles.sin(), angles.cos()], dim=1)[:, :size]


def _rms_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], eps=RMS_EPS)


def _in_float32(device: torch.device) -> AbstractContextManager:
    """Mixed precision stays outside: a state that is rounded at every query drifts."""
    return torch.autocast(device_type=device.type, enabled=False)
