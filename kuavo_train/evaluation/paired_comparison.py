"""Episodes of policies → their numbers, and how the policies differ on the same seeds. Pure functions.

Success has Wilson's interval, its difference Newcombe's and McNemar's exact two-sided test; means have bootstrap
intervals over episodes, differences of means paired ones (see `statistics`). An episode whose environment failed counts
for nobody, and its seed for no difference.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict

import numpy as np

from kuavo_train.evaluation.episodes import Episode
from kuavo_train.metrics.intervals import PairedOutcomes, mean_interval, paired_bootstrap, wilson
from kuavo_train.reading import Json

"""Key that pairs the episodes of different policies, such as (task, seed) → episode."""

MEANS: dict[str, Callable[[Episode], float]] = {
    "progress": lambda episode: episode.progress,
    "reward": lambda episode: episode.reward,
    "steps": lambda episode: float(episode.steps),
    "roughness": lambda episode: episode.roughness,
}


def judge[K](episodes: Mapping[K, Episode]) -> Json:
    """One policy's numbers; `success` and all means are None when no episode could be played."""
    played = {key: episode for key, episode in episodes.items() if episode.error is None}
    failures = [f"seed {episode.seed}: {episode.error}" for episode in episodes.values() if episode.error is not None]
    if not played:
        nothing: Json = {"smoothness": {}, "held": None, "funnel": [], "branches": None}
        return {"success": None, **dict.fromkeys(MEANS), **nothing, "failures": failures}
    successes = sum(episode.success for episode in played.values())
    return {
        "success": {"successes": successes, **asdict(wilson(successes, len(played)))},
        **{name: asdict(mean_interval({k: of(e) for k, e in played.items()})) for name, of in MEANS.items()},
        "smoothness": _smoothness(played),
        "held": sum(e.held for e in played.values()) / max(1, sum(e.steps for e in played.values())),
        "funnel": _funnel(played),
        "branches": _branches(played),
        "failures": failures,
    }


def _smoothness[K](played: Mapping[K, Episode]) -> Json:
    """Joint group → measure → mean over the episodes in which there was something to measure."""
    found: dict[str, dict[str, float | None]] = {}
    for group in dict.fromkeys(group for episode in played.values() for group in episode.smoothness):
        of_group = [asdict(episode.smoothness[group]) for episode in played.values() if group in episode.smoothness]
        known = {name: [each[name] for each in of_group if each[name] is not None] for name in of_group[0]}
        found[group] = {name: float(np.mean(values)) if values else None for name, values in known.items()}
    return found


def _funnel[K](played: Mapping[K, Episode]) -> list[Json]:
    """Sub-goal by sub-goal, in order: how many episodes reached it, and in which step at the median."""
    names = next(iter(played.values())).subgoals
    rows = []
    for name in names:
        steps = [step for episode in played.values() if (step := episode.subgoals.get(name)) is not None]
        rate = wilson(len(steps), len(played))
        rows.append(
            {"name": name, "count": len(steps), **asdict(rate), "step": float(np.median(steps)) if steps else None}
        )
    return rows


def _branches[K](played: Mapping[K, Episode]) -> Json | None:
    """Of the episodes that came to act on a cue, how many on the right one; None where none did."""
    acted = [episode.right_branch for episode in played.values() if episode.right_branch is not None]
    return {"right": sum(acted), **asdict(wilson(sum(acted), len(acted)))} if acted else None


def differ[K](episodes: Mapping[K, Episode], reference: Mapping[K, Episode]) -> Json | None:
    """`episodes` less `reference`, over the keys that both have played; None when there is none."""
    pairs = [
        key
        for key, episode in episodes.items()
        if key in reference and episode.error is None and reference[key].error is None
    ]
    if not pairs:
        return None
    outcomes = PairedOutcomes.of(*({key: of[key].success for key in pairs} for of in (reference, episodes)))
    progress = ({n: of[key].progress for n, key in enumerate(pairs)} for of in (reference, episodes))
    return {
        "n": len(pairs),
        "success": asdict(outcomes.difference()),
        "won": outcomes.only_second,
        "lost": outcomes.only_first,
        "p_value": outcomes.p_value,
        "progress": asdict(paired_bootstrap(*progress)),
    }
