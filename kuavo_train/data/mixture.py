"""Frames of several tasks in one space: fetched in batches, by name, whatever task they are from."""

import signal
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from lerobot.utils.constants import ACTION, OBS_STATE
from torch.utils.data import DataLoader, Dataset

from kuavo_train.data.cache import ImageSource
from kuavo_train.data.normalization import Normalization
from kuavo_train.data.order import Draw, StepSampler
from kuavo_train.data.tasks import Task

Batch = dict[str, Any]
BOOKKEEPING = ("task_position", "episode_index", "frame_index", "stream")
MEMORY_RESET = "observation.memory_reset"


class MixedDataset(Dataset):
    """Frames of several tasks in the union of their features; an index is a `Draw`.

    Args:
        images: of each task, what its cameras give.
        image_key: name of a camera → name in a batch of what it gives, where that is not its picture.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        images: Sequence[ImageSource],
        normalization: Normalization,
        *,
        chunk_size: int,
        image_key: Callable[[str], str] = str,
    ):
        self.tasks, self.images, self.image_key, self.chunk_size = list(tasks), list(images), image_key, chunk_size
        space = normalization.space
        self.columns = [(space.state_columns(task), space.action_columns(task)) for task in self.tasks]
        # A dimension that a task lacks holds the mean, which normalizes to zero.
        self.fill_state = normalization.array(OBS_STATE, "mean")
        self.fill_action = normalization.array(ACTION, "mean")

    def __len__(self) -> int:
        return sum(len(task.train_rows) for task in self.tasks)

    def __getitem__(self, draw: Draw) -> Batch:
        return self.__getitems__([draw])

    def __getitems__(self, draws: Sequence[Draw]) -> Batch:
        """One batch of B samples with chunks of C actions:

        observation.images.*: [B, 3, H, W] uint8, or under `image_key` what stands for it; observation.state:
        [B, S]; action: [B, C, A]; action_is_pad: [B, C], True past the episode's end; action_dim_is_pad: [B, A],
        True where the task lacks the dimension; observation.memory_reset: [B], True where a memory starts anew;
        task: B instructions; task_position, episode_index, frame_index, stream: [B].
        """
        places, rows, streams, begins = np.array(draws, dtype=np.int64).T
        size = len(places)
        state = np.tile(self.fill_state, (size, 1))
        action = np.tile(self.fill_action, (size, self.chunk_size, 1))
        is_pad = np.zeros((size, self.chunk_size), dtype=bool)
        dim_is_pad = np.ones((size, len(self.fill_action)), dtype=bool)
        episodes, frame_numbers = np.empty(size, dtype=np.int64), np.empty(size, dtype=np.int64)
        images: dict[str, torch.Tensor] = {}
        for place in np.unique(places):
            task, (state_columns, action_columns) = self.tasks[place], self.columns[place]
            mine = np.flatnonzero(places == place)
            own = rows[mine]
            episodes[mine], frame_numbers[mine] = task.episode[own], task.frame[own]
            state[np.ix_(mine, state_columns)] = task.state[own]
            chunk = own[:, None] + np.arange(self.chunk_size)
            last = task.bounds[task.episode[own], 1][:, None] - 1
            is_pad[mine] = chunk > last
            action[mine[:, None, None], np.arange(self.chunk_size)[:, None], action_columns] = task.action[
                np.minimum(chunk, last)
            ]
            dim_is_pad[np.ix_(mine, action_columns)] = False
            for camera in task.cameras:
                given, key = self.images[place](camera, own), self.image_key(camera)
                if key not in images:
                    images[key] = torch.empty((size, *given.shape[1:]), dtype=given.dtype)
                images[key][torch.from_numpy(mine)] = given
        return {
            **images,
            OBS_STATE: torch.from_numpy(state),
            ACTION: torch.from_numpy(action),
            "action_is_pad": torch.from_numpy(is_pad),
            "action_dim_is_pad": torch.from_numpy(dim_is_pad),
            "task": [self.tasks[place].instruction for place in places],
            "task_position": torch.from_numpy(places.copy()),
            "episode_index": torch.from_numpy(episodes),
            "frame_index": torch.from_numpy(frame_numbers),
            "stream": torch.from_numpy(streams.copy()),
            MEMORY_RESET: torch.from_numpy(begins.astype(bool)),
        }

    def loader(self, sampler: StepSampler, *, num_workers: int, pin_memory: bool) -> DataLoader:
        """Batches in the sampler's order, whatever the number of workers."""
        return DataLoader(
            self,
            batch_sampler=sampler,
            collate_fn=lambda batch: batch,
            num_workers=num_workers,
            pin_memory=pin_memory,
            worker_init_fn=_leave_signals_to_the_parent,
        )


def _leave_signals_to_the_parent(_worker: int) -> None:
    """Ctrl-C reaches the whole process group; the parent finishes its step first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def preprocess(batch: Batch, preprocessor: Any) -> Batch:
    """Through LeRobot's preprocessor (tokens, device, normalization); images become floats in [0, 1] there."""
    prepared = preprocessor({key: value for key, value in batch.items() if key not in BOOKKEEPING})
    return {
        key: value.float() / 255 if isinstance(value, torch.Tensor) and value.dtype == torch.uint8 else value
        for key, value in prepared.items()
    }
