"""Where the questions about a task's memory come from: kuavo_sim, columns of the dataset, or nowhere."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from kuavo_train.probing.memory_decisions import Question


@dataclass(frozen=True)
class Asked:
    """
    Attributes:
        rounds: questions that are asked together, at most one of an episode; the donor's is of the same round.
        left_out: decisions of the episodes that are not asked, since nothing can be compared with them.
        nothing: why there is no round.
    """

    rounds: Sequence[Sequence[Question]]
    left_out: int = 0
    nothing: str = ""

    def first_of(self, episode: int) -> Question | None:
        return next((each for asked in self.rounds for each in asked if each.episode == episode), None)


class CueSource(Protocol):
    """What the memory of a task must provide."""

    def cue_of(self, episode: int) -> Hashable | None:
        """The cue that stands for an episode: its donor has another."""
        ...

    def ask(self, episodes: Sequence[int]) -> Asked: ...

    def labels(self, episodes: Sequence[int]) -> Mapping[int, tuple[int, int]]:
        """Episode → (its cue as questions number it, query of its first decision), of those that have one."""
        ...


class NoCues:
    """Of a dataset that does not say what must be remembered."""

    def cue_of(self, episode: int) -> Hashable | None:
        return None

    def ask(self, episodes: Sequence[int]) -> Asked:
        return Asked((), nothing="no cue in this task's data: nothing to decide from memory")

    def labels(self, episodes: Sequence[int]) -> Mapping[int, tuple[int, int]]:
        return {}
