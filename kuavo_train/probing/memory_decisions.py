"""Questions about the memory of a trained policy, and their answers as numbers.

A question stands where a cue that can no longer be seen decides what to do. The answer is judged by whose
demonstrated action it is nearest to, among those of all cues in the same layout.

Letters: E episodes, Q queries, M vectors that a memory holds, C chunk length, A action dimensions.
"""

from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch

from kuavo_train.metrics.intervals import Interval, PairedOutcomes, mean_interval, paired_bootstrap, wilson
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
        cue_seen: the last query, before this one, whose observation depends on the cue; None: not known.
        identical: whether this query's pictures and state are the same whatever the cue; None: not known.
        actions: of the demonstration for each cue in this episode's layout, [T, A], normalized.
        columns: the action dimensions that the task has.
        layout: questions of one layout are asked with the same noise, so that memory alone can tell them apart; None:
            every episode has noise of its own.
        distinguished: whether what the demonstration does is right by the measure that answers are judged by.
    """

    episode: int
    cue: int
    query: int
    frame: int
    decision_frame: int
    cue_seen: int | None
    identical: bool | None
    actions: Sequence[np.ndarray]
    columns: np.ndarray
    layout: int | None = None
    distinguished: bool = True

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


@dataclass(frozen=True)
class Answer:
    """To one question under one intervention.

    Attributes:
        right: whether it is what the cue in memory demands, for `swapped` the donor's; None: the episode has no donor.
        own: whether it is what the episode's own cue demands.
        errors: [n] absolute differences to the demonstration of the episode's own cue, normalized.
    """

    episode: int
    right: bool | None
    own: bool
    errors: np.ndarray


def answer_questions(probe: MemoryProbe, walk: Walk, questions: Sequence[Question]) -> Json:
    """As `answer_rounds`, of one question for each episode of the walk."""
    return answer_rounds(probe, walk, [question.episode for question in questions], [questions])


def answer_rounds(
    probe: MemoryProbe, walk: Walk, episodes: Sequence[int], rounds: Sequence[Sequence[Question]]
) -> Json:
    """Per intervention (see memory_walk): how often the answer is the right one, for `swapped` the donor's.

    `action_error` is the mean absolute difference to the demonstration of the episode's own cue, normalized, over
    the entries that count. The donor is the next episode with another cue. `takes_away` is, per intervention other than
    on, by how much answers are rarer that the episode's own cue demands. Intervals are over episodes.

    Args:
        episodes: those of the walk.
        rounds: questions asked together, at most one of an episode.
    """
    questions = [question for asked in rounds for question in asked]
    answers: dict[str, list[Answer]] = {}
    for asked in rounds:
        taken = walk.select([episodes.index(question.episode) for question in asked])
        for name, found in _answer(probe, taken, asked).items():
            answers.setdefault(name, []).extend(found)
    since = [question.query - question.cue_seen for question in questions if question.cue_seen is not None]
    counted = {name: [each for each in found if each.right is not None] for name, found in answers.items()}
    identical = all(question.identical is not None for question in questions)
    return {
        "n": len(questions),
        "episodes": len({question.episode for question in questions}),
        "chance": 1 / len(questions[0].actions) if identical else None,
        "identical_observations": sum(bool(question.identical) for question in questions) if identical else None,
        "queries_since_cue": float(np.mean(since)) if since else None,
        "distinguished": sum(question.distinguished for question in questions),
        "interventions": {name: _rate(found) for name, found in counted.items() if found},
        "takes_away": {
            name: asdict(_difference(found, answers["on"])) for name, found in counted.items() if found and name != "on"
        },
    }


def _answer(probe: MemoryProbe, walk: Walk, questions: Sequence[Question]) -> dict[str, list[Answer]]:
    """Intervention → the answer to each question, one of each episode of the walk."""
    cues = np.array([question.cue for question in questions])
    donors = [donor_of(cues, place) for place in range(len(cues))]
    pairs = [question.references(probe.policy.config.chunk_size) for question in questions]
    references, valid = (np.stack(parts) for parts in zip(*pairs, strict=True))
    draws = [episode[question.query] for episode, question in zip(walk.episodes, questions, strict=True)]
    noise = seeded_noise(probe.policy, [question.noise_key for question in questions])
    demonstrated = references[np.arange(len(cues)), cues]
    places = [place if donor is None else donor for place, donor in enumerate(donors)]
    at_query, seen = [question.query for question in questions], [question.cue_seen for question in questions]
    found = {}
    for name, memory in probe.intervened(walk, at_query, seen, places).items():
        predicted = probe.predict(draws, memory, noise)
        chosen = nearest(predicted, references, valid)
        in_memory = cues[places] if name == "swapped" else cues
        found[name] = [
            Answer(
                episode=question.episode,
                right=None if name == "swapped" and donors[place] is None else bool(chosen[place] == in_memory[place]),
                own=bool(chosen[place] == question.cue),
                errors=np.abs(predicted[place] - demonstrated[place])[valid[place]],
            )
            for place, question in enumerate(questions)
        ]
    return found


def donor_of(cues: Sequence[Hashable] | np.ndarray, place: int) -> int | None:
    """The next episode, cyclically, that has another cue."""
    for step in range(1, len(cues)):
        other = (place + step) % len(cues)
        if cues[other] != cues[place]:
            return other
    return None


def _rate(answers: Sequence[Answer]) -> Json:
    """Of right answers, each episode counting once; several questions of an episode are no independent trials."""
    by_episode = _by_episode(answers, "right")
    right = np.array([bool(each.right) for each in answers])
    found = _accuracy(right)
    if len(by_episode) < len(answers):
        interval = mean_interval({episode: float(np.mean(of)) for episode, of in by_episode.items()})
        found |= {"accuracy": interval.estimate, "low": interval.low, "high": interval.high}
    return {**found, "action_error": float(np.concatenate([each.errors for each in answers]).mean())}


def _difference(answers: Sequence[Answer], on: Sequence[Answer]) -> Interval:
    """By how much the own cue is acted on more often with memory on, in the episodes of both."""
    with_it, without = _by_episode(on, "own"), _by_episode(answers, "own")
    if all(len(of) == 1 for of in with_it.values()):
        pairs = ({episode: of[0] for episode, of in each.items()} for each in (without, with_it))
        return PairedOutcomes.of(*pairs).difference()
    shares = ({episode: float(np.mean(each[episode])) for episode in without} for each in (without, with_it))
    return paired_bootstrap(*shares)


def _by_episode(answers: Sequence[Answer], what: str) -> dict[int, list[bool]]:
    found: dict[int, list[bool]] = {}
    for each in answers:
        found.setdefault(each.episode, []).append(bool(getattr(each, what)))
    return found


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
