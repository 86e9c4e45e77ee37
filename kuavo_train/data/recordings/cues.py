"""What memory must provide, as columns of a dataset say it: the cue, where it shows, where it must be acted on.

Each is a scalar per frame, chosen by a key of the task's file:

    cue_column           whole number or string: the answer that memory must provide at that frame; negative or empty:
                         none. Mostly the same in all frames of an episode.
    cue_visible_column   true where the frame shows the cue
    decision_column      true where the cue must be acted on

A key that is not set takes the column `cue`, `cue_visible` or `decision` where the dataset has one of that kind; an
empty key takes none.
"""

from dataclasses import dataclass

import numpy as np

from kuavo_train.config import StageConfig
from kuavo_train.data.recordings.recording import Recording
from kuavo_train.errors import require

WHOLE = ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
TEXT = ("string",)


@dataclass(frozen=True)
class Cues:
    """
    Attributes:
        columns: of the dataset that these are from.
        answers: [N] whole numbers or strings.
        visible, decision: [N] bool; None where the dataset does not say.
    """

    columns: tuple[str, ...]
    answers: np.ndarray
    visible: np.ndarray | None = None
    decision: np.ndarray | None = None

    @property
    def given(self) -> np.ndarray:
        """[N] whether there is an answer."""
        return self.answers != "" if self.answers.dtype.kind == "U" else self.answers >= 0


def read_cues(stage: StageConfig, recording: Recording, where: str) -> Cues | None:
    """None for a dataset without a column that names the cue.

    Raises:
        ConfigError: a column that is named and not there, or of another kind.
    """
    cue = _chosen(stage.cue_column, "cue", (*WHOLE, *TEXT), recording, f"{where}: cue_column")
    flags = {"cue_visible_column": stage.cue_visible_column, "decision_column": stage.decision_column}
    if cue is None:
        for key, value in flags.items():
            require(not value, f"{where}: {key}", "come with a cue_column that the dataset has", value)
        return None
    chosen = {
        key: _chosen(value, key.removesuffix("_column"), WHOLE, recording, f"{where}: {key}")
        for key, value in flags.items()
    }
    visible, decision = (None if key is None else _read(recording, key).astype(bool) for key in chosen.values())
    columns = (cue, *(key for key in chosen.values() if key is not None))
    return Cues(columns, _read(recording, cue), visible, decision)


def _chosen(named: str | None, default: str, kinds: tuple[str, ...], recording: Recording, key: str) -> str | None:
    """The column that is to be read, if any."""
    about = recording.features.get(default if named is None else named, {})
    fits = about.get("dtype") in kinds and list(about.get("shape", [])) in ([], [1])
    if named is None:
        return default if fits else None
    if not named:
        return None
    require(named in recording.features, key, f"be a column of the dataset ({', '.join(recording.features)})", named)
    got = f"{named} of dtype {about.get('dtype')}, shape {about.get('shape')}"
    require(fits, key, f"be a column of one value per frame, of dtype {' or '.join(kinds)}", got)
    return named


def _read(recording: Recording, key: str) -> np.ndarray:
    """[N] int64 or str."""
    if recording.features[key]["dtype"] in TEXT:
        return recording.texts(key)
    return recording.numbers(key).astype(np.int64)
