"""Configuration of SmolVLA with a recurrent memory."""

import math
from dataclasses import dataclass, fields
from typing import Any, Self

from lerobot.configs import PreTrainedConfig
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig

# Batch keys of this policy. Their names decide whether LeRobot's processors let them through.
ACTION_IS_PAD = "action_is_pad"
"""[B, T] bool: steps of the chunk beyond the episode's end (LeRobot's own key)."""
ACTION_DIM_IS_PAD = "action_dim_is_pad"
"""[B, A] bool: action dimensions that this row's task does not have."""
QUERY_IS_PAD = "query_is_pad"
"""[B] bool: rows that fill up a clip; no loss, and the memory stays as it is."""
MEMORY_RESET = "observation.memory_reset"
"""[B] bool: the memory starts anew before this row's query."""

ENCODED_CONTEXT = "observation.encoded_context"
"""[B, layers, 2, P, G × D]: keys and values of images and language in a vision-language model that is held fixed."""


def image_features_key(camera: str) -> str:
    """Batch key of a camera's tokens [B, N, H], which may stand in place of its pictures."""
    return camera.replace("observation.images.", "observation.image_features.", 1)


MEM_INITS = ("normal", "zeros", "embedding")
MEM_UPDATES = ("overwrite", "gated")
MEM_FRAME_SAMPLINGS = ("even", "recent")
ADAPTER_STARTS = ("nearest", "zero")


@PreTrainedConfig.register_subclass("smolvla_memory")
@dataclass
class SmolVLAMemoryConfig(SmolVLAConfig):
    """SmolVLA's configuration, and the memory tokens in its prefix.

    Two switches give three layouts of the prefix:

        mem_at_start  mem_at_end
        True          False       start: [MEM | images | language | state], the classic recurrent memory
        True          True        both:  [MEM | images | language | state | MEM], read at the end copy
        False         True        end:   [images | language | state | MEM], nothing before depends on memory

    Args:
        num_mem_tokens: memory tokens M that recur. 0, with `mem_frames` 0 as well, is exactly LeRobot's SmolVLA.
        mem_at_start, mem_at_end: the layout, see above.
        mem_init: where the first memory of an episode starts from: "normal" (std 0.02), "zeros", or
            "embedding" (the language model's embedding of its end-of-utterance token).
        mem_update: "overwrite" (the output is the next memory) or "gated" (a gate decides per channel what
            is kept; holds over long delays).
        mem_weight: how many tokens a memory weighs as in attention, all of it together, when it joins a policy that
            was trained without: the fewer, the less it disturbs. From as many as it has (twice num_mem_tokens in
            "both"), each weighs as any other token, which is what it does in a policy with new weights.
        mem_growth: the factor by which that weight grows with every forward in training, until it is full; 1 keeps it.
        mem_reads_context: the memory tokens attend to the embeddings of state, images and language themselves, through
            weights of their own, and what they find is written. Nothing that recurs then waits for the vision-language
            model. false is the recurrent memory transformer's own form: what that model makes of the tokens is written.
        mem_action_loss: weight of a second loss in training: a small head predicts each query's actions from the
            memory and a summary of what is seen. What memory must hold is then learnt from the first step on, before
            the expert reads it. At inference the head is not used. 0 leaves it out.
        read_mem_from_cache: the memory also looks back at its own past states.
        mem_cache_size: how many past states Q are kept for that.
        mem_frames: of how many past queries of the episode, n, what the cameras saw is kept and shown as further
            memory tokens, behind those that recur or instead of them. 0 keeps none.
        mem_frame_tokens: tokens that are kept of such a query at most, of all cameras together. Of each camera it is a
            square of equal size, over which its tokens are averaged.
        mem_frame_sampling: which queries: "even" (spread over the whole episode) or "recent" (the farther back, the
            sparser).
        mem_backprop_depth: through how many consecutive queries K a trainer sends gradients. 0 trains every
            sample on its own; writing is then never trained, and `mem_frames` would keep nothing. The policy itself
            takes K from the batch.
        fast_forward: this package's forward (backbone.py); false returns to LeRobot's own.
        flow_draws: independent (noise, time) draws D per row in training; the prefix is computed once for all.
        sampling_temperature: standard deviation of the noise that actions are denoised from. 1 is what training sees,
            and LeRobot's; less makes plans alike, and 0 always gives the one that begins at the noise's mean.
        rtc_training_delay: up to how many steps at the beginning of a chunk are given clean in training, a random
            number for each draw, out of the loss (training-time real-time chunking, arXiv 2512.05964). A chunk can then
            be planned on from that many steps of the one before, exactly and at no cost. 0 leaves it out.
        adapter_instructions: of each task in the order of learning, its instructions as token ids, without padding.
            Every task but the first has a low-rank adapter on the expert and the projections (adapters.py), which takes
            part where an instruction is the task's, or most similar to one of its own. null, or one task: none.
        adapter_rank: of these adapters.
        adapter_start: what the last adapter begins as where the weights lack it: "nearest" (that of the task with the
            most similar instructions) or "zero".
        compile_model: (LeRobot's field) run the expert's layers through torch.compile. Needs fast_forward.
        gradient_checkpointing: of every layer that learns, keep only what goes in until the backward pass, which
            computes the rest anew: less memory, a slower step, the same numbers. Needs fast_forward without
            compile_model.
    """

    num_mem_tokens: int = 4
    mem_at_start: bool = False
    mem_at_end: bool = True
    mem_init: str = "normal"
    mem_update: str = "gated"
    mem_weight: float = 1.0
    mem_growth: float = 1.05
    mem_reads_context: bool = True
    mem_action_loss: float = 1.0
    read_mem_from_cache: bool = False
    mem_cache_size: int = 8
    mem_frames: int = 0
    mem_frame_tokens: int = 16
    mem_frame_sampling: str = "even"
    mem_backprop_depth: int = 0
    fast_forward: bool = True
    flow_draws: int = 1
    sampling_temperature: float = 1.0
    rtc_training_delay: int = 0
    gradient_checkpointing: bool = False
    adapter_instructions: list[list[list[int]]] | None = None
    adapter_rank: int = 16
    adapter_start: str = "nearest"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_mem_tokens < 0:
            raise ValueError(f"num_mem_tokens must be 0 (off) or more, got {self.num_mem_tokens}")
        if self.mem_init not in MEM_INITS:
            raise ValueError(f"mem_init must be one of {', '.join(MEM_INITS)}, got {self.mem_init!r}")
        if self.mem_update not in MEM_UPDATES:
            raise ValueError(f"mem_update must be one of {', '.join(MEM_UPDATES)}, got {self.mem_update!r}")
        if not 0 < self.mem_weight < math.inf:
            raise ValueError(f"mem_weight must be a number of tokens above 0, got {self.mem_weight}")
        if not 1 <= self.mem_growth < math.inf:
            raise ValueError(f"mem_growth must be a factor of at least 1, got {self.mem_growth}")
        if not 0 <= self.mem_action_loss < math.inf:
            raise ValueError(f"mem_action_loss must be a weight of 0 or more, got {self.mem_action_loss}")
        if self.mem_cache_size < 1:
            raise ValueError(f"mem_cache_size must be at least 1, got {self.mem_cache_size}")
        if self.mem_backprop_depth < 0:
            raise ValueError(f"mem_backprop_depth must be 0 or more queries, got {self.mem_backprop_depth}")
        if self.flow_draws < 1:
            raise ValueError(f"flow_draws must be at least 1, got {self.flow_draws}")
        if not 0 <= self.sampling_temperature <= 1:
            raise ValueError(f"sampling_temperature must be in [0, 1], got {self.sampling_temperature}")
        if not 0 <= self.rtc_training_delay < self.chunk_size:
            rule = f"be 0 (off) or more steps, fewer than chunk_size={self.chunk_size}"
            raise ValueError(f"rtc_training_delay must {rule}, got {self.rtc_training_delay}")
        if self.compile_model and not self.fast_forward:
            raise ValueError("compile_model needs fast_forward=true, got false: LeRobot's forward knows no memory")
        if self.gradient_checkpointing and (self.compile_model or not self.fast_forward):
            raise ValueError(
                "gradient_checkpointing needs fast_forward=true and compile_model=false, "
                f"got {self.fast_forward} and {self.compile_model}"
            )
        if self.adapter_rank < 1:
            raise ValueError(f"adapter_rank must be at least 1, got {self.adapter_rank}")
        if self.adapter_start not in ADAPTER_STARTS:
            raise ValueError(f"adapter_start must be one of {', '.join(ADAPTER_STARTS)}, got {self.adapter_start!r}")
        if self.adapter_instructions and self.compile_model:
            raise ValueError("adapter_instructions needs compile_model=false: which adapter takes part differs by row")
        for key in ("num_mem_tokens", "mem_frames"):
            if getattr(self, key) > 0 and not (self.mem_at_start or self.mem_at_end):
                raise ValueError(
                    f"{key}={getattr(self, key)} needs mem_at_start or mem_at_end to be true, "
                    f"got false for both; {key}=0 switches it off"
                )
        if self.mem_frames < 0:
            raise ValueError(f"mem_frames must be 0 (off) or more past queries, got {self.mem_frames}")
        if self.mem_frame_tokens < 1:
            raise ValueError(f"mem_frame_tokens must be at least 1, got {self.mem_frame_tokens}")
        if self.mem_frame_sampling not in MEM_FRAME_SAMPLINGS:
            names = ", ".join(MEM_FRAME_SAMPLINGS)
            raise ValueError(f"mem_frame_sampling must be one of {names}, got {self.mem_frame_sampling!r}")
        if self.mem_frames > 0 and self.mem_backprop_depth == 0:
            raise ValueError(
                f"mem_frames={self.mem_frames} needs mem_backprop_depth to be at least 1, got 0: samples on their own "
                "have no past; mem_frames=0 switches the frames off"
            )
        self._check_room_for_cameras()

    @property
    def has_memory(self) -> bool:
        """Whether anything is carried from one query to the next."""
        return self.num_mem_tokens > 0 or self.mem_frames > 0

    def validate_features(self) -> None:
        super().validate_features()  # adds the empty cameras
        if self.mem_frames > 0 and not self.image_features:
            raise ValueError(f"mem_frames={self.mem_frames} needs a camera, got none")
        self._check_room_for_cameras()

    def _check_room_for_cameras(self) -> None:
        cameras = len(self.image_features or ())
        if self.mem_frames > 0 and cameras > self.mem_frame_tokens:
            raise ValueError(
                f"mem_frame_tokens must be at least one for each of the {cameras} cameras, got {self.mem_frame_tokens}"
            )

    @classmethod
    def from_smolvla(cls, config: SmolVLAConfig, **changes: Any) -> Self:  # Any: of each field its own type
        """The same SmolVLA with memory: all of `config`, and `changes` on top."""
        taken = {field.name: getattr(config, field.name) for field in fields(config) if field.init}
        return cls(**{**taken, **changes})
