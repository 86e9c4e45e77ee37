"""What kuavo_sim recorded beside a dataset about its memory cues, and the question that follows from it.

The right answer to the *other* cue in the very same layout comes from kuavo_sim's expert, which does the
recorded episode again with that cue; up to the decision both demonstrations are the same.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from lerobot.utils.constants import ACTION
from tqdm import tqdm

from kuavo_sim.env import KuavoEnv
from kuavo_sim.expert import demonstrate
from kuavo_train.data.normalization import Normalization
from kuavo_train.data.task import Task
from kuavo_train.errors import ConfigError
from kuavo_train.probing.cue_source import Asked
from kuavo_train.probing.memory_decisions import Question
from kuavo_train.reading import Json, read_json
from kuavo_train.runs.files import read_lines


@dataclass(frozen=True)
class SimulatedCues:
    """Of a task with cues that kuavo_sim recorded: one decision of every episode."""

    task: Task
    normalization: Normalization
    stride: int

    def cue_of(self, episode: int) -> Hashable | None:
        return self._entries.get(episode, {}).get("cue")

    def ask(self, episodes: Sequence[int]) -> Asked:
        with tqdm(episodes, desc=f"cues of {self.task.name}", unit="episode", leave=False) as bar:
            questions = [question_of(self.task, self.normalization, self._entries, each, self.stride) for each in bar]
        return Asked([questions])

    def labels(self, episodes: Sequence[int]) -> Mapping[int, tuple[int, int]]:
        entries = {episode: self._entries[episode] for episode in episodes}
        return {each: (about["cue"], about["decision_frames"][0] // self.stride) for each, about in entries.items()}

    @cached_property
    def _entries(self) -> dict[int, Json]:
        return cues_of(self.task)


def cues_of(task: Task) -> dict[int, Json]:
    """Episode → what kuavo_sim recorded beside it; empty for other datasets."""
    return {entry["episode_index"]: entry for entry in read_lines(task.root / "kuavo_sim_episodes.jsonl")}


def has_cues(task: Task) -> bool:
    """Whether the task's episodes have a cue to remember."""
    return any(entry.get("cue") is not None for entry in cues_of(task).values())


def question_of(task: Task, normalization: Normalization, cues: dict[int, Json], episode: int, stride: int) -> Question:
    """The question of an episode: the first query whose executed actions depend on the cue.

    Raises:
        ConfigError: the simulation does not repeat the recorded episode.
    """
    entry = cues[episode]
    settings = read_json(task.root / "recording.json")["settings"]
    keep = ("image_size", "renderer", "phase_visible")
    env = KuavoEnv(settings["task"], **{key: settings[key] for key in keep})
    shown = [
        demonstrate(env, entry["seed"], cue=cue, action_noise=settings["action_noise"])
        for cue in range(len(env.task.cues))
    ]
    recorded = task.action[slice(*task.bounds[episode])]
    same = shown[entry["cue"]].actions
    if same.shape != recorded.shape or not np.allclose(same, recorded, atol=1e-4):
        raise ConfigError(
            f"data: kuavo_sim must repeat episode {episode} of {task.root} (seed {entry['seed']}), got other actions; "
            "it was recorded by another version of the simulation, record it again"
        )
    decision = entry["decision_frames"][0]
    query = decision // stride
    until = slice(decision + 1)
    differs = np.zeros(decision + 1, bool)  # frames whose observation depends on the cue
    own = shown[entry["cue"]]
    for other in shown:
        differs |= (other.states[until] != own.states[until]).any(axis=1)
        for camera, pictures in other.pictures.items():
            differs |= (pictures[until] != own.pictures[camera][until]).any(axis=(1, 2, 3))
    visible = np.flatnonzero(differs[: query * stride + 1 : stride])
    mean, std = (normalization.array(ACTION, kind) for kind in ("mean", "std"))
    columns = normalization.space.action_columns(task)
    actions = []
    for demonstration in shown:
        normalized = np.zeros((len(demonstration.actions), len(mean)), np.float32)
        normalized[:, columns] = (demonstration.actions - mean[columns]) / std[columns]
        actions.append(normalized)
    return Question(
        episode=episode,
        cue=entry["cue"],
        query=query,
        frame=query * stride,
        decision_frame=decision,
        cue_seen=int(visible.max()) if len(visible) else 0,
        identical=not differs[query * stride],
        actions=actions,
        columns=columns,
    )
