"""validate_all_tasks: the same held-out questions at every stage.

A policy's loss depends on what it draws at random, as noise and time of flow matching. Here that is a function of
(task, episode, frame, draw); predictions.py says how. Frames are visited as the robot would: in episode order, one
every `n_action_steps`, memory carried from query to query. Training's random state is not touched.
"""

import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import batched

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
Part = tuple[int, list[Walk]]
"""Place of a task, and walks of its that are queried together, longest first."""

Query = tuple[Batch, MemoryState | None, Callable[[MemoryState | None], None]]
"""One query of some walks, the memory before it, and what takes the memory after it."""


@dataclass(frozen=True)
class Measured:
    """What the queries of a part have given.

    Attributes:
        place: of the task.
        by_episode: held-out episode → of each of its queries the loss, and by action dimension the error and that of
            the constant prediction.
    """

    place: int
    by_episode: dict[int, list[dict[str, np.ndarray]]]
    seconds: float


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
        return self.scores([self.measure(policy, names)], names)

    def measure(
        self, policy: PreTrainedPolicy, names: Sequence[str], *, process: int = 0, processes: int = 1
    ) -> dict[int, Measured]:
        """The share of a process in the queries: number of a part → what it has given.

        What is queried together stays together, so that every number is the one that a single process comes to.
        """
        was_training = policy.training
        policy.eval()
        parts = self._parts(policy, names)
        mine = shared_out([sum(map(len, walks)) for _, walks in parts], processes)[process]
        with (
            torch.no_grad(),
            torch.random.fork_rng(devices=_cuda_devices(policy)),
            tqdm(
                total=sum(len(walk) for number in mine for walk in parts[number][1]),
                desc="validate",
                unit="query",
                leave=False,
                disable=not self.progress,
            ) as bar,
        ):
            found = {number: self._measure(policy, parts[number], bar) for number in mine}
        policy.train(was_training)
        return found

    def scores(self, shares: Iterable[Mapping[int, Measured]], names: Sequence[str]) -> list[HeldOutScores]:
        """Of each named task, from what all processes have measured."""
        measured = {number: each for share in shares for number, each in share.items()}
        found = [measured[number] for number in sorted(measured)]
        return [
            self._scores(task, [each for each in found if each.place == place])
            for place, task in enumerate(self.dataset.tasks)
            if task.name in names
        ]

    def _measure(self, policy: PreTrainedPolicy, part: Part, bar: tqdm) -> Measured:
        began = time.perf_counter()
        place, walks = part
        task = self.dataset.tasks[place]
        by_episode: dict[int, list[dict[str, np.ndarray]]] = defaultdict(list)
        constant = self._constant_prediction(task)
        key, query = zlib.crc32(task.name.encode()), query_of(policy, self.draws)
        device = next(policy.parameters()).device
        now = self.dataset.actions.tolist().index(0)
        for batch, memory, advance in self._queries(place, walks):
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
        return Measured(place, dict(by_episode), time.perf_counter() - began)

    def _parts(self, policy: PreTrainedPolicy, names: Sequence[str]) -> list[Part]:
        """All queries to make: task by task, as many walks together as a batch has rows."""
        places = [place for place, task in enumerate(self.dataset.tasks) if task.name in names]
        return [
            (place, list(walks)) for place in places for walks in batched(self._walks(policy, place), self.batch_size)
        ]

    def _walks(self, policy: PreTrainedPolicy, place: int) -> list[Walk]:
        """Queries to make: an episode is one walk where memory recurs, every query its own where it does not."""
        task = self.dataset.tasks[place]
        stride = policy.config.n_action_steps
        episodes = [task.rows_of([episode])[::stride].tolist() for episode in task.validated]
        if PolicyTraits.of(policy.config).has_memory:
            return sorted(episodes, key=len, reverse=True)
        return [[row] for rows in episodes for row in rows]

    def _queries(self, place: int, walks: Sequence[Walk]) -> Iterator[Query]:
        """Batches of queries with the memory they start from; `advance` takes the memory they leave."""
        held: list[MemoryState | None] = [None]
        for query in range(len(walks[0])):
            rows = [walk[query] for walk in walks if query < len(walk)]  # walks are sorted by length
            if held[0] is not None:
                held[0] = held[0].select(torch.arange(len(rows)))
            batch = self.dataset.fetch([Draw(place, row, begins=query == 0) for row in rows])
            yield batch, held[0], lambda memory: held.__setitem__(0, memory)

    def _constant_prediction(self, task: Task) -> torch.Tensor:
        """[A] the task's mean training action, normalized: the best that ignores what it sees."""
        mean, std = (self.normalization.array(ACTION, kind) for kind in ("mean", "std"))
        constant = np.zeros_like(mean)
        columns = self.normalization.space.action_columns(task)
        constant[columns] = (task.mean_action - mean[columns]) / std[columns]
        return torch.from_numpy(constant)

    def _scores(self, task: Task, measured: Sequence[Measured]) -> HeldOutScores:
        by_episode = {
            episode: [query for each in measured for query in each.by_episode.get(episode, [])]
            for episode in task.validated
        }
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
            seconds=round(sum(each.seconds for each in measured), 3),
        )


def shared_out(costs: Sequence[int], processes: int) -> list[list[int]]:
    """Places of `costs` by process: the dearest first, each to who has the least so far."""
    shares: list[list[int]] = [[] for _ in range(processes)]
    for place in sorted(range(len(costs)), key=lambda place: -costs[place]):
        min(shares, key=lambda share: sum(costs[each] for each in share)).append(place)
    return [sorted(share) for share in shares]


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
