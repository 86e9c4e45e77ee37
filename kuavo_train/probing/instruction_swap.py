"""Does the policy listen to language? A task's held-out frames again, with another task's instruction.

Observation, memory, noise and weights are the same both times, so a difference of the predicted actions comes from
the words alone. Two yardsticks stand beside it: how far the actions move when only the noise is another (the policy's
own spread), and what the other words do to the action error.

All numbers are in normalised units, over the action dimensions that the task has and the steps inside the episode;
means over the queries of an episode, intervals over episodes.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict

import numpy as np

from kuavo_train.data.task import Task
from kuavo_train.metrics.intervals import Interval, Scores, paired_bootstrap
from kuavo_train.metrics.number_format import number, percent
from kuavo_train.probing.memory_walk import MemoryProbe, seeded_noise
from kuavo_train.reading import Json


def swap_instructions(probe: MemoryProbe, names: Sequence[str], *, advance: Callable[[], object]) -> list[Json]:
    """One record per named task: what each other task's instruction does to the actions predicted on its frames.

    Args:
        advance: called once for each query of an episode, for a bar.
    """
    tasks = [task for task in probe.dataset.tasks if task.name in names]
    return [_swapped(probe, task, [other for other in tasks if other is not task], advance) for task in tasks]


def _swapped(probe: MemoryProbe, task: Task, others: Sequence[Task], advance: Callable[[], object]) -> Json:
    place = probe.dataset.tasks.index(task)
    key = zlib.crc32(task.name.encode())
    walk = probe.walk([probe.queries_of(place, episode) for episode in task.held_out_episodes])
    sums: dict[str, dict[int, list[float]]] = {}

    def note(kind: str, episodes: Sequence[int], values: np.ndarray) -> None:
        for episode, value in zip(episodes, values, strict=True):
            sums.setdefault(kind, {}).setdefault(episode, []).append(float(value))

    for query in range(max(map(len, walk.episodes))):
        rows = [row for row, draws in enumerate(walk.episodes) if query < len(draws)]
        draws = [walk.episodes[row][query] for row in rows]
        episodes = [task.held_out_episodes[row] for row in rows]
        memory = walk.states[query].select(rows) if walk.states is not None else None
        noise, other_noise = (
            seeded_noise(probe.policy, [[key, episode, int(task.frame[draw.row]), number] for episode, draw in pairs])
            for number, pairs in ((number, list(zip(episodes, draws, strict=True))) for number in (0, 1))
        )
        target, valid = probe.target(draws)
        own = probe.predict(draws, memory, noise)
        note("error", episodes, _mean(own - target, valid))
        note("noise", episodes, _mean(probe.predict(draws, memory, other_noise) - own, valid))
        for other in others:
            swapped = probe.predict(draws, memory, noise, instruction=other.instruction)
            note(f"change/{other.name}", episodes, _mean(swapped - own, valid))
            note(f"error/{other.name}", episodes, _mean(swapped - target, valid))
        advance()
    scores = {kind: {e: float(np.mean(values)) for e, values in found.items()} for kind, found in sums.items()}
    swaps = [_swap(scores, other.name) for other in others]
    any_other = {
        e: float(np.mean([scores[f"change/{other.name}"][e] for other in others]))
        for e in (task.held_out_episodes if others else ())
    }
    record = {
        "task": task.name,
        "episodes": len(task.held_out_episodes),
        "error": float(np.mean(list(scores["error"].values()))),
        "noise": asdict(_level(scores["noise"])),
        "change": asdict(_level(any_other)) if others else None,
        "against_noise": asdict(paired_bootstrap(scores["noise"], any_other)) if others else None,
        "swaps": swaps,
    }
    return record | {"evidence": _evidence(record)}


def _swap(scores: Mapping[str, Scores], other: str) -> Json:
    return {
        "instruction_of": other,
        "change": asdict(_level(scores[f"change/{other}"])),
        "error": float(np.mean(list(scores[f"error/{other}"].values()))),
        "error_change": asdict(paired_bootstrap(scores["error"], scores[f"error/{other}"])),
    }


def _level(scores: Scores) -> Interval:
    """The mean over episodes with its interval."""
    return paired_bootstrap(dict.fromkeys(scores, 0.0), scores)


def _mean(difference: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """[E] mean absolute difference [E, C, A] over the valid entries of each row."""
    return (np.abs(difference) * valid).sum(axis=(1, 2)) / np.maximum(valid.sum(axis=(1, 2)), 1)


def _evidence(record: Json) -> str:
    if record["change"] is None:
        return "There is no other task whose instruction could be read instead."
    change, against, noise = record["change"], record["against_noise"], record["noise"]
    text = (
        f"Another task's instruction moves the predicted action by {number(change['estimate'])}, another noise by "
        f"{number(noise['estimate'])}"
    )
    if against["low"] is None:
        verdict = "one episode cannot say which is more"
    elif against["low"] > 0:
        verdict = "the policy listens to the words"
    elif against["high"] < 0:
        verdict = "the words move it less than its own spread does"
    else:
        verdict = "the words move it as much as its own spread does"
    worse = [swap["error"] / record["error"] - 1 for swap in record["swaps"]] if record["error"] else []
    effect = f" The action error changes by {percent(float(np.mean(worse)))} with the wrong words." if worse else ""
    return f"{text}: {verdict}.{effect}"
