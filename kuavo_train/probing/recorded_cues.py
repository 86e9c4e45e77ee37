"""Questions about the memory from columns of any dataset (see `kuavo_train.data.recordings.cues`).

Nobody can do a recorded episode again with another cue, so what each cue demands is taken from the training episodes:
the mean of what they do at the same *place*, over those with that cue. A place is

    with decision_column       the first, second, … stretch of frames where it is true
    without                    every query after the cue was last seen, counted from there (cue_visible_column), or
                               every query but an episode's first, counted from the episode's beginning

An answer is right when the denoised action is nearest to the mean of the right cue. The pictures of two episodes differ
in more than the cue and may tell it, so no share of right answers is chance: the memory's part is what reset and
swapped take away.
"""

from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from lerobot.utils.constants import ACTION

from kuavo_train.data.normalization import Normalization
from kuavo_train.data.recordings.cues import Cues
from kuavo_train.data.task import Task
from kuavo_train.probing.cue_source import Asked
from kuavo_train.probing.linear_probe import nearest
from kuavo_train.probing.memory_decisions import Question


@dataclass(frozen=True)
class Moment:
    """Where an episode acts on its cue: frames `first` up to `stop`, which `query` begins at or before.

    Attributes:
        place: moments of one place are compared.
        answer: that memory must provide.
        cue_seen: the last query before this one that shows the cue; None: not said.
    """

    query: int
    first: int
    stop: int
    place: int
    answer: Hashable
    cue_seen: int | None


@dataclass(frozen=True)
class RecordedCues:
    """
    Attributes:
        task: whose episodes are asked about. taught: with the training episodes that they are compared with.
        stride: frames between queries.
    """

    task: Task
    taught: Task
    normalization: Normalization
    stride: int

    def cue_of(self, episode: int) -> Hashable | None:
        return next((moment.answer for moment in moments(self.task, episode, self.stride)), None)

    def ask(self, episodes: Sequence[int]) -> Asked:
        rounds: dict[int, list[Question]] = defaultdict(list)
        left_out = 0
        for episode in episodes:
            for moment in moments(self.task, episode, self.stride):
                if self._is_comparable(moment):
                    rounds[moment.place].append(self._question(episode, moment))
                else:
                    left_out += 1
        if len(self._answers) < 2:
            why = f"the training episodes have {len(self._answers)} cue, 2 or more can be told apart"
        else:
            why = f"none of {left_out} decisions has, at its place, training episodes of all {len(self._answers)} cues"
        columns = ", ".join(_cues(self.task).columns)
        nothing = "" if rounds else f"nothing to decide from memory by {columns}: {why}"
        return Asked([rounds[place] for place in sorted(rounds)], left_out, nothing)

    def labels(self, episodes: Sequence[int]) -> Mapping[int, tuple[int, int]]:
        found = {}
        for episode in episodes:
            first = next(moments(self.task, episode, self.stride), None)
            if first is not None and first.answer in self._answers:
                found[episode] = (self._answers.index(first.answer), first.query)
        return found

    @cached_property
    def _answers(self) -> list[Hashable]:
        """Those of the training episodes, in order."""
        return sorted({answer for known in self._demanded.values() for answer in known}, key=str)

    @cached_property
    def _demanded(self) -> Mapping[int, Mapping[Hashable, np.ndarray]]:
        """Place → answer → [T, A] the mean over the training episodes' actions, normalized, from the decision on."""
        found: dict[int, dict[Hashable, list[np.ndarray]]] = defaultdict(lambda: defaultdict(list))
        for episode in self.taught.train_episodes:
            actions = self._actions(self.taught, episode)
            for moment in moments(self.taught, episode, self.stride):
                found[moment.place][moment.answer].append(actions[moment.first : moment.stop])
        return {
            place: {answer: _mean(actions) for answer, actions in by_answer.items()}
            for place, by_answer in found.items()
        }

    def _is_comparable(self, moment: Moment) -> bool:
        """Whether its answer is known, and training episodes of every answer have such a place."""
        known = self._demanded.get(moment.place, {})
        return len(self._answers) > 1 and moment.answer in known and len(known) == len(self._answers)

    def _question(self, episode: int, moment: Moment) -> Question:
        demanded = [self._demanded[moment.place][answer] for answer in self._answers]
        length = min(moment.stop - moment.first, *map(len, demanded))
        first, stop = moment.first, moment.first + length
        actions = [np.zeros((stop, demanded[0].shape[1]), np.float32) for _ in demanded]
        for own, wanted in zip(actions, demanded, strict=True):
            own[first:] = wanted[:length]
        columns, right = self.normalization.space.action_columns(self.task), self._answers.index(moment.answer)
        done = self._actions(self.task, episode)[None, first:stop, columns]
        told = nearest(
            done, np.stack([wanted[:length, columns] for wanted in demanded])[None], np.ones(done.shape, bool)
        )
        return Question(
            episode=episode,
            cue=right,
            query=moment.query,
            frame=moment.query * self.stride,
            decision_frame=first,
            cue_seen=moment.cue_seen,
            identical=None,
            actions=actions,
            columns=columns,
            distinguished=int(told[0]) == right,
        )

    def _actions(self, task: Task, episode: int) -> np.ndarray:
        """[T, A] the demonstrated ones, normalized; 0 in dimensions that the task lacks."""
        mean, std = (self.normalization.array(ACTION, kind) for kind in ("mean", "std"))
        columns = self.normalization.space.action_columns(task)
        recorded = task.action[slice(*task.bounds[episode])]
        actions = np.zeros((len(recorded), len(mean)), np.float32)
        actions[:, columns] = (recorded - mean[columns]) / std[columns]
        return actions


def moments(task: Task, episode: int, stride: int) -> Iterator[Moment]:
    """Those of an episode, in order; none at its first query, before which nothing is remembered."""
    cues, rows = _cues(task), slice(*task.bounds[episode])
    answers, given = cues.answers[rows].tolist(), cues.given[rows]
    visible = None if cues.visible is None else cues.visible[rows][::stride]  # [Q]
    if cues.decision is None:
        begin = 0 if visible is None else int(np.flatnonzero(visible).max(initial=0))
        spans = [(first, min(first + stride, len(given))) for first in range(0, len(given), stride)]
        places = [(number - begin, span) for number, span in enumerate(spans) if number > begin and given[span[0]]]
    else:
        places = list(enumerate(_stretches(cues.decision[rows] & given, answers)))
    for place, (first, stop) in places:
        query = first // stride
        if query > 0:
            seen = None if visible is None else int(np.flatnonzero(visible[:query]).max(initial=0))
            yield Moment(query, first, stop, place, answers[first], seen)


def _stretches(flags: np.ndarray, answers: Sequence[Hashable]) -> list[tuple[int, int]]:
    """[first, stop) of consecutive true flags with one answer."""
    found: list[tuple[int, int]] = []
    for frame in np.flatnonzero(flags).tolist():
        if found and found[-1][1] == frame and answers[found[-1][0]] == answers[frame]:
            found[-1] = (found[-1][0], frame + 1)
        else:
            found.append((frame, frame + 1))
    return found


def _mean(actions: Sequence[np.ndarray]) -> np.ndarray:
    """[T, A] over those that last so long; T is the longest."""
    longest = max(map(len, actions))
    return np.stack([np.mean([each[step] for each in actions if step < len(each)], axis=0) for step in range(longest)])


def _cues(task: Task) -> Cues:
    assert task.cues is not None, "chosen for tasks with cues"
    return task.cues
