"""A file of safetensors that is written piece by piece: its tensors need not fit into memory, as `save_file` wants."""

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kuavo_train.runs.files import in_one_move

BYTES = {"I64": 8, "F32": 4, "BF16": 2}
"""Of a value, by the format's names of types."""
ALIGNED = 8


@dataclass(frozen=True)
class TensorPieces:
    """
    Attributes:
        dtype: one of `BYTES`; numpy has no bfloat16: its 16 bits.
        pieces: makes the values, along the first axis.
    """

    dtype: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[np.ndarray]]

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * BYTES[self.dtype]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * BYTES[self.dtype]


def write_tensors(path: Path, tensors: Mapping[str, TensorPieces], metadata: Mapping[str, str]) -> None:
    """In one move, on the disk when it returns."""
    widest_first = sorted(tensors, key=lambda name: -BYTES[tensors[name].dtype])  # each begins where its type may
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name in widest_first:
        tensor = tensors[name]
        header[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.nbytes],
        }
        end += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % ALIGNED)
    with in_one_move(path) as partial, partial.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in widest_first:
            written = sum(file.write(np.ascontiguousarray(piece).data) for piece in tensors[name].pieces())
            assert written == tensors[name].nbytes, f"{name}: {tensors[name].nbytes} bytes declared, {written} written"
        file.flush()
        os.fsync(file.fileno())
