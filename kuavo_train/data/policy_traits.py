"""What a policy can do, read from its LeRobot config: the only place that looks."""

from dataclasses import dataclass
from typing import Self

from lerobot.configs import PreTrainedConfig


@dataclass(frozen=True)
class PolicyTraits:
    """
    Attributes:
        memory_tokens: M, 0 without a recurrent memory.
        memory_depth: K, queries that gradients flow through; 0 where the memory is not trained through time.
        vlm_name: folder or hub id of the vision-language model's config and tokenizer; None without one.
        token_limit: of an instruction; None for a policy that reads no language.
        has_temperature: whether the noise that actions are denoised from can be set.
    """

    memory_tokens: int
    memory_depth: int
    vlm_name: str | None
    token_limit: int | None
    has_temperature: bool

    @classmethod
    def of(cls, config: PreTrainedConfig) -> Self:
        tokens = getattr(config, "num_mem_tokens", 0)
        return cls(
            memory_tokens=tokens,
            memory_depth=getattr(config, "mem_backprop_depth", 0) if tokens else 0,
            vlm_name=getattr(config, "vlm_model_name", None),
            token_limit=getattr(config, "tokenizer_max_length", None),
            has_temperature=hasattr(config, "sampling_temperature"),
        )
