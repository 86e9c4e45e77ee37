"""What is kept of a task's training data for replay in later stages: how much, and which part of it.

Chosen once, when the task has been learnt, as a pure function of the run's seed and of the task's own data. A smaller
buffer of random episodes lies within a larger one. Held-out episodes are never among them, and the statistics stay
those of all training episodes.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from fractions import Fraction
from types import MappingProxyType
from typing import Self

import numpy as np

from kuavo_train.config import ReplayConfig
from kuavo_train.data.replay.phases import phases_of
from kuavo_train.data.task import Task
from kuavo_train.errors import require
from kuavo_train.reading import Json


@dataclass(frozen=True)
class Kept:
    """What of a task's training data may be replayed.

    Attributes:
        task: its name.
        chosen_by: the settings of the choice, `seed` among them.
        episodes: ascending; with `unit: frame` those that any of the kept frames is from.
        frames: how many are kept.
        of_episodes, of_frames: of the training data that they were chosen from.
        found: what the choice went by, where that is more than a hash: frames of each phase, losses.
        frame_numbers: with `unit: frame` episode → its frames that are kept, ascending; None where it is kept whole.
    """

    task: str
    chosen_by: Json
    episodes: tuple[int, ...]
    frames: int
    of_episodes: int
    of_frames: int
    found: Json = field(default_factory=dict)
    frame_numbers: Mapping[str, list[int]] | None = None

    def rows(self, task: Task) -> np.ndarray:
        """Of the task's dataset those that samples may be of, ascending."""
        if self.frame_numbers is None:
            return task.queries_of(self.episodes)
        return np.concatenate([task.bounds[e, 0] + np.array(self.frame_numbers[str(e)]) for e in self.episodes])

    def to_json(self) -> Json:
        return {**asdict(self), "episodes": list(self.episodes)}

    @classmethod
    def names(cls) -> list[str]:
        """Keys of its JSON."""
        return [each.name for each in fields(cls)]

    @classmethod
    def from_json(cls, content: Json) -> Self:
        return cls(**{**{name: content[name] for name in cls.names()}, "episodes": tuple(content["episodes"])})

    def check_settings(self, config: ReplayConfig, seed: int, where: str) -> None:
        """Raises `ConfigError` that names the setting by which something else would be kept."""
        for key, value in chosen_by(config, seed).items():
            was = self.chosen_by.get(key)
            require(was == value, key, f"be {was!r}, by which {where} was chosen", value)

    def check(self, task: Task, config: ReplayConfig, seed: int, where: str) -> None:
        """Raises `ConfigError` unless this is what settings and data of now would keep."""
        self.check_settings(config, seed, where)
        measured = self.found.get("losses")
        valid = config.select != "loss" or sorted(measured or ()) == sorted(map(str, task.train_episodes))
        losses = {int(episode): loss for episode, loss in measured.items()} if valid and measured else {}
        valid = valid and self == choose(task, config, seed, losses)
        require(valid, where, f"be the choice for the data of {task.name} as they are now", list(self.episodes))


def chosen_by(config: ReplayConfig, seed: int) -> Json:
    """All that a choice depends on beside the data, by key."""
    return {**{f"replay.{key}": getattr(config, key) for key in ("buffer", "unit", "select")}, "seed": seed}


def choose(task: Task, config: ReplayConfig, seed: int, losses: Mapping[int, float] = MappingProxyType({})) -> Kept:
    """What is kept of the task: its share of the training episodes or of their frames, rounded, and at least one.

    Args:
        losses: with `select: loss` training episode → that of the policy when it has learnt the task.
    """
    if config.unit == "frame":
        return _choose_frames(task, config, seed)
    count = kept_count(config.buffer, len(task.train_episodes))
    ranked = _by_hash(task.name, task.train_episodes, seed)
    found: Json = {}
    if config.select == "phase":
        ranked, found = _balanced(task, ranked, count)
    elif config.select == "loss":
        ranked = sorted(ranked, key=lambda episode: -losses[episode])
        found = {"losses": {str(episode): losses[episode] for episode in task.train_episodes}}
    episodes = tuple(sorted(ranked[:count]))
    return Kept(
        task=task.name,
        chosen_by=chosen_by(config, seed),
        episodes=episodes,
        frames=len(task.rows_of(episodes)),
        of_episodes=len(task.train_episodes),
        of_frames=task.train_frames,
        found=found,
    )


def _choose_frames(task: Task, config: ReplayConfig, seed: int) -> Kept:
    rows = task.queries_of(task.train_episodes)
    found: Json = {}
    named = {f"{task.episode[row]}/{task.frame[row]}": int(row) for row in rows}
    ranked = np.array([named[name] for name in _by_hash(task.name, named, seed)])
    count = kept_count(config.buffer, len(rows))
    if config.select == "phase":
        phases = phases_of(task)
        ranked = ranked[np.argsort(_place_within(phases.of_row[ranked]), kind="stable")]
        frames = np.bincount(phases.of_row[ranked[:count]], minlength=phases.count)
        found = {"phases": phases.source, "frames_of_phases": frames.tolist()}
    chosen = np.sort(ranked[:count])
    episodes = np.unique(task.episode[chosen]).tolist()
    return Kept(
        task=task.name,
        chosen_by=chosen_by(config, seed),
        episodes=tuple(episodes),
        frames=count,
        of_episodes=len(task.train_episodes),
        of_frames=len(rows),
        found=found,
        frame_numbers={str(e): task.frame[chosen[task.episode[chosen] == e]].tolist() for e in episodes},
    )


def _place_within(phases: np.ndarray) -> np.ndarray:
    """[N] how many of the same phase [N] come before."""
    place = np.empty_like(phases)
    for phase in np.unique(phases):
        mine = phases == phase
        place[mine] = np.arange(mine.sum())
    return place


def kept_count(share: float | None, total: int) -> int:
    """How many of `total` are kept: halves are rounded up, and one is always kept; all without a share."""
    return total if share is None else max(1, math.floor(Fraction(str(share)) * total + Fraction(1, 2)))


def _by_hash[T](task: str, items: Iterable[T], seed: int) -> list[T]:
    """In the order of their seeded hashes, which is none of that by which episodes are held out."""
    return sorted(items, key=lambda item: hashlib.sha256(f"replay/{seed}/{task}/{item}".encode()).digest())


def _balanced(task: Task, episodes: Sequence[int], count: int) -> tuple[list[int], Json]:
    """So many of the episodes, one after another the one that makes frames of all phases most equal in number.

    Args:
        episodes: of those that do so alike, the first is taken.
    """
    phases = phases_of(task)
    frames = np.stack([np.bincount(phases.of_row[task.rows_of([e])], minlength=phases.count) for e in episodes])
    left, chosen, total = list(range(len(episodes))), [], np.zeros(phases.count)
    for _ in range(count):
        together = total + frames[left]
        uneven = ((together / together.sum(axis=1, keepdims=True) - 1 / phases.count) ** 2).sum(axis=1)
        chosen.append(left.pop(int(uneven.argmin())))
        total += frames[chosen[-1]]
    found = {"phases": phases.source, "frames_of_phases": total.astype(int).tolist()}
    return [episodes[place] for place in chosen], found
