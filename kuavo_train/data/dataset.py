"""Frames of several tasks in one space: fetched in batches, by name, whatever task they are from."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypedDict

import numpy as np
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.utils.constants import ACTION, OBS_STATE
from torch.utils.data import DataLoader, Dataset

from kuavo_sim.children import born_deaf
from kuavo_train.data.batch import ACTION_DIM_IS_PAD, ACTION_IS_PAD, MEMORY_RESET, Batch, Lacking, Origin
from kuavo_train.data.images.along import Complete, FeaturesAlong, lacking_of, nothing_lacks
from kuavo_train.data.images.source import ImageSource, RowSource
from kuavo_train.data.normalization import Normalization
from kuavo_train.data.sampler import Draw, StepSampler
from kuavo_train.data.task import Task
from kuavo_train.data.workers import PREFETCHED, begin_as_worker


class FramesOfSample(TypedDict):
    actions: Sequence[int]
    observations: Sequence[int]


class MixedDataset(Dataset):
    """Frames of several tasks in the union of their features; an index is a `Draw`.

    Args:
        images: of each task, what its cameras give.
        actions, observations: the frames a sample is made of, as offsets from its own: LeRobot's delta indices of a
            policy. Observations of more than one frame have an axis of time.
        image_key: name of a camera → name in a batch of what it gives, where that is not its picture.
        contexts: of each task, what a frozen model makes of its rows, as `context_key` in a batch; none: left out.
        complete: gives a batch the embeddings that its tasks' `images` did not have yet.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        images: Sequence[ImageSource],
        normalization: Normalization,
        *,
        actions: Sequence[int],
        observations: Sequence[int] = (0,),
        image_key: Callable[[str], str] = str,
        contexts: Sequence[RowSource] = (),
        context_key: str = "",
        complete: Complete = nothing_lacks,
    ):
        self.contexts, self.context_key = list(contexts), context_key
        self.tasks, self.images, self.image_key = list(tasks), list(images), image_key
        self.complete = complete
        self.actions, self.observations = np.array(actions), np.array(observations)
        space = normalization.space
        self.columns = [(space.state_columns(task), space.action_columns(task)) for task in self.tasks]
        # A dimension that a task lacks holds the mean, which normalizes to zero.
        self.fill_state = normalization.array(OBS_STATE, "mean")
        self.fill_action = normalization.array(ACTION, "mean")

    def __len__(self) -> int:
        return sum(len(task.train_rows) for task in self.tasks)

    def __getitem__(self, draw: Draw) -> Batch:
        return self.gather([draw])

    def __getitems__(self, draws: Sequence[Draw]) -> Batch:
        """What PyTorch's loader calls, in a worker that has no encoder."""
        return self.gather(draws)

    def fetch(self, draws: Sequence[Draw], *, clip: int = 1) -> Batch:
        """One batch, whole; as `gather` has it."""
        return self.complete(self.gather(draws, clip=clip), self.images)

    def gather(self, draws: Sequence[Draw], *, clip: int = 1) -> Batch:
        """One batch of B samples with chunks of C actions, observations of T frames. It may be lacking. Its inputs:

        observation.images.*: [B, T, 3, H, W] uint8, or under `image_key` what stands for it; `context_key`:
        [B, layers, 2, P, width], P of the longest instruction of the tasks in it; observation.state:
        [B, T, S], both without the axis of time where T is 1; action: [B, C, A]; action_is_pad: [B, C], True beyond
        the episode; action_dim_is_pad: [B, A], True where the task lacks the dimension; observation.memory_reset:
        [B], True where a memory starts anew. Beyond the episode its first or last frame is repeated.
        """
        places, rows, streams, begins = np.array(draws, dtype=np.int64).T
        size, seen, chunk_size = len(places), len(self.observations), len(self.actions)
        state = np.tile(self.fill_state, (size, seen, 1))
        action = np.tile(self.fill_action, (size, chunk_size, 1))
        is_pad = np.zeros((size, chunk_size), dtype=bool)
        dim_is_pad = np.ones((size, len(self.fill_action)), dtype=bool)
        episodes, frame_numbers = np.empty(size, dtype=np.int64), np.empty(size, dtype=np.int64)
        images: dict[str, torch.Tensor] = {}
        contexts: list[tuple[torch.Tensor, torch.Tensor]] = []
        lacking: list[Lacking] = []
        for place in np.unique(places):
            task, (state_columns, action_columns) = self.tasks[place], self.columns[place]
            mine = np.flatnonzero(places == place)
            own = rows[mine]
            episodes[mine], frame_numbers[mine] = task.episode[own], task.frame[own]
            first, end = task.bounds[task.episode[own]].T[:, :, None]
            looks = np.clip(own[:, None] + self.observations, first, end - 1)
            state[np.ix_(mine, np.arange(seen), state_columns)] = task.state[looks]
            chunk = own[:, None] + self.actions
            is_pad[mine] = (chunk < first) | (chunk >= end)
            action[np.ix_(mine, np.arange(chunk_size), action_columns)] = task.action[np.clip(chunk, first, end - 1)]
            dim_is_pad[np.ix_(mine, action_columns)] = False
            source, seen_rows = self.images[place], looks.ravel()
            frames, lacks = (mine[:, None] * seen + np.arange(seen)).ravel(), lacking_of(source, seen_rows)
            for camera in task.cameras:
                given, key = source(camera, seen_rows[~lacks]), self.image_key(camera)
                if key not in images:
                    images[key] = torch.empty((size * seen, *given.shape[1:]), dtype=given.dtype)
                images[key][torch.from_numpy(frames[~lacks])] = given
            if lacks.any():
                assert isinstance(source, FeaturesAlong)
                pictures = {camera: source.pictures(camera, seen_rows[lacks]) for camera in task.cameras}
                of_task = torch.full((int(lacks.sum()),), int(place))
                where, which = torch.from_numpy(frames[lacks]), torch.from_numpy(seen_rows[lacks])
                lacking.append(Lacking(where, of_task, which, pictures))
            if self.contexts:
                contexts.append((torch.from_numpy(mine), self.contexts[place](own)))
        whole = state[:, 0] if seen == 1 else state
        inputs = {
            **{key: given if seen == 1 else given.unflatten(0, (size, seen)) for key, given in images.items()},
            OBS_STATE: torch.from_numpy(whole),
            ACTION: torch.from_numpy(action),
            ACTION_IS_PAD: torch.from_numpy(is_pad),
            ACTION_DIM_IS_PAD: torch.from_numpy(dim_is_pad),
            MEMORY_RESET: torch.from_numpy(begins.astype(bool)),
        }
        if contexts:
            inputs[self.context_key] = _put_together(contexts)
        instructions = [self.tasks[place].instruction_at(row) for place, row in zip(places, rows, strict=True)]
        origin = Origin(*map(torch.from_numpy, (places.copy(), episodes, frame_numbers, streams.copy())))
        return Batch(inputs, instructions, origin, clip, _joined(lacking) if lacking else None)

    def batches(self, sampler: StepSampler, *, num_workers: int, pin_memory: bool) -> Iterator[Batch]:
        """In the sampler's order, whatever the number of workers; whole, as from `fetch`."""

        def in_clips(batch: Batch) -> Batch:
            return batch._replace(clip=sampler.order.clip)

        loader = DataLoader(
            self,
            batch_sampler=sampler,
            collate_fn=in_clips,  # type: ignore[arg-type]  # it is given the whole batch, not a list of samples
            num_workers=num_workers,
            pin_memory=pin_memory,
            prefetch_factor=PREFETCHED if num_workers else None,
            worker_init_fn=begin_as_worker,
        )
        with born_deaf():
            batches = iter(loader)
        for batch in batches:
            yield self.complete(batch, self.images)

    def bytes_of_batch(self, size: int, *, look: int) -> int:
        """Of a batch of `size` samples, as a worker hands it over; all cameras together give `look` bytes a frame."""
        observed = len(self.observations) * (look + self.fill_state.nbytes)
        acted = len(self.actions) * (self.fill_action.nbytes + 1) + len(self.fill_action)
        return size * (observed + acted)


def _joined(lacking: Sequence[Lacking]) -> Lacking:
    """What the tasks of a batch lack, as one."""
    places, tasks, rows, pictures = zip(*lacking, strict=True)
    of_all = {camera: torch.cat([of_task[camera] for of_task in pictures]) for camera in pictures[0]}
    return Lacking(torch.cat(places), torch.cat(tasks), torch.cat(rows), of_all)


def _put_together(contexts: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """(rows of the batch, their contexts) of each task → those of the batch, the shorter ones padded."""
    longest = max((context for _, context in contexts), key=lambda context: context.shape[3])
    if len(contexts) == 1:
        return longest
    whole = longest.new_empty((sum(len(rows) for rows, _ in contexts), *longest.shape[1:]))
    for rows, context in contexts:
        tokens = context.shape[3]
        whole[rows, :, :, :tokens] = context
        whole[rows, :, :, tokens:] = 0
    return whole


def frames_of_sample(policy_config: PreTrainedConfig) -> FramesOfSample:
    """The frames that a policy learns from at once, as `MixedDataset` takes them: LeRobot's delta indices."""
    return {
        "actions": policy_config.action_delta_indices,
        "observations": policy_config.observation_delta_indices or (0,),
    }
