"""What goes over the wire: msgpack, with numpy arrays as openpi's client writes them.

An array is {b"__ndarray__": True, b"data": bytes, b"dtype": text, b"shape": [...]}, a number of numpy's
{b"__npgeneric__": True, b"data": number, b"dtype": text}. What comes in is checked before room is made for it.
"""

import math
from typing import Any

import msgpack
import numpy as np

DTYPES = frozenset(
    np.dtype(kind).str for kind in ("?", "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8")
)
MOST_ENTRIES = 1024  # of a map or a list: each is room that a message of a few bytes could ask for
MOST_DIMENSIONS = 4


class WireError(ValueError):
    """A message that is not of this wire; the text names the rule."""


def pack(message: Any) -> bytes:
    """Raises `TypeError` for what the wire does not carry."""
    return msgpack.packb(message, default=_packed)


def unpack(message: bytes) -> Any:
    """What `pack` made of it; raises `WireError` for anything else."""
    try:
        return msgpack.unpackb(
            message,
            object_hook=_unpacked,
            max_array_len=MOST_ENTRIES,
            max_map_len=MOST_ENTRIES,
            max_ext_len=0,
        )
    except WireError:
        raise
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        reason = str(error) or type(error).__name__
        raise WireError(
            f"a request must be a msgpack map in one binary frame, got one that is not ({reason})"
        ) from error


def _packed(value: object) -> object:
    if isinstance(value, np.ndarray):
        if value.dtype.str not in DTYPES:
            raise TypeError(f"an array must be of a dtype of {', '.join(sorted(DTYPES))}, got {value.dtype}")
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    if isinstance(value, np.generic):
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    raise TypeError(f"a message must hold maps, lists, text, bytes, numbers and arrays, got {type(value).__name__}")


def _unpacked(entry: dict) -> object:
    if b"__ndarray__" in entry:
        return _array(entry.get(b"data"), _dtype(entry.get(b"dtype")), entry.get(b"shape"))
    if b"__npgeneric__" in entry:
        value = entry.get(b"data")
        if not isinstance(value, bool | int | float):
            raise WireError(f"a number of numpy's must hold a number, got {type(value).__name__}")
        try:
            return _dtype(entry.get(b"dtype")).type(value)
        except (OverflowError, ValueError) as error:
            raise WireError(f"a number of numpy's must fit its dtype {entry[b'dtype']!r}, got {value}") from error
    return entry


def _dtype(name: object) -> np.dtype:
    if not isinstance(name, str) or name not in DTYPES:
        raise WireError(f"an array's dtype must be one of {', '.join(sorted(DTYPES))}, got {name!r:.40}")
    return np.dtype(name)


def _array(data: object, dtype: np.dtype, shape: object) -> np.ndarray:
    sides: Any = shape if isinstance(shape, list | tuple) and len(shape) <= MOST_DIMENSIONS else [None]
    if not all(type(side) is int and side >= 0 for side in sides):
        raise WireError(f"an array's shape must be up to {MOST_DIMENSIONS} whole numbers, got {shape!r:.80}")
    size = math.prod(sides) * dtype.itemsize
    if not isinstance(data, bytes) or len(data) != size:
        got = f"{len(data)}" if isinstance(data, bytes) else type(data).__name__
        raise WireError(f"an array of shape {list(sides)} and dtype {dtype.str} must hold {size} bytes, got {got}")
    return np.frombuffer(data, dtype).reshape(sides).copy()
