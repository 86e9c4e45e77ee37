"""How an embedding is stored: as bfloat16, or in half of that, as int8 with a scale for each token."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from kuavo_train.reading import Json

SCALE_BYTES = 4  # float32
LARGEST = 127  # of int8, to both sides


class Form(Protocol):
    @property
    def dtype(self) -> type:
        """Of the stored arrays."""

    @property
    def key(self) -> Json:
        """What it adds to the key of a cache."""

    @property
    def text(self) -> str:
        """For a person."""

    def store(self, embeddings: torch.Tensor) -> np.ndarray:
        """[B, N, H] float → [B, N, …]."""

    def load(self, stored: np.ndarray) -> torch.Tensor:
        """[B, N, …] → [B, N, H] bfloat16."""

    def width(self, stored: int) -> int:
        """H, of so many stored values a token."""


@dataclass(frozen=True)
class Bfloat16:
    """As its 16 bits, for numpy has no such type."""

    dtype: type = np.uint16
    text: str = "bfloat16"

    @property
    def key(self) -> Json:
        return {}  # as before there was another

    def store(self, embeddings: torch.Tensor) -> np.ndarray:
        return embeddings.to(torch.bfloat16).cpu().view(torch.uint16).numpy()

    def load(self, stored: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(stored).view(torch.bfloat16)

    def width(self, stored: int) -> int:
        return stored


@dataclass(frozen=True)
class Int8:
    """A token's values as multiples of a 127th of its largest one; the bytes of that scale stand behind them."""

    dtype: type = np.int8
    text: str = "int8 with a scale per token"

    @property
    def key(self) -> Json:
        return {"dtype": "int8"}

    def store(self, embeddings: torch.Tensor) -> np.ndarray:
        values = embeddings.float().cpu()
        scale = values.abs().amax(dim=-1, keepdim=True) / LARGEST
        whole = (values / scale.clamp_min(torch.finfo(torch.float32).tiny)).round().to(torch.int8)
        return torch.cat([whole, scale.view(torch.int8)], dim=-1).numpy()

    def load(self, stored: np.ndarray) -> torch.Tensor:
        whole, scale = np.split(stored, [self.width(stored.shape[-1])], axis=-1)
        scale = np.ascontiguousarray(scale).view(np.float32)  # torch cannot view that of no rows
        return (torch.from_numpy(whole) * torch.from_numpy(scale)).to(torch.bfloat16)

    def width(self, stored: int) -> int:
        return stored - SCALE_BYTES


FORMS: dict[str, Form] = {"bfloat16": Bfloat16(), "int8": Int8()}
"""Values of `data.feature_dtype`."""
