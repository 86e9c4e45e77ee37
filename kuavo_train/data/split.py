"""Which episodes are held out: chosen once, by a seeded hash."""

import hashlib
from collections.abc import Iterable

from kuavo_train.config import DataConfig, StageConfig
from kuavo_train.errors import ConfigError


def split_episodes(
    task: str, episodes: Iterable[int], held_out: int, seed: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(training, held-out) episodes: held out are those whose seeded hash of (task, episode) is smallest.

    The order of hashes does not depend on the other episodes, so a longer dataset changes the split little.
    """
    episodes = list(episodes)
    if len(episodes) <= held_out:
        raise ConfigError(
            f"data.held_out_episodes must be less than the {len(episodes)} episodes of {task}, got {held_out}"
        )
    by_hash = sorted(episodes, key=lambda episode: hashlib.sha256(f"{seed}/{task}/{episode}".encode()).digest())
    return tuple(sorted(by_hash[held_out:])), tuple(sorted(by_hash[:held_out]))


def split_usable(
    stage: StageConfig, total: int, config: DataConfig, where: str
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    first, last = stage.episodes or (0, total - 1)
    if last >= total:
        raise ConfigError(
            f"{where}: stage.episodes must end before {total}, the number of episodes, got {stage.episodes}"
        )
    return split_episodes(stage.name, range(first, last + 1), config.held_out_episodes, config.split_seed)
