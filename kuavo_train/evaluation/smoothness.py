"""How smoothly a robot was told to move: at the borders of chunks, inside them, and back and forth.

Arms, claws and base are told apart: their units and their habits differ. Pure functions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kuavo_train.data.recordings.joint_groups import columns_by_group

GROUPS = {  # what is reported → joint groups in it; the base's mode is a switch, and moves by jumps
    "arms": ("left_arm", "right_arm"),
    "claws": ("claws",),
    "base": ("base_position", "base_yaw"),
    "other": ("other",),
}
HELD = -1
"""Number of the chunk of an action that is of none: the pose was held."""
STILL = 1e-4  # rad, claw units or m a tick: what is less is no direction


@dataclass(frozen=True)
class Smoothness:
    """Of one joint group in one episode; None where there was nothing to measure.

    Attributes:
        jump: mean absolute change of a command where one chunk ends and the next begins, per tick.
        acceleration: mean absolute second difference inside chunks, per tick².
        reversed: share of the commands that move against the direction of the movement before, in [0, 1].
    """

    jump: float | None
    acceleration: float | None
    reversed: float | None


def smoothness(actions: np.ndarray, chunks: Sequence[int], names: Sequence[str]) -> dict[str, Smoothness]:
    """
    Args:
        actions: [T, A], tick by tick.
        chunks: T numbers of the chunks that they are of, `HELD` for a pose held.
        names: A, of the dimensions.

    Returns:
        Group → its smoothness, for the groups that there are.
    """
    by_group, found = columns_by_group(names), {}
    for group, parts in GROUPS.items():
        columns = [column for part in parts if part in by_group for column in by_group[part]]
        if columns:
            found[group] = _of_group(actions[:, columns].astype(np.float64), np.asarray(chunks))
    return found


def _of_group(actions: np.ndarray, chunks: np.ndarray) -> Smoothness:
    changes = np.diff(actions, axis=0)
    border = chunks[1:] != chunks[:-1]
    inside = ~border & (chunks[1:] != HELD)
    smooth = inside[1:] & inside[:-1]
    return Smoothness(
        jump=_mean(np.abs(changes[border])),
        acceleration=_mean(np.abs(np.diff(changes, axis=0)[smooth])),
        reversed=_reversed(changes),
    )


def _reversed(changes: np.ndarray) -> float | None:
    """Of the movements of each dimension, those that go against its movement before; pauses in between do not count."""
    turned = moved = 0
    for column in changes.T:
        direction = np.sign(column[np.abs(column) > STILL])
        turned += int((direction[1:] != direction[:-1]).sum())
        moved += max(0, len(direction) - 1)
    return turned / moved if moved else None


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if values.size else None
