"""What an observation holds, read and checked: an error names what must be there, and what came instead."""

from collections.abc import Mapping

import numpy as np
import torch
from lerobot.utils.constants import OBS_STATE
from numpy.typing import ArrayLike

from kuavo_train.data.checkpoint_tasks import KnownTask, KnownTasks
from kuavo_train.data.images.frames import resized
from kuavo_train.wrapper.policy.robot_io import Observation

Sizes = Mapping[str, tuple[int, int]]
"""Camera → (height, width)."""


def array_of(value: ArrayLike | torch.Tensor) -> np.ndarray:
    return value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)


def states_of(observation: Observation) -> np.ndarray:
    """[B, S] of B robots, or of one. Raises `ValueError`, as all that follows."""
    if OBS_STATE not in observation:
        raise ValueError(f"the observation must hold {OBS_STATE}, got {', '.join(observation)}")
    state = np.asarray(array_of(observation[OBS_STATE]), dtype=np.float32)
    if state.ndim not in (1, 2) or state.size == 0:
        raise ValueError(f"{OBS_STATE} must be of shape [S] or [B, S], got {list(state.shape)}")
    if not np.isfinite(state).all():
        raise ValueError(f"{OBS_STATE} must be finite, got {state}")
    return np.atleast_2d(state)


def in_policy_order(state: np.ndarray, task: KnownTask, known: KnownTasks) -> torch.Tensor:
    """[S of the policy], by name; a dimension the task lacks holds what it held in training."""
    if len(state) != len(task.state_names):
        raise ValueError(
            f"{OBS_STATE} must have the {len(task.state_names)} dimensions of {task.name} "
            f"({', '.join(task.state_names)}), got {len(state)}"
        )
    given = dict(zip(task.state_names, state.tolist(), strict=True))
    absent = zip(known.state_names, known.absent_state, strict=True)
    return torch.tensor([given.get(name, otherwise) for name, otherwise in absent])


def pictures_of(
    observation: Observation, camera: str, size: int, *, trained: Sizes, recorded: Sizes, batched: bool
) -> torch.Tensor:
    """[B, 3, H, W] float in [0, 1] of B robots, brought from the recorded size to that of training, as training did."""
    if camera not in observation:
        raise ValueError(
            f"the observation must hold {camera}; the policy was trained with {', '.join(trained)}, "
            f"got {', '.join(observation)}"
        )
    given = torch.from_numpy(np.ascontiguousarray(array_of(observation[camera])))
    pictures = given if batched else given[None]
    whole = given.dtype == torch.uint8
    if whole and pictures.ndim == 4 and pictures.shape[-1] == 3:
        pictures = pictures.permute(0, 3, 1, 2)
    elif not (pictures.is_floating_point() and pictures.ndim == 4 and pictures.shape[1] == 3):
        raise ValueError(
            f"{camera} must be [H, W, 3] uint8 or [3, H, W] float{', for each of the batch' if batched else ''}, "
            f"got {list(given.shape)} {str(given.dtype).removeprefix('torch.')}"
        )
    if len(pictures) != size:
        raise ValueError(f"{camera} must be of {size} robots, as {OBS_STATE} is, got {len(pictures)}")
    pictures = pictures.float() if whole else pictures.float() * 255
    if not (pictures.min() >= 0 and pictures.max() <= 255):
        raise ValueError(
            f"{camera} as float must be in [0, 1], got {pictures.min() / 255:g} to {pictures.max() / 255:g}; "
            "give pictures of 0 to 255 as uint8"
        )
    wanted, found = trained[camera], tuple(pictures.shape[2:])
    if found != wanted:
        if found != recorded.get(camera):
            raise ValueError(f"{camera} must be of the size in training, {wanted} (height, width), got {found}")
        pictures = resized(pictures, wanted)
    return pictures / 255
