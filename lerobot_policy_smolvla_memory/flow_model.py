"""The network: SmolVLA's flow matching with a recurrent memory in its prefix.

One policy query goes through three passes, in training and on the robot alike:

    memory    the tokens of the memory attend to images, language and state; what they find is the next memory
    prefix    images, language, state and memory tokens through the vision-language model
    actions   the action expert, attending to the keys and values of the prefix

Only the first recurs. It is small, and so the prefixes of all K queries of a clip are encoded as one batch, as are the
actions. A memory that awaits what the model makes of its tokens (`mem_reads_context: false`) recurs through the second
pass: in the end layout its M tokens alone, since nothing before them depends on memory, in the others all of it.
How the passes are computed is backbone.py's, or lerobot_forward.py's with `fast_forward: false`. Letters as in
prefix.py.
"""

import io
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from lerobot.policies.rtc.modeling_rtc import RTCProcessor
from lerobot.policies.smolvla.modeling_smolvla import VLAFlowMatching, create_sinusoidal_pos_embedding
from torch import Tensor, nn

from lerobot_policy_smolvla_memory.adapters import TaskAdapters
from lerobot_policy_smolvla_memory.backbone import ExpertPrefix, FastForward
from lerobot_policy_smolvla_memory.configuration_smolvla_memory import SmolVLAMemoryConfig
from lerobot_policy_smolvla_memory.frames import PastFrames, frame_side
from lerobot_policy_smolvla_memory.lerobot_forward import CachedPrefix, LeRobotForward
from lerobot_policy_smolvla_memory.memory import MemoryState, RecurrentMemory
from lerobot_policy_smolvla_memory.precision import in_own_dtype
from lerobot_policy_smolvla_memory.prefix import Prefix, clip_major
from lerobot_policy_smolvla_memory.pretrained_weights import (
    check_vlm_weights,
    no_progress_bar,
    take_rounded_weights_again,
)
from lerobot_policy_smolvla_memory.vision import encode_pictures

EncodedPrefix = ExpertPrefix | CachedPrefix
"""What the action expert attends to: of the fast forward, or of LeRobot's."""


PROJECTIONS = ("state_proj", "action_in_proj", "action_out_proj", "action_time_mlp_in", "action_time_mlp_out")


class Encoding[P](Protocol):
    """The prefixes of K consecutive queries, while memory passes from one to the next."""

    def query(self, number: int, tokens: Tensor) -> Tensor | None: ...
    def finish(self) -> P: ...


class Backbone[P](Protocol):
    """How the passes are computed: `FastForward`, or `LeRobotForward`. Each has prefixes of its own kind."""

    def begin(self, prefix: Prefix, queries: int, memory: RecurrentMemory | None = None) -> Encoding[P]: ...

    @property
    def attend_prefix(self) -> Callable[[P, Tensor], Tensor]: ...


class MemoryFlowMatching(VLAFlowMatching):
    """LeRobot's SmolVLA network with memory tokens in the prefix. With 0 tokens it has none of them."""

    def __init__(self, config: SmolVLAMemoryConfig, rtc_processor: RTCProcessor | None = None):
        compile_expert, config.compile_model = config.compile_model, False  # LeRobot would compile its own forward
        with no_progress_bar(), redirect_stdout(io.StringIO()):  # it prints how many layers it keeps
            if config.load_vlm_weights:
                check_vlm_weights(config.vlm_model_name)
            super().__init__(config, rtc_processor=rtc_processor)
            if config.load_vlm_weights:
                take_rounded_weights_again(self.vlm_with_expert.vlm, config.vlm_model_name)
        config.compile_model = compile_expert
        for name in ("global_image_start_token", "image_end_token"):  # no query should have to move them to the device
            token = getattr(self, name)
            delattr(self, name)
            self.register_buffer(name, token, persistent=False)
        vlm = self.vlm_with_expert.get_vlm_model()
        if config.gradient_checkpointing:
            vlm.vision_model.gradient_checkpointing_enable({"use_reentrant": False})  # heeded where it learns
        vlm.connector.register_forward_pre_hook(in_own_dtype)  # it may learn where the vision encoder does not
        layout = {"mem_at_start": config.mem_at_start, "mem_at_end": config.mem_at_end}
        # Any: it takes the prefixes that it has encoded itself, and no others.
        self.backbone: Backbone[Any] = (
            FastForward(
                self.vlm_with_expert,
                chunk_size=config.chunk_size,
                compile_expert=compile_expert,
                checkpoints=config.gradient_checkpointing,
                **layout,
            )
            if config.fast_forward
            else LeRobotForward(self.vlm_with_expert, prefix_length=config.prefix_length, **layout)
        )
        self.adapters: TaskAdapters | None = None
        self.memory: RecurrentMemory | None = None
        if not config.has_memory:
            return
        text_config = self.vlm_with_expert.config.text_config
        self.memory = RecurrentMemory(
            config.num_mem_tokens,
            text_config.hidden_size,
            init=config.mem_init,
            update=config.mem_update,
            cache_size=config.mem_cache_size if config.read_mem_from_cache else 0,
            context_heads=self.vlm_with_expert.config.text_config.num_attention_heads
            if config.mem_reads_context
            else 0,
            predicts=(config.chunk_size, config.action_feature.shape[0]) if config.mem_action_loss else None,
            frames=self._past_frames(config) if config.mem_frames else None,
            embedding=self.end_of_utterance_embedding(),
        )
        self.train_what_the_memory_awaits()

    def adapted_layers(self) -> dict[str, nn.Linear]:
        """Name → layer of the action expert and of the projections of state and actions."""
        parts = ("vlm_with_expert.lm_expert", *PROJECTIONS)
        return {
            name: layer
            for name, layer in self.named_modules()
            if isinstance(layer, nn.Linear) and any(name == part or name.startswith(f"{part}.") for part in parts)
        }

    @property
    def word_embeddings(self) -> Tensor:
        """[V, H] of the language model's tokens."""
        return self.vlm_with_expert.get_vlm_model().get_input_embeddings().weight

    def _past_frames(self, config: SmolVLAMemoryConfig) -> PastFrames:
        vlm, cameras = self.vlm_with_expert.config, len(config.image_features)
        height, width = config.resize_imgs_with_padding or next(iter(config.image_features.values())).shape[1:]
        cell = vlm.vision_config.patch_size * vlm.scale_factor  # pixels per side of what a token shows
        side = frame_side(config.mem_frame_tokens, cameras, (height // cell) * (width // cell))
        hidden_size, sampling = vlm.text_config.hidden_size, config.mem_frame_sampling
        return PastFrames(config.mem_frames, cameras, side, hidden_size, sampling=sampling)

    def end_of_utterance_embedding(self) -> Tensor:
        """[H], where memory tokens begin with mem_init "embedding"."""
        token = self.vlm_with_expert.processor.tokenizer.end_of_utterance_token_id
        return self.vlm_with_expert.get_vlm_model().get_input_embeddings().weight[token].detach()

    def train_what_the_memory_awaits(self) -> None:
        """LeRobot freezes the last layers and the final norm as unused; a memory that awaits their output uses them."""
        if self.memory is None or not self.memory.awaits_backbone or self.vlm_with_expert.train_expert_only:
            return
        text_model = self.vlm_with_expert.get_vlm_model().text_model
        for module in (text_model.norm, *text_model.layers[-2:]):
            module.requires_grad_(True)

    def embed_image(self, pictures: Tensor) -> Tensor:
        """Pictures [B, 3, height, width] in [-1, 1] → their tokens [B, N, H]."""
        vlm = self.vlm_with_expert.get_vlm_model()
        return vlm.connector(encode_pictures(vlm.vision_model, pictures))

    def embed(
        self,
        images: Sequence[Tensor],
        image_masks: Sequence[Tensor],
        language: Tensor,
        language_mask: Tensor,
        state: Tensor,
    ) -> Prefix:
        """Images, language and state as embeddings.

        Args:
            images: per camera [B, 3, height, width] in [-1, 1], or [B, N, H] from `embed_image` before.
            image_masks: per camera [B] bool; false where the camera is not there.
            language: [B, N] token ids; language_mask: [B, N] bool.
            state: [B, max_state_dim].
        """
        model = self.vlm_with_expert
        scale = model.config.text_config.hidden_size**0.5
        rows = len(state)
        tokens, valid, seen = [], [], []

        def add(embeddings: Tensor, mask: Tensor) -> None:
            tokens.append(embeddings.expand(rows, -1, -1))
            valid.append(mask.expand(rows, embeddings.shape[1]))

        for image, mask in zip(images, image_masks, strict=True):
            embedded = image if image.dim() == 3 else self.embed_image(image)
            seen.append(embedded)
            if self.add_image_special_tokens:
                begin, end = (
                    model.embed_language_tokens(special)[None]
                    for special in (self.global_image_start_token, self.image_end_token)
                )
                always = mask.new_ones(1, 1)
                add(begin, always)
                add(embedded * scale, mask[:, None])
                add(end, always)
            else:
                add(embedded * scale, mask[:, None])
        add(model.embed_language_tokens(language) * scale, language_mask)
        context = torch.cat([each.to(tokens[-1].dtype) for each in tokens], dim=1)
        past = None if self.memory is None else self.memory.frames
        frame = None if past is None else past.frame(seen, image_masks)
        return Prefix(context, torch.cat(valid, dim=1).bool(), self.state_proj(state)[:, None], frame)

    def encode(
        self,
        prefix: Prefix,
        memory: MemoryState | None = None,
        *,
        queries: int = 1,
        reset: Tensor | None = None,
        skip: Tensor | None = None,
    ) -> tuple[EncodedPrefix, MemoryState | None, Tensor | None]:
        """The vision-language model over the prefixes of K consecutive queries, memory handed on in between.

        Args:
            prefix: B = clips × K rows, clip-major.
            memory: of the clips, before their first query; None begins with the initial one.
            queries: K.
            reset: [B] bool, rows before whose query the memory starts anew.
            skip: [B] bool, rows after whose query the memory is as it was before.

        Returns:
            What the expert attends to for every row, the clips' memory after the last query, and the memory tokens
            after every row's query [B, M, H]. All carry gradients, through all K queries.
        """
        if self.memory is None:
            return self.backbone.begin(prefix, queries).finish(), None, None
        if memory is None:
            memory = self.memory.initial(len(prefix.valid) // queries)
        context = self.memory.context(*prefix.seen())
        contexts = [None] * queries if context is None else context.queries(queries)
        encoding = self.backbone.begin(prefix, queries, self.memory) if self.memory.awaits_backbone else None
        read, tokens = [], []
        for query in range(queries):
            rows = slice(query, None, queries)
            if reset is not None:
                memory = self.memory.reset(memory, reset[rows])
            read.append(self.memory.read(memory))
            written = self.memory.write(
                memory,
                contexts[query],
                read=read[-1],
                output=None if encoding is None else encoding.query(query, read[-1]),
                frame=None if prefix.frame is None else prefix.frame[rows],
            )
            memory = written if skip is None else written.where(skip[rows], memory)
            tokens.append(memory.tokens)
        if encoding is None:  # what recurs did without the backbone, which takes all queries as if they were first ones
            encoding = self.backbone.begin(prefix, 1, self.memory)
            encoding.query(0, clip_major(read))
        return encoding.finish(), memory, clip_major(tokens)

    def velocity(self, prefix: EncodedPrefix, x_t: Tensor, time: Tensor) -> Tensor:
        """The flow at noisy actions x_t [B, T, A], given the prefix: [B, T, A].

        Args:
            time: [B], or [B, T] where the steps of a chunk are not all as noisy.
        """
        return self.action_out_proj(self.backbone.attend_prefix(prefix, self._embed_actions(x_t, time)).float())

    def _embed_actions(self, x_t: Tensor, time: Tensor) -> Tensor:
        """LeRobot's `embed_suffix`, also for a time [B, T] of each step, and with nothing made on the host."""
        actions, config = self.action_in_proj(x_t), self.config
        width, periods = self.vlm_with_expert.expert_hidden_size, (config.min_period, config.max_period)
        times = create_sinusoidal_pos_embedding(time.flatten(), width, *periods, device=actions.device)
        times = times.to(actions.dtype).unflatten(0, (len(time), -1)).expand_as(actions)
        both = torch.cat([actions, times], dim=2)
        return self.action_time_mlp_out(F.silu(self.action_time_mlp_in(both)))
