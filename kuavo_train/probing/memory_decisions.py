"""Questions about the memory of a trained policy, and their answers as numbers.

A question stands where a cue that can no longer be seen decides what to do. The answer is judged by whose
demonstrated action it is nearest to, among those of all cues in the same layout.

Letters: E episodes, Q queries, M vectors that a memory holds, C chunk length, A action dimensions.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kuavo_train.metrics.intervals import wilson
from kuavo_train.probing.linear_probe import linear_probe, nearest
from kuavo_train.probing.memory_walk import MemoryProbe, Walk, seeded_noise
from kuavo_train.reading import Json

FEWEST_EPISODES = 4  # of each of both sides, for a point of the probe's curve


@dataclass(frozen=True)
class Question:
    """The decision of one episode.

    Attributes:
        query: the decisive one, the last that begins at or before the decision: `decision_frame` is among the actions
            that it executes. frame: the one it is made at.
        cue_seen: the last query, before this one, whose observation depends on the cue.
        identical: whether this query's pictures and state are the same whatever the cue.
        actions: of the demonstration for each cue in this episode's layout, [T, A], normalized.
        columns: the action dimensions that the task has.
        layout: questions of one layout are asked with the same noise, so that memory alone can tell them apart; None:
            every episode has noise of its own.
    """

    episode: int
    cue: int
    query: int
    frame: int
    decision_frame: int
    cue_seen: int
    identical: bool
    actions: Sequence[np.ndarray]
    columns: np.ndarray
    layout: int | None = None

    @property
    def noise_key(self) -> tuple[int, int]:
        return (self.episode if self.layout is None else self.layout, self.frame)

    def references(self, chunk_size: int) -> tuple[np.ndarray, np.ndarray]:
        """Per cue what the demonstration does in the chunk of the query [R, C, A], and which entries count [C, A]:

        those from the decision on, as long as all demonstrations last.
        """
        last = min(map(len, self.actions))
        steps = self.frame + np.arange(chunk_size)
        valid = np.zeros((chunk_size, self.actions[0].shape[1]), bool)
        valid[np.ix_((steps >= self.decision_frame) & (steps < last), self.columns)] = True
        return np.stack([actions[np.minimum(steps, last - 1)] for actions in self.actions]), valid


def answer_questions(probe: MemoryProbe, walk: Walk, questions: Sequence[Question]) -> Json:
    """Per intervention (see memory_walk): how often the answer is the right one, for `swapped` the donor's.

    `action_error` is the mean absolute difference to the demonstration of the episode's own cue, normalized, over
    the entries that count. The donor is the next episode with another cue.
    """
    chunk_size = probe.policy.config.chunk_size
    cues = np.array([question.cue for question in questions])
    donors = [donor_of(cues, place) for place in range(len(cues))]
    pairs = [question.references(chunk_size) for question in questions]
    references, valid = (np.stack(parts) for parts in zip(*pairs, strict=True))
    draws = [episode[question.query] for episode, question in zip(walk.episodes, questions, strict=True)]
    noise = seeded_noise(probe.policy, [question.noise_key for question in questions])
    own = references[np.arange(len(cues)), cues]
    rows = {}
    seen = [question.cue_seen for question in questions]
    have_donor = np.array([donor is not None for donor in donors])
    places = [place if donor is None else donor for place, donor in enumerate(donors)]
    at_query = [question.query for question in questions]
    for name, memory in probe.intervened(walk, at_query, seen, places).items():
        predicted = probe.predict(draws, memory, noise)
        chosen = nearest(predicted, references, valid)
        expected = cues[places] if name == "swapped" else cues
        counted = have_donor if name == "swapped" else np.ones(len(cues), bool)
        error = np.abs(predicted - own)[valid].mean()
        if counted.any():
            found = _accuracy((chosen == expected)[counted])
            rows[name] = {**found, "action_error": float(error)}
    return {
        "n": len(questions),
        "chance": 1 / references.shape[1],
        "identical_observations": sum(question.identical for question in questions),
        "queries_since_cue": float(np.mean([question.query - question.cue_seen for question in questions])),
        "interventions": rows,
    }


def donor_of(cues: Sequence[Hashable] | np.ndarray, place: int) -> int | None:
    """The next episode, cyclically, that has another cue."""
    for step in range(1, len(cues)):
        other = (place + step) % len(cues)
        if cues[other] != cues[place]:
            return other
    return None


def _accuracy(right: np.ndarray) -> Json:
    interval = wilson(int(right.sum()), len(right))
    return {
        "correct": int(right.sum()),
        "n": len(right),
        "accuracy": interval.estimate,
        "low": interval.low,
        "high": interval.high,
    }


def probe_over_time(
    fit: Walk, fit_about: Sequence[tuple[int, int]], walk: Walk, about: Sequence[tuple[int, int]]
) -> list[Json]:
    """How well a linear classifier reads the cue from the memory, query by query, aligned at the decision.

    Fitted on the memories of training episodes, counted on those of `walk`, at each place in time anew.

    Args:
        fit_about, about: (cue, query of the decision) of each episode.
    """
    curve = []
    first, last = -max(query for _, query in about), 3
    for offset in range(first, last):
        known, read_at = (_memories(*pair, offset) for pair in ((fit, fit_about), (walk, about)))
        if min(len(known[1]), len(read_at[1])) < FEWEST_EPISODES or len(np.unique(known[1])) < 2:
            continue
        read = linear_probe(known[0], known[1], read_at[0])
        curve.append({"queries_from_decision": offset, **_accuracy(read == read_at[1])})
    return curve


def _memories(walk: Walk, about: Sequence[tuple[int, int]], offset: int) -> tuple[np.ndarray, np.ndarray]:
    """What is held [N, M·H] before the query `offset` after the decision's, and cues [N], of episodes that have it."""
    features, cues = [], []
    assert walk.states is not None
    for episode, (cue, query) in enumerate(about):
        if 0 <= query + offset <= len(walk.episodes[episode]):
            features.append(walk.states[query + offset].vectors[episode].float().cpu().numpy().ravel())
            cues.append(cue)
    return np.array(features), np.array(cues)


def trace_of(walk: Walk, episode: int) -> Json:
    """Per vector [M] of an episode's memory: norm before each query [Q + 1], change by each, cosine across each [Q]."""
    tokens = walk.tokens(episode)
    norms = np.linalg.norm(tokens, axis=2)
    before, after = tokens[:-1], tokens[1:]
    cosine = (before * after).sum(axis=2) / np.maximum(norms[:-1] * norms[1:], 1e-12)
    return {
        "norm": norms.T.round(5).tolist(),
        "change": np.linalg.norm(after - before, axis=2).T.round(5).tolist(),
        "cosine": cosine.T.round(5).tolist(),
    }


def attention_at(probe: MemoryProbe, walk: Walk, queries: Sequence[int], noise: torch.Tensor) -> dict[str, float]:
    """Attention of the action tokens, see `MemoryProbe.attention`, at one query of each episode."""
    draws = [episode[query] for episode, query in zip(walk.episodes, queries, strict=True)]
    return probe.attention(draws, walk.before(queries), noise)
