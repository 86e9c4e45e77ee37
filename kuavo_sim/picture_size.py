"""How the size of pictures is written: one number or two."""

from collections.abc import Sequence

ImageSize = int | Sequence[int]
"""Of pictures in pixels: the side of square ones, or (height, width)."""


def height_and_width(size: ImageSize) -> tuple[int, int]:
    """Raises ValueError for anything but a number or two."""
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2 or not all(isinstance(side, int) for side in sides):
        raise ValueError(f"image_size must be a number of pixels, or (height, width), got {size!r}")
    return sides
