"""What a task's memory is worth, in numbers of the performance matrix: held-out loss with another memory in its place.

    on        the episode's own, as validated after every stage
    reset     the initial one at every query: nothing is ever remembered
    swapped   that of another held-out episode of the task, the donor, at the same query

The validator, its noise and its times are those of every validation, so `on` is the very cell of R, and what reset and
swapped add to it comes from the memory alone.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Self

from kuavo_train.data.batch import Batch
from kuavo_train.evaluation.validation import Query, Validator
from kuavo_train.metrics.intervals import Interval, paired_bootstrap
from kuavo_train.metrics.number_format import number, whole_percent
from kuavo_train.probing.memory_decisions import donor_of
from kuavo_train.probing.memory_walk import MemoryProbe, Walk
from kuavo_train.reading import Json
from kuavo_train.runs.records import HeldOutMeasure, HeldOutScores
from lerobot_policy_smolvla_memory.memory import MemoryState

INTERVENTIONS = ("on", "reset", "swapped")


@dataclass(frozen=True)
class InterveningValidator(Validator):
    """Runs every query with the memory that `memory_of(place, batch)` gives, in place of its own."""

    memory_of: Callable[[int, Batch], MemoryState | None] = lambda place, batch: None

    def _queries(self, place: int, walks: Sequence[list[int]]) -> Iterator[Query]:
        for batch, _, _ in super()._queries(place, walks):
            yield batch, self.memory_of(place, batch), lambda memory: None


@dataclass(frozen=True)
class HeldOutEffect:
    """One task's held-out measures with memory on, reset and swapped; what depends on the intervention is by its name.

    Attributes:
        loss, action_error: means over episodes.
        loss_change, action_error_change: relative to on.
        loss_lowered: by how much the loss is lower with memory on than under the intervention.
        loss_by_episode: of each held-out episode in turn.
    """

    task: str
    loss: Mapping[str, float]
    loss_change: Mapping[str, Interval]
    loss_lowered: Mapping[str, Interval]
    loss_by_episode: Mapping[str, Sequence[float]]
    action_error: Mapping[str, float | None]
    action_error_change: Mapping[str, Interval]

    @classmethod
    def of(cls, found: Mapping[str, HeldOutScores]) -> Self:
        losses = {name: scores.scores("loss") for name, scores in found.items()}
        others = [name for name in found if name != "on"]
        return cls(
            task=found["on"].task,
            loss={name: scores.loss for name, scores in found.items()},
            loss_change=_changes(found, "loss"),
            loss_lowered={name: paired_bootstrap(losses["on"], losses[name]) for name in others},
            loss_by_episode={name: list(scores.values()) for name, scores in losses.items()},
            action_error={name: scores.action_error for name, scores in found.items()},
            action_error_change=_changes(found, "action_error"),
        )

    def to_json(self) -> Json:
        return asdict(self)


def _changes(found: Mapping[str, HeldOutScores], measure: HeldOutMeasure) -> dict[str, Interval]:
    scores = {name: each.scores(measure) for name, each in found.items()}
    return {name: paired_bootstrap(scores["on"], scores[name], relative=True) for name in scores if name != "on"}


def validate_with(probe: MemoryProbe, validator: Validator, donors: Mapping[str, Sequence[int]]) -> list[HeldOutEffect]:
    """One for each task named in `donors`: its validation under each intervention, and what they change.

    Args:
        validator: that of every validation.
        donors: task → for each of its held-out episodes the place among them of the one that gives its memory.
    """
    names = list(donors)
    walks = {}
    for place, task in enumerate(probe.dataset.tasks):
        if task.name in names:
            walks[place] = probe.walk([probe.queries_of(place, episode) for episode in task.held_out_episodes])

    def donated(place: int, batch: Batch) -> MemoryState:
        task, stride = probe.dataset.tasks[place], probe.policy.config.n_action_steps
        rows = [task.held_out_episodes.index(episode) for episode in batch.origin.episode.tolist()]
        query = int(batch.origin.frame[0]) // stride  # all rows of a batch are at the same query
        return _states(walks[place])[query].select([donors[task.name][row] for row in rows])

    validators = {
        "on": validator,
        "reset": InterveningValidator(**vars(validator)),
        "swapped": InterveningValidator(**vars(validator), memory_of=donated),
    }
    found = {name: validator.validate_all_tasks(probe.policy, names) for name, validator in validators.items()}
    return [HeldOutEffect.of(dict(zip(found, records, strict=True))) for records in zip(*found.values(), strict=True)]


def _states(walk: Walk) -> Sequence[MemoryState]:
    assert walk.states is not None
    return walk.states


def donors_among(cues: Sequence[Hashable]) -> list[int]:
    """For each episode the next one, cyclically, that had another cue; where all are alike, the next one."""
    others = [donor_of(cues, place) for place in range(len(cues))]
    return [(place + 1) % len(cues) if other is None else other for place, other in enumerate(others)]


def memory_evidence(record: Json) -> str:
    """One task's record after the last stage, in words."""
    text = f"Held-out loss {number(record['loss']['on'])}. {' '.join(loss_sentences(record))}"
    decision = record["decision"]
    if decision is None:
        return f"{text} No cue of this task is known."
    right = {name: f"{row['correct']}/{row['n']}" for name, row in decision["interventions"].items()}
    chance = decision["chance"]
    what, by = (
        ("Where the cue must be acted on", "pictures may tell it too")
        if chance is None
        else ("Where only memory can know the cue", f"chance is {whole_percent(chance)}")
    )
    text += f" {what} it acts rightly in {right['on']}, in {right['reset']} after a reset; {by}."
    return text + (f" It follows the donor in {right['swapped']}." if "swapped" in right else "")


def loss_sentences(record: Json) -> list[str]:
    """What memory does to the held-out loss, against reset and against swapped."""
    against = {"reset": "against a reset at every query", "swapped": "against the memory of another episode"}
    return [_lowered(record["loss_lowered"][name], text) for name, text in against.items()]


def _lowered(lowered: Json, against: str) -> str:
    """An interval that holds 0 shows no effect, whatever the estimate."""
    estimate, low, high, n = (lowered[key] for key in ("estimate", "low", "high", "n"))
    if low is None or high is None:
        return f"No effect on the loss shown {against}: a single episode gives no interval."
    interval = f"[{number(low)}, {number(high)}] ({n} episodes)"
    if low <= 0 <= high:
        return f"No effect on the loss shown {against}: lowered by {number(estimate)} {interval}."
    if low > 0:
        return f"Memory lowers the loss by {number(estimate)} {interval} {against}."
    return f"Memory raises the loss by {number(-estimate)} [{number(-high)}, {number(-low)}] ({n} episodes) {against}."
