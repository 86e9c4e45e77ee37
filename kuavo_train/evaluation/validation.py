"""validate_all_tasks: the same held-out questions at every stage.

A policy's loss depends on what it draws at random, as noise and time of flow matching. Here that is a function of
(task, episode, frame, draw); predictions.py says how. Frames are visited as the robot would: in episode order, one
every `n_action_steps`, memory carried from query to query. Training's random state is not touched.
"""

import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.processor import PolicyProcessorPipeline
from lerobot.utils.constants import ACTION
from tqdm import tqdm

from kuavo_train.data.batch import ACTION_DIM_IS_PAD, ACTION_IS_PAD, Batch, preprocess
from kuavo_train.data.dataset import MixedDataset
from kuavo_train.data.normalization import Normalization
from kuavo_train.data.policy_traits import PolicyTraits
from kuavo_train.data.sampler import Draw
from kuavo_train.data.task import Task
from kuavo_train.evaluation.predictions import query_of
from kuavo_train.runs.records import EpisodeScore, HeldOutScores
from lerobot_policy_smolvla_memory.memory import MemoryState

Walk = list[int]  # rows of one episode, in order
Query = tuple[Batch, MemoryState | None, Callable[[MemoryState | None], None]]
"""One query of some walks, the memory before it, and what takes the memory after it."""


@dataclass(frozen=True)
class Validator:
    """Measures a policy on the held-out episodes of tasks."""

    dataset: MixedDataset
    normalization: Normalization
    preprocessor: PolicyProcessorPipeline
    draws: int
    batch_size: int
    autocast: Callable[[], AbstractContextManager]
    progress: bool = True

    def validate_all_tasks(self, policy: PreTrainedPolicy, names: Sequence[str]) -> list[HeldOutScores]:
        """Of each named task loss, action error, both per episode, and the constant predictor's error.

        The loss of a task is the mean over its held-out episodes of their mean over queries and draws; the
        action error is the mean absolute difference of the predicted chunk and the demonstrated one, normalized
        and, per joint group, in robot units (rad, m). A policy that predicts no more than it carries
        out is judged on that.
        """
        was_training = policy.training
        policy.eval()
        places = [place for place, task in enumerate(self.dataset.tasks) if task.name in names]
        with (
            torch.no_grad(),
            torch.random.fork_rng(devices=_cuda_devices(policy)),
            tqdm(
                total=sum(len(walk) for place in places for walk in self._walks(policy, place)),
                desc="validate",
                unit="query",
                leave=False,
                disable=not self.progress,
            ) as bar,
        ):
            found = [self._validate(policy, place, bar) for place in places]
        policy.train(was_training)
        return found

    def _validate(self, policy: PreTrainedPolicy, place: int, bar: tqdm) -> HeldOutScores:
        began = time.perf_counter()
        task = self.dataset.tasks[place]
        by_episode: dict[int, list[dict[str, np.ndarray]]] = {episode: [] for episode in task.held_out_episodes}
        constant = self._constant_prediction(task)
        key, query = zlib.crc32(task.name.encode()), query_of(policy, self.draws)
        device = next(policy.parameters()).device
        now = self.dataset.actions.tolist().index(0)
        for batch, memory, advance in self._queries(policy, place):
            prepared = preprocess(batch, self.preprocessor, device)
            episodes, frames = batch.origin.episode.tolist(), batch.origin.frame.tolist()
            with self.autocast():
                answers = query(prepared, [(key, *frame) for frame in zip(episodes, frames, strict=True)], memory)
            advance(answers.memory)
            losses, predicted = answers.losses.float().cpu().numpy(), answers.actions.float()
            steps = slice(now, now + predicted.shape[1])
            target = prepared[ACTION][:, steps].float()
            valid = ~(prepared[ACTION_IS_PAD][:, steps, None] | prepared[ACTION_DIM_IS_PAD][:, None, :])
            error = (predicted - target).abs()
            constant_error = (constant.to(target.device) - target).abs()
            for item, episode in enumerate(episodes):
                by_episode[episode].append(
                    {
                        "loss": losses[item],
                        "error": _column_means(error[item], valid[item]),
                        "constant": _column_means(constant_error[item], valid[item]),
                    }
                )
            bar.update(batch.size)
        return self._scores(task, by_episode, time.perf_counter() - began)

    def _walks(self, policy: PreTrainedPolicy, place: int) -> list[Walk]:
        """Queries to make: an episode is one walk where memory recurs, every query its own where it does not."""
        task = self.dataset.tasks[place]
        stride = policy.config.n_action_steps
        episodes = [task.rows_of([episode])[::stride].tolist() for episode in task.held_out_episodes]
        if PolicyTraits.of(policy.config).has_memory:
            return sorted(episodes, key=len, reverse=True)
        return [[row] for rows in episodes for row in rows]

    def _queries(self, policy: PreTrainedPolicy, place: int) -> Iterator[Query]:
        """Batches of queries with the memory they start from; `advance` takes the memory they leave."""
        walks = self._walks(policy, place)
        for first in range(0, len(walks), self.batch_size):
            group = walks[first : first + self.batch_size]
            held: list[MemoryState | None] = [None]
            for query in range(len(group[0])):
                rows = [walk[query] for walk in group if query < len(walk)]  # walks are sorted by length
                if held[0] is not None:
                    held[0] = held[0].select(torch.arange(len(rows)))
                batch = self.dataset.fetch([Draw(place, row, begins=query == 0) for row in rows])
                yield batch, held[0], lambda memory, held=held: held.__setitem__(0, memory)  # type: ignore[misc]

    def _constant_prediction(self, task: Task) -> torch.Tensor:
        """[A] the task's mean training action, normalized: the best that ignores what it sees."""
        mean, std = (self.normalization.array(ACTION, kind) for kind in ("mean", "std"))
        constant = np.zeros_like(mean)
        columns = self.normalization.space.action_columns(task)
        constant[columns] = (task.action[task.train_rows].mean(axis=0) - mean[columns]) / std[columns]
        return torch.from_numpy(constant)

    def _scores(self, task: Task, by_episode: dict[int, list[dict[str, np.ndarray]]], seconds: float) -> HeldOutScores:
        columns = self.normalization.space.action_columns(task)
        std = self.normalization.array(ACTION, "std")
        errors = {
            kind: np.array(
                [np.mean([query[kind] for query in queries], axis=0, dtype=float) for queries in by_episode.values()]
            )
            for kind in ("loss", "error", "constant")
        }  # loss [E], error and constant [E, A]
        in_units = errors["error"].mean(axis=0) * std
        groups = {
            group: float(in_units[np.intersect1d(members, columns)].mean()) if np.isin(members, columns).any() else None
            for group, members in self.normalization.space.action_groups().items()
        }
        return HeldOutScores(
            task=task.name,
            loss=float(errors["loss"].mean()),
            action_error=float(errors["error"][:, columns].mean()),
            action_error_by_group=groups,
            constant_error=float(errors["constant"][:, columns].mean()),
            episodes=tuple(
                EpisodeScore(
                    episode=episode,
                    frames=len(queries),
                    loss=float(errors["loss"][number]),
                    action_error=float(errors["error"][number, columns].mean()),
                )
                for number, (episode, queries) in enumerate(by_episode.items())
            ),
            draws=self.draws,
            seconds=round(seconds, 3),
        )


def mean_loss(found: Iterable[HeldOutScores]) -> float:
    """Over tasks: what the best checkpoint is chosen by."""
    return float(np.mean([scores.loss for scores in found]))


def _column_means(values: torch.Tensor, valid: torch.Tensor) -> np.ndarray:
    """[C, A] → [A], over the valid steps of a chunk; 0 for a dimension without any."""
    counts = valid.sum(dim=0)
    return ((values * valid).sum(dim=0) / counts.clamp_min(1)).cpu().numpy()


def _cuda_devices(policy: PreTrainedPolicy) -> list[int]:
    device = next(policy.parameters()).device
    return [device.index or 0] if device.type == "cuda" else []
