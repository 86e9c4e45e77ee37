"""How often a policy decides rightly where only its memory can know."""

from typing import Any

import numpy as np
from lerobot.utils.constants import ACTION

from benchmarks.memory_suite.data import HeldOut
from benchmarks.memory_suite.layouts import FRAMES_PER_QUERY, Decision, Layout
from kuavo_train.data.dataset import MixedDataset, frames_of_sample
from kuavo_train.data.normalization import Normalization
from kuavo_train.metrics.intervals import wilson
from kuavo_train.probing.memory_decisions import Question, answer_questions
from kuavo_train.probing.memory_walk import MemoryProbe


def probe_of(policy: Any, preprocessor: Any, normalization: Normalization, episodes: HeldOut) -> MemoryProbe:
    dataset = MixedDataset([episodes.task], [episodes.pictures], normalization, **frames_of_sample(policy.config))
    return MemoryProbe(policy, dataset, preprocessor)


def decide(probe: MemoryProbe, normalization: Normalization, episodes: HeldOut) -> dict[str, Any]:
    """Per intervention (see memory_walk) the decisions that are right, for `swapped` those that follow the donor.

    Those of an episode with several decisions are added up.
    """
    walk = probe.walk([probe.queries_of(0, episode) for episode in episodes.task.train_episodes])
    counts: dict[str, list[int]] = {}
    for number in range(len(episodes.layouts[0].decisions)):
        questions = questions_of(episodes, normalization, number)
        for name, row in answer_questions(probe, walk, questions)["interventions"].items():
            before = counts.get(name, [0, 0])
            counts[name] = [before[0] + row["correct"], before[1] + row["n"]]
    return {name: _rate(right, n) for name, (right, n) in counts.items()}


def _rate(right: int, n: int) -> dict[str, Any]:
    interval = wilson(right, n)
    return {"right": right, "n": n, "low": interval.low, "high": interval.high}


def questions_of(episodes: HeldOut, normalization: Normalization, number: int) -> list[Question]:
    """The `number`-th decision of every episode."""
    mean, std = (normalization.array(ACTION, kind) for kind in ("mean", "std"))
    questions: list[Question] = []
    for layout in episodes.layouts:
        decision = layout.decisions[number]
        actions = [(layout.actions(variant) - mean) / std for variant in _by_answer(decision)]
        for answer in decision.answers:
            questions.append(_question(layout, decision, answer, actions, len(questions)))
    return questions


def _by_answer(decision: Decision) -> list[int]:
    """The variant of each answer."""
    return np.argsort(decision.answers).tolist()


def _question(layout: Layout, decision: Decision, answer: int, actions: list[np.ndarray], episode: int) -> Question:
    frame = decision.query * FRAMES_PER_QUERY
    return Question(
        episode=episode,
        cue=answer,
        query=decision.query,
        frame=frame,
        decision_frame=frame,
        cue_seen=decision.cue_ends,
        identical=True,  # `Layout.check`
        actions=actions,
        columns=np.arange(actions[0].shape[1]),
        layout=layout.key[-1],
    )
