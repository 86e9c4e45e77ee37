"""SmolVLA with a recurrent memory in its prefix.

One policy query goes through three passes, in training and on the robot alike:

    prefix    images, language and state through the vision-language model     (LeRobot's prefill)
    memory    the memory tokens through the same layers; their output is the next memory
    actions   the action expert, attending to the keys and values of both     (LeRobot's denoising)

In the end layout the first pass does not depend on memory. The prefixes of all K queries of a lane are then
encoded as one batch, only the M memory tokens recur, and the expert again takes all queries at once. In the
start and both layouts images and language see the memory, so that the first two passes are one and recur.

Letters: B rows of a batch = lanes × K queries (lane-major: lane 0 query 0, lane 0 query 1, …), L prefix
length, M memory tokens, H hidden size, T chunk length, A action dimensions, D head dimension.
"""

from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from lerobot.policies.common.flow_matching import euler_integrate
from lerobot.policies.common.vla_utils import make_att_2d_masks
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy, VLAFlowMatching
from lerobot.policies.smolvla.smolvlm_with_expert import apply_rope
from lerobot.utils.constants import ACTION, OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS, OBS_STATE
from lerobot.utils.device_utils import resolve_safetensors_device
from safetensors import safe_open
from safetensors.torch import load_model
from torch import Tensor, nn
from transformers import DynamicCache

from lerobot_policy_smolvla_memory.configuration_smolvla_memory import (
    ACTION_DIM_IS_PAD,
    ACTION_IS_PAD,
    MEMORY_RESET,
    QUERY_IS_PAD,
    SmolVLAMemoryConfig,
)
from lerobot_policy_smolvla_memory.memory import MemoryState, RecurrentMemory

# Which part of the model a parameter belongs to, by the path of its module.
PARAMETER_GROUPS = {
    "vision": ["model.vlm_with_expert.vlm.model.vision_model"],
    "connector": ["model.vlm_with_expert.vlm.model.connector"],
    "vlm_text": ["model.vlm_with_expert.vlm.model.text_model", "model.vlm_with_expert.vlm.lm_head"],
    "expert": ["model.vlm_with_expert.lm_expert"],
    "state_proj": ["model.state_proj"],
    "action_proj": [
        "model.action_in_proj",
        "model.action_out_proj",
        "model.action_time_mlp_in",
        "model.action_time_mlp_out",
    ],
    "memory": ["model.memory"],
}
MEMORY_PATH = "model.memory."


@dataclass(frozen=True)
class PrefixTokens:
    """The prefix as it enters the vision-language model.

    Args:
        embeddings: [B, L, H].
        valid: [B, L] bool; false for padding.
        blocks: [B, L] bool; true where a block begins that earlier tokens cannot see.
        positions: [B, L] position ids.
        next_position: [B] the position of the first action token.
    """

    embeddings: Tensor
    valid: Tensor
    blocks: Tensor
    positions: Tensor
    next_position: Tensor

    @classmethod
    def counted(cls, embeddings: Tensor, valid: Tensor, blocks: Tensor) -> Self:
        """Positions as LeRobot counts them: one per valid token, then the actions."""
        return cls(embeddings, valid, blocks, valid.cumsum(dim=1) - 1, valid.sum(dim=1))

    def rows(self, rows: slice) -> Self:
        return type(self)(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))

    def with_memory_at_start(self, memory: Tensor) -> Self:
        """Memory tokens [B, M, H] in front, in one attention block with images and language."""
        valid, blocks = _flags(self.valid, memory.shape[1])
        return self.counted(
            torch.cat([memory.to(self.embeddings.dtype), self.embeddings], dim=1),
            torch.cat([valid, self.valid], dim=1),
            torch.cat([blocks, self.blocks], dim=1),
        )

    def with_memory_at_end(self, memory: Tensor) -> Self:
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
            torch.cat([self.positions, positions], dim=1),
            self.next_position,
        )


@dataclass(frozen=True)
class EncodedPrefix:
    """What the action expert attends to.

    Args:
        cache: keys and values of each layer, [B, heads, L, D], positions already rotated in.
        valid: [B, L] bool.
        next_position: [B] the position of the first action token.
    """

    cache: DynamicCache
    valid: Tensor
    next_position: Tensor

    @classmethod
    def interleave(cls, queries: "list[EncodedPrefix]") -> "EncodedPrefix":
        """Prefixes of lanes, one per query, as rows in lane-major order."""
        if len(queries) == 1:
            return queries[0]
        cache = DynamicCache()
        for index, layers in enumerate(zip(*(query.cache.layers for query in queries), strict=True)):
            keys = _lane_major([layer.keys for layer in layers])
            cache.update(keys, _lane_major([layer.values for layer in layers]), index)
        return cls(
            cache,
            _lane_major([query.valid for query in queries]),
            _lane_major([query.next_position for query in queries]),
        )

    def followed_by(self, memory: "EncodedPrefix") -> "EncodedPrefix":
        """This prefix with the memory behind it. Takes the cache over: this prefix is used up."""
        for index, layer in enumerate(memory.cache.layers):
            self.cache.update(layer.keys, layer.values, index)
        return EncodedPrefix(self.cache, torch.cat([self.valid, memory.valid], dim=1), self.next_position)


def _flags(like: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """`valid` and `blocks` [B, size] of memory tokens that belong to the block before them."""
    return like.new_ones(len(like), size), like.new_zeros(len(like), size)


def _lane_major(queries: list[Tensor]) -> Tensor:
    """K tensors [lanes, …] → [lanes × K, …]."""
    return torch.stack(queries, dim=1).flatten(0, 1)


class MemoryFlowMatching(VLAFlowMatching):
    """LeRobot's SmolVLA network with memory tokens in the prefix. With 0 tokens it has none of them."""

    def __init__(self, config: SmolVLAMemoryConfig, rtc_processor: Any = None):
        super().__init__(config, rtc_processor=rtc_processor)
        self.memory: RecurrentMemory | None = None
        if config.num_mem_tokens == 0:
            return
        self.memory = RecurrentMemory(
            config.num_mem_tokens,
            self.vlm_with_expert.config.text_config.hidden_size,
            init=config.mem_init,
            update=config.mem_update,
            cache_size=config.mem_cache_size if config.read_mem_from_cache else 0,
            embedding=self.end_of_utterance_embedding(),
        )
        if not config.train_expert_only:
            self._train_last_layers()

    def end_of_utterance_embedding(self) -> Tensor:
        """[H], where memory tokens begin with mem_init "embedding"."""
        token = self.vlm_with_expert.processor.tokenizer.end_of_utterance_token_id
        return self.vlm_with_expert.get_vlm_model().get_input_embeddings().weight[token].detach()

    def _train_last_layers(self) -> None:
        """LeRobot freezes the last layers and the final norm as unused; the memory's output uses them."""
        text_model = self.vlm_with_expert.get_vlm_model().text_model
        for module in (text_model.norm, *text_model.layers[-2:]):
            module.requires_grad_(True)

    def embed(self, images, img_masks, lang_tokens, lang_masks, state) -> PrefixTokens:
        """Images, language and state as LeRobot embeds them; no memory yet."""
        return PrefixTokens.counted(*self.embed_prefix(images, img_masks, lang_tokens, lang_masks, state=state))

    def encode(
        self,
        prefix: PrefixTokens,
        memory: MemoryState | None = None,
        *,
        queries: int = 1,
        reset: Tensor | None = None,
        skip: Tensor | None = None,
    ) -> tuple[EncodedPrefix, MemoryState | None]:
        """The vision-language model over the prefixes of K consecutive queries, memory handed on in between.

        Args:
            prefix: B = lanes × K rows, lane-major.
            memory: of the lanes, before their first query; None begins with the initial one.
            queries: K.
            reset: [B] bool, rows before whose query the memory starts anew.
            skip: [B] bool, rows after whose query the memory is as it was before.

        Returns:
            What the expert attends to for every row, and the lanes' memory after the last query. Both carry
            gradients, through all K queries.
        """
        if self.memory is None:
            return self._prefill(prefix)[1], None
        if memory is None:
            memory = self.memory.initial(len(prefix.valid) // queries)
        without_memory = None if self.config.mem_at_start else self._prefill(prefix)[1]
        encoded = []
        for query in range(queries):
            rows = slice(query, None, queries)
            if reset is not None:
                memory = self.memory.reset(memory, reset[rows])
            tokens = self.memory.read(memory)
            if without_memory is None:
                output, with_memory = self._prefill_with_memory(prefix.rows(rows), tokens)
            else:
                output, with_memory = self._append_memory(prefix.rows(rows), tokens, without_memory, rows)
            written = self.memory.write(memory, output)
            memory = written if skip is None else written.where(skip[rows], memory)
            encoded.append(with_memory)
        all_queries = EncodedPrefix.interleave(encoded)
        return without_memory.followed_by(all_queries) if without_memory else all_queries, memory

    def _prefill(self, prefix: PrefixTokens) -> tuple[Tensor, EncodedPrefix]:
        """LeRobot's pass over a prefix: final-norm output [B, L, H], keys and values."""
        (output, _), cache = self.vlm_with_expert.forward(
            attention_mask=make_att_2d_masks(prefix.valid, prefix.blocks),
            position_ids=prefix.positions,
            past_key_values=None,
            inputs_embeds=[prefix.embeddings, None],
            use_cache=True,
        )
        return output, EncodedPrefix(cache, prefix.valid, prefix.next_position)

    def _prefill_with_memory(self, prefix: PrefixTokens, tokens: Tensor) -> tuple[Tensor, EncodedPrefix]:
        """Prefix and memory in one pass, in any layout: the memory's output [B, M, H], keys and values."""
        places = slice(0, tokens.shape[1])
        if self.config.mem_at_start:
            prefix = prefix.with_memory_at_start(tokens)
        if self.config.mem_at_end:
            places = slice(prefix.valid.shape[1], None)
            prefix = prefix.with_memory_at_end(tokens)
        output, encoded = self._prefill(prefix)
        return output[:, places], encoded

    def _append_memory(
        self, prefix: PrefixTokens, tokens: Tensor, encoded: EncodedPrefix, rows: slice
    ) -> tuple[Tensor, EncodedPrefix]:
        """The memory tokens alone, behind `rows` of prefixes that are encoded already (end layout).

        The same numbers as from `_prefill_with_memory`, without computing the prefix again: the memory's
        output [B, M, H], and keys and values of the memory alone.
        """
        size = tokens.shape[1]
        prefix = prefix.with_memory_at_end(tokens)
        sees = make_att_2d_masks(prefix.valid, prefix.blocks)[:, -size:]
        positions = prefix.positions[:, -size:]
        attend = self.vlm_with_expert.get_attention_interface()
        text_model = self.vlm_with_expert.get_vlm_model().text_model
        dtype = text_model.norm.weight.dtype
        hidden = prefix.embeddings[:, -size:].to(dtype)
        cache = DynamicCache()
        for index, layer in enumerate(text_model.layers):
            attention = layer.self_attn
            normed = layer.input_layernorm(hidden)
            heads = (*normed.shape[:2], -1, attention.head_dim)
            query = apply_rope(attention.q_proj(normed).view(heads), positions)
            key = apply_rope(attention.k_proj(normed).view(heads), positions)
            value = attention.v_proj(normed).view(heads)
            cache.update(key.transpose(1, 2), value.transpose(1, 2), index)
            before = encoded.cache.layers[index]
            keys = torch.cat([before.keys[rows].transpose(1, 2), key], dim=1)
            values = torch.cat([before.values[rows].transpose(1, 2), value], dim=1)
            attended = attend(sees, len(query), attention.head_dim, query, keys, values)
            hidden = hidden + attention.o_proj(attended.to(dtype))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return text_model.norm(hidden), EncodedPrefix(cache, prefix.valid[:, -size:], prefix.next_position)

    def velocity(self, prefix: EncodedPrefix, x_t: Tensor, time: Tensor) -> Tensor:
        """The flow at noisy actions x_t [B, T, A] and time [B], given the prefix: [B, T, A].

        As LeRobot's `denoise_step`, which counts the actions' positions from the length of the prefix and
        would thus shift them by the memory at the end.
        """
        embeddings, valid, blocks = self.embed_suffix(x_t, time)
        sees_prefix = prefix.valid[:, None, :].expand(-1, valid.shape[1], -1)
        (_, output), _ = self.vlm_with_expert.forward(
            attention_mask=torch.cat([sees_prefix, make_att_2d_masks(valid, blocks)], dim=2),
            position_ids=prefix.next_position[:, None] + valid.cumsum(dim=1) - 1,
            past_key_values=prefix.cache,
            inputs_embeds=[None, embeddings],
            use_cache=True,
        )
        prefix.cache.crop(prefix.valid.shape[1])  # self-attention layers have appended the actions
        return self.action_out_proj(output[:, -self.config.chunk_size :].to(torch.float32))


class SmolVLAMemoryPolicy(SmolVLAPolicy):
    """SmolVLA that remembers. See the module for how a query is computed.

    Training hands the memory in and out (`forward`), validation as well (`sample_actions_with`). On the robot
    the policy carries it: `select_action` and `predict_action_chunk` advance it once per query, `reset`
    starts an episode.
    """

    config_class = SmolVLAMemoryConfig
    name = "smolvla_memory"
    config: SmolVLAMemoryConfig

    def __init__(self, config: SmolVLAMemoryConfig, **kwargs: Any):
        if not isinstance(config, SmolVLAMemoryConfig):
            config = SmolVLAMemoryConfig.from_smolvla(config)
        # Past SmolVLAPolicy.__init__, which would build LeRobot's network only for us to throw it away.
        PreTrainedPolicy.__init__(self, config)
        config.validate_features()
        self.init_rtc_processor()
        self.model = MemoryFlowMatching(config, rtc_processor=self.rtc_processor)
        self.reset()

    # ---------------------------------------------------------------- training

    def forward(
        self,
        batch: dict[str, Tensor],
        noise: Tensor | None = None,
        time: Tensor | None = None,
        reduction: str = "mean",
        *,
        memory: MemoryState | None = None,
        queries: int = 1,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Flow-matching loss of K consecutive queries per lane, with gradients through the memory.

        Args:
            batch: B = lanes × K rows, lane-major. Beside SmolVLA's keys it may hold
                `action_is_pad` [B, T]: steps beyond the episode, out of the loss;
                `action_dim_is_pad` [B, A]: dimensions the task lacks, zero in the input and out of the loss;
                `query_is_pad` [B]: rows that only fill up a lane, out of the loss and not remembered;
                `observation.memory_reset` [B]: rows before whose query the memory starts anew.
            noise: [B, T, max_action_dim], time: [B] in (0, 1]. Drawn from the global generator when None.
            reduction: "mean" over all valid entries, or "none": [B], the mean over each row's valid entries.
            memory: of the lanes, before their first query. None begins with the initial one.
            queries: K.

        Returns:
            The loss, and a dict with `loss` (detached, not moved to the CPU) and `memory`: the lanes' memory
            after their last query, detached; None without memory.

        Raises:
            ValueError: rows that do not divide into lanes, or a memory of another number of lanes.
        """
        lanes = self._lanes(batch, queries)
        self._check_memory(memory, lanes, batch[OBS_STATE].device)
        batch = self._prepare_batch(batch)
        if self.config.adapt_to_pi_aloha:
            batch[ACTION] = self._pi_aloha_encode_actions_inv(batch[ACTION])
        actions = self.prepare_action(batch)
        if noise is None:
            noise = self.model.sample_noise(actions.shape, actions.device)
        if time is None:
            time = self.model.sample_time(actions.shape[0], actions.device)
        absent = self._absent_dimensions(batch)
        if absent is not None:
            actions = actions.masked_fill(absent, 0.0)
            noise = noise.masked_fill(absent, 0.0)

        if self.model.memory is None:
            losses = self.model.forward(*self._observation(batch), actions, noise, time)
        else:
            prefix, memory = self.model.encode(
                self.model.embed(*self._observation(batch)),
                memory,
                queries=queries,
                reset=batch.get(MEMORY_RESET),
                skip=batch.get(QUERY_IS_PAD),
            )
            t = time[:, None, None]
            velocity = self.model.velocity(prefix, t * noise + (1 - t) * actions, time)
            losses = F.mse_loss(noise - actions, velocity, reduction="none")

        loss = _reduce(losses[:, :, : self.config.action_feature.shape[0]], batch, reduction)
        return loss, {"loss": loss.detach().mean(), "memory": memory and memory.detach()}

    def _lanes(self, batch: dict[str, Tensor], queries: int) -> int:
        rows = len(batch[OBS_STATE])
        if queries < 1 or rows % queries:
            raise ValueError(f"{rows} rows of a batch do not divide into lanes of {queries} queries each")
        return rows // queries

    def _absent_dimensions(self, batch: dict[str, Tensor]) -> Tensor | None:
        """[B, 1, max_action_dim] true for dimensions the row's task lacks; None when it has them all.

        SmolVLA's own padding up to max_action_dim is not among them: it is treated as LeRobot treats it.
        """
        if ACTION_DIM_IS_PAD not in batch:
            return None
        absent = torch.atleast_2d(batch[ACTION_DIM_IS_PAD])[:, None, :]
        return F.pad(absent, (0, self.config.max_action_dim - absent.shape[-1]), value=False)

    def _observation(self, batch: dict[str, Tensor]) -> tuple:
        """Images, their masks, language tokens, their mask, and state, as LeRobot's network takes them."""
        images, image_masks = self.prepare_images(batch)
        language = batch[OBS_LANGUAGE_TOKENS], batch[OBS_LANGUAGE_ATTENTION_MASK]
        return images, image_masks, *language, self.prepare_state(batch)

    # --------------------------------------------------------------- inference

    @torch.no_grad()
    def sample_actions_with(
        self,
        batch: dict[str, Tensor],
        memory: MemoryState | None = None,
        noise: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, MemoryState | None]:
        """One policy query without any hidden state.

        Args:
            batch: B rows of observations. `action_dim_is_pad` and `observation.memory_reset` are honoured as
                in training: dimensions the task lacks come out as exactly 0, before unnormalization.
            memory: before the query; None for the initial one.
            noise: [B, T, max_action_dim], drawn from the global generator when None.
            kwargs: of real-time chunking, as in LeRobot.

        Returns:
            Actions [B, T, A], normalized, and the memory after the query (None without memory).

        Raises:
            ValueError: the memory is of another batch size or on another device.
        """
        self._check_memory(memory, len(batch[OBS_STATE]), batch[OBS_STATE].device)
        prefix, memory = self.model.encode(
            self.model.embed(*self._observation(batch)),
            memory,
            reset=batch.get(MEMORY_RESET),
            skip=batch.get(QUERY_IS_PAD),
        )
        if noise is None:
            shape = (len(prefix.valid), self.config.chunk_size, self.config.max_action_dim)
            noise = self.model.sample_noise(shape, prefix.valid.device)
        absent = self._absent_dimensions(batch)
        if absent is None:
            absent = torch.zeros(1, dtype=torch.bool, device=noise.device)
        actions = euler_integrate(
            lambda x_t, time: self.model.velocity(prefix, x_t, time).masked_fill(absent, 0.0),
            noise.masked_fill(absent, 0.0),
            self.config.num_steps,
            rtc_processor=self.rtc_processor,
            rtc_enabled=self._rtc_enabled(),
            **kwargs,
        )
        actions = actions[:, :, : self.config.action_feature.shape[0]]
        if self.config.adapt_to_pi_aloha:
            actions = self._pi_aloha_encode_actions(actions)
        return actions, memory

    def reset(self, indices: list[int] | None = None) -> None:
        """A new episode begins, for all batch elements or for some.

        Memory and actions still to be executed are dropped. With `indices` only those elements are queried at
        the next `select_action`; the others finish their chunk, and their memory does not advance early.
        """
        if indices is None:
            self._memory: MemoryState | None = None
            self._chunk: Tensor | None = None  # [B, n_action_steps, A] of the last query of each element
            self._executed: list[int] = []  # how many actions of it each element has executed
            return
        if self._memory is not None and self.model.memory is not None:
            self._memory = self._memory.put(indices, self.model.memory.initial(len(indices)).detach())
        for index in indices if self._chunk is not None else ():
            self._executed[index] = self.config.n_action_steps

    @torch.no_grad()
    def predict_action_chunk(self, batch: dict[str, Tensor], noise: Tensor | None = None, **kwargs: Any) -> Tensor:
        """One policy query: actions [B, T, A], normalized. The memory advances by one."""
        self.eval()
        batch = self._prepare_batch(batch)
        actions, self._memory = self.sample_actions_with(batch, self._memory, noise, **kwargs)
        return actions

    @torch.no_grad()
    def select_action(self, batch: dict[str, Tensor], noise: Tensor | None = None, **kwargs: Any) -> Tensor:
        """The next action [B, A], normalized, from a query every n_action_steps calls.

        Each element keeps its own count, so that elements reset on their own are queried on their own; those
        that are due together are one batch. `observation.memory_reset` resets elements as `reset` does.

        Raises:
            ValueError: another batch size or device than since the last reset.
        """
        assert not self._rtc_enabled(), "RTC needs predict_action_chunk; select_action knows no RTC"
        self.eval()
        batch = self._prepare_batch(batch)
        size, steps = len(batch[OBS_STATE]), self.config.n_action_steps
        if self._chunk is not None and len(self._chunk) != size:
            raise ValueError(
                f"the batch has {size} elements, but actions are planned for {len(self._chunk)}; "
                "call reset() when the number of environments changes"
            )
        if MEMORY_RESET in batch:
            self.reset(batch[MEMORY_RESET].nonzero().flatten().tolist())
        due = [index for index in range(size) if self._chunk is None or self._executed[index] == steps]
        if due:
            self._query(batch, due, noise)
        assert self._chunk is not None
        action = self._chunk[range(size), self._executed]
        self._executed = [executed + 1 for executed in self._executed]
        return action

    def _query(self, batch: dict[str, Tensor], due: list[int], noise: Tensor | None) -> None:
        """Plan anew for the elements `due` of the batch, and advance their memory."""
        size = len(batch[OBS_STATE])
        memory = self._memory
        if memory is None and self.model.memory is not None:
            memory = self.model.memory.initial(size)
        self._check_memory(memory, size, batch[OBS_STATE].device)
        rows = {key: _take(value, due, size) for key, value in batch.items()}
        noise = None if noise is None else noise[due]
        actions, advanced = self.sample_actions_with(rows, memory and memory.select(due), noise)
        if memory is not None and advanced is not None:
            self._memory = memory.put(due, advanced)
        if self._chunk is None:
            self._chunk = actions[:, : self.config.n_action_steps].clone()
            self._executed = [0] * size
        self._chunk[due] = actions[:, : self.config.n_action_steps]
        for index in due:
            self._executed[index] = 0

    def get_memory(self) -> MemoryState | None:
        """A copy of the carried memory; None before the first query and without memory."""
        return self._memory and self._memory.clone()

    def set_memory(self, memory: MemoryState | None) -> None:
        """Carry this memory from now on. Actions still to be executed are dropped: the next call is a query.

        Raises:
            ValueError: the memory is of another number of tokens, width or cache size.
        """
        if memory is not None:
            self._check_shape(memory)
            memory = memory.clone().to(next(self.parameters()).device)
        self.reset()
        self._memory = memory

    def _check_shape(self, memory: MemoryState) -> None:
        if self.model.memory is None:
            raise ValueError("this policy has no memory (num_mem_tokens=0), so it cannot carry one")
        expected = self.model.memory.initial(memory.batch_size).shapes
        if memory.shapes != expected:
            raise ValueError(f"the memory must be of shapes {expected}, got {memory.shapes}")

    def _check_memory(self, memory: MemoryState | None, lanes: int, device: torch.device) -> None:
        if memory is None:
            return
        self._check_shape(memory)
        if memory.batch_size != lanes:
            raise ValueError(
                f"the carried memory is of {memory.batch_size} elements, the batch of {lanes}; "
                "call reset() when the number of environments changes"
            )
        if memory.device != device:
            raise ValueError(
                f"the carried memory is on {memory.device}, the batch on {device}; "
                "move it with memory.to(device), or call reset()"
            )

    # ------------------------------------------------------------- parameters

    def parameter_groups(self) -> dict[str, list[str]]:
        """Names of all parameters by the part of the model they belong to; every one in exactly one group.

        Raises:
            ValueError: a parameter that belongs to no group (LeRobot or transformers renamed something).
        """
        groups: dict[str, list[str]] = {group: [] for group in PARAMETER_GROUPS}
        for name, _ in self.named_parameters():
            groups[_group_of(name)].append(name)
        return groups

    @classmethod
    def _load_as_safetensor(
        cls, model: "SmolVLAMemoryPolicy", model_file: str, map_location: str, strict: bool
    ) -> "SmolVLAMemoryPolicy":
        """Load all weights; only the memory may be missing, as a whole (a checkpoint of plain SmolVLA).

        Always strict: `strict=False`, LeRobot's default, would go on with random weights and a warning.
        """
        memory_is_new = _check_weights(model, model_file)
        load_model(model, model_file, strict=False, device=resolve_safetensors_device(map_location))
        if memory_is_new and model.model.memory is not None:
            model.model.memory.initialize_tokens(model.model.end_of_utterance_embedding())
        return model


def _reduce(losses: Tensor, batch: dict[str, Tensor], reduction: str) -> Tensor:
    """losses [B, T, A] → the mean of the valid ones, over all ("mean") or per row ("none": [B])."""
    entries = {"mean": (0, 1, 2), "none": (1, 2)}[reduction]
    padding = [
        batch[key].view(shape)
        for key, shape in (
            (ACTION_IS_PAD, (*losses.shape[:2], 1)),
            (ACTION_DIM_IS_PAD, (len(losses), 1, -1)),
            (QUERY_IS_PAD, (-1, 1, 1)),
        )
        if key in batch
    ]
    if not padding:
        return losses.mean(entries)
    valid = torch.ones_like(losses, dtype=torch.bool)
    for padded in padding:
        valid &= ~padded
    return (losses * valid).sum(entries) / valid.sum(entries).clamp_min(1)


def _take(value: Any, indices: list[int], batch_size: int) -> Any:
    """Rows of a batched value; anything else as it is."""
    if isinstance(value, Tensor) and value.dim() > 0 and len(value) == batch_size:
        return value[indices]
    return value


def _group_of(parameter: str) -> str:
    for group, modules in PARAMETER_GROUPS.items():
        if any(parameter.startswith(f"{module}.") for module in modules):
            return group
    raise ValueError(f"parameter {parameter} belongs to none of the groups {', '.join(PARAMETER_GROUPS)}")


def _check_weights(policy: nn.Module, model_file: str) -> bool:
    """Whether the file lacks the memory, and nothing else.

    Raises:
        ValueError: keys missing, unexpected or of another shape; lists the first ten.
    """
    with safe_open(model_file, framework="pt") as file:
        stored = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    tensors = policy.state_dict(keep_vars=True)
    wanted = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    stored_tensors = {tensors[key].data_ptr() for key in stored if key in tensors}
    # Tensors that share their storage are stored under one name.
    missing = [key for key in wanted if key not in stored and tensors[key].data_ptr() not in stored_tensors]
    memory = [key for key in wanted if key.startswith(MEMORY_PATH)]
    memory_is_new = bool(memory) and set(memory) <= set(missing)
    if memory_is_new:
        missing = [key for key in missing if key not in memory]
    problems = [f"{key} is missing" for key in missing]
    problems += [f"{key} is not part of this policy" for key in stored if key not in wanted]
    problems += [
        f"{key} is of shape {stored[key]}, this policy's of {shape}"
        for key, shape in wanted.items()
        if key in stored and stored[key] != shape
    ]
    if problems:
        listed = "\n  ".join(problems[:10])
        raise ValueError(
            f"{model_file} does not fit this policy: {len(problems)} of its weights\n  {listed}"
            + ("\n  …" if len(problems) > 10 else "")
        )
    return memory_is_new
