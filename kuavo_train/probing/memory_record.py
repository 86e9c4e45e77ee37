"""What memory.json holds."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from kuavo_train.reading import Json, JsonValue


@dataclass(frozen=True)
class MemoryReport:
    """
    Attributes:
        run, checkpoint, stage, task, data: what was looked at; `data` is the dataset's folder.
        episodes: of `data`, in the order of all that is listed by episode.
        memory: the policy's settings of it.
        cue_columns: of the dataset, where a cue is named by columns.
        trace: per memory token over the first episode: `norm`, `change`, `cosine`; None without memory.
        held_out: the loss with another memory in its place, as `HeldOutEffect` has it; None without memory.
        decision: as `memory_decisions.answer_rounds` gives it; None where nothing can be asked.
        decisions_left_out: those that no training episodes can be compared with.
        no_decision: why nothing can be asked.
        probe: how well a linear classifier reads the cue, query by query.
        attention: share of the action tokens' attention by kind of token.
    """

    run: str
    checkpoint: str
    stage: str
    task: str
    data: str
    episodes: Sequence[int]
    memory: Mapping[str, JsonValue]
    cue_columns: Sequence[str]
    trace: Json | None
    held_out: Json | None
    decision: Json | None
    decisions_left_out: int
    no_decision: str
    probe: Sequence[Json] | None
    attention: Mapping[str, float]

    def to_json(self) -> Json:
        """Without what does not apply."""
        return {key: value for key, value in asdict(self).items() if value is not None}
