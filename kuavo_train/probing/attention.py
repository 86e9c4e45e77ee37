"""What the action expert attends to, watched while it computes."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lerobot.policies.pretrained import PreTrainedPolicy
from torch import Tensor


@dataclass
class WatchedAttention:
    """What the action tokens attended to.

    Attributes:
        weights: of each layer and denoising step, [L] or in self-attention layers [L + C], the mean over queries,
            heads and action tokens.
        state_place: of the state token in a prefix without memory.
    """

    weights: list[np.ndarray]
    state_place: int = 0

    @property
    def length(self) -> int:
        """L, the prefix with memory: all that the cross-attention layers can see."""
        return min(map(len, self.weights))


@contextmanager
def watched_attention(policy: PreTrainedPolicy) -> Iterator[WatchedAttention]:
    """Collect the attention of the action tokens while the policy denoises.

    Raises:
        ValueError: the policy runs LeRobot's forward, whose attention cannot be watched.
    """
    model, backbone = policy.model, policy.model.backbone
    if not policy.config.fast_forward:
        raise ValueError("attention can only be watched with policy.fast_forward=true, got false")
    embed, velocity, attend = model.embed, model.velocity, backbone.attend
    seen = WatchedAttention([])

    def watched_embed(*observation: Any) -> Any:  # hands on what the network's own takes and gives
        prefix = embed(*observation)
        seen.state_place = prefix.context.shape[1]
        return prefix

    def watched_attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        keys = key.float().repeat_interleave(query.shape[2] // key.shape[2], dim=2)
        scores = torch.einsum("bqhd,bkhd->bhqk", query.float(), keys) * query.shape[-1] ** -0.5
        seen.weights.append((scores + bias[:, None]).softmax(dim=-1).mean(dim=(0, 1, 2)).cpu().numpy())
        return attend(query, key, value, bias)

    def watched_velocity(*arguments: Any) -> Any:  # likewise
        backbone.attend = watched_attend
        try:
            return velocity(*arguments)
        finally:
            backbone.attend = attend

    model.embed, model.velocity = watched_embed, watched_velocity
    try:
        yield seen
    finally:
        del model.embed, model.velocity


def places_in_prefix(policy: PreTrainedPolicy, state_place: int, length: int, language: int) -> dict[str, list[int]]:
    """Kind of token → its places in a prefix of `length` tokens, memory included."""
    config = policy.config
    memory = 0 if policy.model.memory is None else policy.model.memory.size
    start = memory if memory and config.mem_at_start else 0
    places = {
        "images": list(range(start, start + state_place - language)),
        "language": list(range(start + state_place - language, start + state_place)),
        "state": [start + state_place],
    }
    if memory:
        end = range(length - memory, length) if config.mem_at_end else ()
        places = {"memory": [*range(start), *end], **places}
    return places
