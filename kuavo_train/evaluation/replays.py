"""Episodes kept by what the robot did in them, and played again without the policy.

    keep(folder / "weighing.npz", rollouts, fps=10)              # at a stage's end: the best and the typical one
    kept = read_kept(folder / "weighing.npz")
    roll_out(Replay(kept.recordings), environment, [recording.seed for recording in kept.recordings], traces=True)

An episode of a deterministic environment is a function of its seed and the actions. So a few kilobytes stand for all
its pictures, and what is seen again is exactly what was counted, on any machine that simulates alike.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from lerobot.utils.constants import OBS_STATE

from kuavo_train.errors import RunFolderError
from kuavo_train.evaluation.episodes import Rollouts, Trace, best_and_typical
from kuavo_train.runs.files import in_one_move
from kuavo_train.wrapper.policy.robot_io import Actions, Observation


@dataclass(frozen=True)
class Recording:
    """An episode's actions [T, A], and the memory's norms at each [T, tokens]; [T, 0] without memory.

    Attributes:
        rank: best or typical among those it was played with.
        seed: of its layout.
    """

    rank: str
    seed: int
    actions: np.ndarray
    memory_norms: np.ndarray


@dataclass(frozen=True)
class Kept:
    """What a file holds. `fps` is the rate at which the robot acted."""

    fps: float
    recordings: tuple[Recording, ...]


def keep(path: Path, rollouts: Rollouts, *, fps: float) -> None:
    """Write the best and the typical episode of a replayable rollout; without any episode, no file.

    Raises:
        ValueError: they were rolled out with neither traces nor replayable.
    """
    content = {"fps": np.array(fps)}
    for rank, episode in best_and_typical(rollouts.played):
        if episode.trace is None:
            raise ValueError(f"episode {episode.seed} must have a trace to be kept: roll it out with replayable=True")
        content |= {f"{rank}/seed": np.array(episode.seed), **_arrays(rank, episode.trace)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    if len(content) > 1:
        with in_one_move(path) as partial, partial.open("wb") as file:
            np.savez_compressed(file, **content)  # type: ignore[arg-type]


def _arrays(rank: str, trace: Trace) -> dict[str, np.ndarray]:
    norms = np.stack(trace.memory_norms) if trace.memory_norms else np.zeros((len(trace.actions), 0))
    return {f"{rank}/actions": np.stack(trace.actions), f"{rank}/memory_norms": norms}


def read_kept(path: Path) -> Kept | None:
    """What `keep` wrote; None where it is not there.

    Raises:
        RunFolderError: a damaged file.
    """
    if not path.is_file():
        return None
    try:
        with np.load(path) as content:
            ranks = [name.removesuffix("/seed") for name in content.files if name.endswith("/seed")]
            recordings = tuple(
                Recording(
                    rank, int(content[f"{rank}/seed"]), content[f"{rank}/actions"], content[f"{rank}/memory_norms"]
                )
                for rank in ranks
            )
            return Kept(float(content["fps"]), recordings)
    except (ValueError, KeyError, OSError, EOFError) as error:
        raise RunFolderError(f"{path} is damaged ({error}): delete it, or train the stage again") from error


class Replay:
    """In the place of a policy: does again what was done, episode by episode, whatever it is shown.

    Beyond its end an episode holds its last action: it was over there, and is again unless the environment differs.
    """

    n_action_steps = 1

    def __init__(self, recordings: Sequence[Recording]):
        self._recordings: Mapping[int, Recording] = {each.seed: each for each in recordings}
        self._playing: list[Recording] = []
        self._steps: list[int] = []

    def reset(self, indices: Sequence[int] | None = None, *, seeds: Sequence[int] | None = None) -> None:
        """The episode of each seed begins at its place of the batch."""
        anyone = next(iter(self._recordings.values()))
        if indices is None:
            self._playing, self._steps = [anyone for _ in seeds or ()], [-1 for _ in seeds or ()]
            return
        for place, seed in zip(indices, seeds or (), strict=True):
            self._playing[place], self._steps[place] = self._recordings[seed], -1

    def select_action(self, observation: Observation) -> Actions:
        """[B, A] of each place's own episode."""
        assert len(observation[OBS_STATE]) == len(self._playing)
        self._steps = [step + 1 for step in self._steps]
        return np.stack([each.actions[self._at(place)] for place, each in enumerate(self._playing)])

    def due(self) -> Sequence[int]:
        """None: nothing depends on what is seen."""
        return ()

    def memory_norms(self) -> np.ndarray | None:
        """[B, tokens] as they were then."""
        norms = [each.memory_norms[self._at(place)] for place, each in enumerate(self._playing)]
        return np.stack(norms) if all(each.size for each in norms) else None

    def _at(self, place: int) -> int:
        return min(self._steps[place], len(self._playing[place].actions) - 1)
