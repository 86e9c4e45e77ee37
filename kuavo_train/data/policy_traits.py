"""What a policy can do, read from its LeRobot config: the only place that looks."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from lerobot.configs import PreTrainedConfig


@dataclass(frozen=True)
class PolicyTraits:
    """
    Attributes:
        has_memory: whether anything is carried from one query to the next: memory tokens or past frames.
        memory_depth: K, queries that gradients flow through; 0 where the memory is not trained through time.
        vlm_name: folder or hub id of the vision-language model's config and tokenizer; None without one.
        token_limit: of an instruction; None for a policy that reads no language.
        has_temperature: whether the noise that actions are denoised from can be set.
    """

    has_memory: bool
    memory_depth: int
    vlm_name: str | None
    token_limit: int | None
    has_temperature: bool

    @classmethod
    def of(cls, config: PreTrainedConfig) -> Self:
        has_memory = getattr(config, "has_memory", False)
        return cls(
            has_memory=has_memory,
            memory_depth=getattr(config, "mem_backprop_depth", 0) if has_memory else 0,
            vlm_name=getattr(config, "vlm_model_name", None),
            token_limit=getattr(config, "tokenizer_max_length", None),
            has_temperature=hasattr(config, "sampling_temperature"),
        )


def remembers(policy: Mapping[str, Any]) -> bool:
    """`has_memory` of a policy that is not built, by the fields that are set."""
    return any(policy.get(key, 0) for key in ("num_mem_tokens", "mem_frames"))
