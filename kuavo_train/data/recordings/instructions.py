"""The instructions of a task's episodes: one sentence, one drawn from several, or what the dataset itself says."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kuavo_train.config import FROM_DATASET
from kuavo_train.data.recordings.recording import Recording, episode_list
from kuavo_train.errors import ConfigError


@dataclass(frozen=True)
class Instructions:
    """
    Attributes:
        texts: all instructions of the task, in one line each; the first stands for the task where one has to.
        of_row: [N] place in `texts` of each row's instruction.
        recorded: what the dataset says → in how many of the episodes in use.
        own: whether `texts` are the dataset's, each where the dataset has it.
    """

    texts: tuple[str, ...]
    of_row: np.ndarray
    recorded: dict[str, int]
    own: bool = False

    @classmethod
    def always(cls, text: str, rows: int) -> "Instructions":
        """The same sentence in all of a task's rows."""
        return cls((text,), np.zeros(rows, dtype=np.int64), {})

    def counts(self, episode: np.ndarray, used: Sequence[int]) -> dict[str, int]:
        """Instruction → in how many of the episodes `used`; `episode` [N] is that of each row."""
        places = {number: np.unique(self.of_row[episode == number]) for number in used}
        return {text: sum(place in found for found in places.values()) for place, text in enumerate(self.texts)}


def task_instructions(
    given: str | Sequence[str],
    recording: Recording,
    task_index: np.ndarray | None,
    episode: np.ndarray,
    used: Sequence[int],
    *,
    key: tuple[int, str],
    where: str,
) -> Instructions:
    """
    Args:
        given: `stage.instruction`.
        task_index: [N] of the dataset's rows; None where it has none.
        episode: [N] of each row.
        used: episodes that are trained on or held out.
        key: (seed, task) of the draw: an episode has the same at every stage.

    Raises:
        ConfigError: `dataset`, but the dataset does not say what was to be done in an episode in use.
    """
    in_use = np.isin(episode, used)
    recorded, of_row, silent = _recorded(recording, task_index, episode, in_use)
    counts = {text: len(np.unique(episode[in_use & (of_row == place)])) for place, text in enumerate(recorded)}
    if given in (FROM_DATASET, [FROM_DATASET]):
        for wrong in unknown_task_notes(recording, task_index, episode, used):
            raise ConfigError(f"{where}: {wrong}")
        if len(silent):
            raise ConfigError(
                f"{where}: instruction: {FROM_DATASET} takes the dataset's own sentences, but meta/tasks.parquet has "
                f"none for {episode_list(silent)}; write them there, or give the instruction in the task's file"
            )
        return Instructions(tuple(recorded), np.maximum(of_row, 0), counts, own=True)
    texts = [one_line(text) for text in ([given] if isinstance(given, str) else given)]
    drawn = np.zeros(int(episode.max(initial=0)) + 1, dtype=np.int64)
    if len(texts) > 1:
        seed, task = key
        for number in np.unique(episode):
            digest = hashlib.sha256(f"{seed}/{task}/{number}/instruction".encode()).digest()
            drawn[number] = int.from_bytes(digest[:8]) % len(texts)
    return Instructions(tuple(texts), drawn[episode], counts)


def unknown_task_notes(
    recording: Recording, task_index: np.ndarray | None, episode: np.ndarray, used: Sequence[int]
) -> list[str]:
    """Rows of the episodes in use that are of a task which meta/tasks.parquet does not have: the rows are wrong."""
    if task_index is None:
        return []
    known = list(recording.sentences)
    wrong = np.isin(episode, used) & ~np.isin(task_index, known)
    if not wrong.any():
        return []
    return [
        f"rows of {episode_list(np.unique(episode[wrong]))} have the task_index {task_index[wrong][0]}, which "
        f"meta/tasks.parquet does not have ({', '.join(map(str, known)) or 'it is empty'}); correct the rows, or "
        "record or convert it again"
    ]


def _recorded(
    recording: Recording, task_index: np.ndarray | None, episode: np.ndarray, in_use: np.ndarray
) -> tuple[list[str], np.ndarray, np.ndarray]:
    """The dataset's sentences that are in use, the place of each row's among them (or −1), the episodes without one."""
    of_row = np.full(len(episode), -1)
    texts: list[str] = []
    for number in np.unique(task_index[in_use]) if task_index is not None else ():
        text = one_line(recording.sentences.get(int(number), ""))
        if text:
            if text not in texts:
                texts.append(text)
            of_row[task_index == number] = texts.index(text)
    return texts, of_row, np.unique(episode[in_use & (of_row < 0)])


def one_line(text: str) -> str:
    """An instruction as the policy reads it in training and on the robot."""
    return " ".join(text.split())
