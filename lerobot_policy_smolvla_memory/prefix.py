"""What one policy query shows the vision-language model, as embeddings.

Letters, in all modules of the network: B rows of a batch = clips × K queries (clip-major: clip 0 query 0, clip 0
query 1, …), P tokens of images and language, L tokens of the whole prefix, M memory tokens, H hidden size,
T chunk length, A action dimensions, G key-value heads, D head dimension.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Prefix:
    """Images and language, which see each other, and the state, which sees both.

    Args:
        context: [B, P, H] images, then language.
        valid: [B, P] bool; false for padding and for cameras that are not there.
        state: [B, 1, H].
        frame: [B, p, H] what is kept of the images for later queries; None where nothing is.
        encoded: [B, layers, 2, P, G × D] keys and values of the context, where it has been through the model before.
    """

    context: Tensor
    valid: Tensor
    state: Tensor
    frame: Tensor | None = None
    encoded: Tensor | None = None

    def seen(self) -> tuple[Sequence[Tensor], Tensor]:
        """The state [B, 1, H], images and language [B, P, H], and which of them are valid [B, 1 + P]."""
        valid = torch.cat([self.valid.new_ones(len(self.valid), 1), self.valid], dim=1)
        return (self.state, self.context), valid

    def summary(self) -> Tensor:
        """[B, 2, H] float32: the mean of images and language, and the state. Without gradient."""
        seen = self.valid[..., None].float()
        mean = (self.context.detach().float() * seen).sum(dim=1, keepdim=True) / seen.sum(dim=1, keepdim=True)
        return torch.cat([mean, self.state.detach().float()], dim=1)

    def query(self, number: int, queries: int) -> Self:
        """The rows of query `number` of every clip."""
        rows = slice(number, None, queries)
        frame = None if self.frame is None else self.frame[rows]
        return type(self)(self.context[rows], self.valid[rows], self.state[rows], frame)


def clip_major(queries: Sequence[Tensor]) -> Tensor:
    """K tensors [clips, …] → [clips × K, …]."""
    return torch.stack(list(queries), dim=1).flatten(0, 1)
