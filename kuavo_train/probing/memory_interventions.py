"""What a task's memory is worth, in numbers of the performance matrix: held-out loss with another memory in its place.

    on        the episode's own, as validated after every stage
    reset     the initial one at every query: nothing is ever remembered
    swapped   that of another held-out episode of the task, the donor, at the same query

The validator, its noise and its times are those of every validation, so `on` is the very cell of R, and what reset and
swapped add to it comes from the memory alone.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

from lerobot.policies.pretrained import PreTrainedPolicy

from kuavo_train.data.batch import Batch
from kuavo_train.evaluation.validation import Query, Validator
from kuavo_train.metrics.intervals import paired_bootstrap
from kuavo_train.metrics.number_format import number, percent, whole_percent
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

    def _queries(self, policy: PreTrainedPolicy, place: int) -> Iterator[Query]:
        for batch, _, _ in super()._queries(policy, place):
            yield batch, self.memory_of(place, batch), lambda memory: None


def validate_with(probe: MemoryProbe, validator: Validator, donors: Mapping[str, Sequence[int]]) -> list[Json]:
    """One record per task named in `donors`: its validation under each intervention, and what they change.

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
    return [_record(dict(zip(found, records, strict=True))) for records in zip(*found.values(), strict=True)]


def _states(walk: Walk) -> Sequence[MemoryState]:
    assert walk.states is not None
    return walk.states


def _record(by_intervention: Mapping[str, HeldOutScores]) -> Json:
    record: Json = {"task": by_intervention["on"].task}
    measures: tuple[HeldOutMeasure, ...] = ("loss", "action_error")
    for measure in measures:
        scores = {name: found.scores(measure) for name, found in by_intervention.items()}
        record[measure] = {name: getattr(found, measure) for name, found in by_intervention.items()}
        record[f"{measure}_change"] = {
            name: asdict(paired_bootstrap(scores["on"], scores[name], relative=True))
            for name in INTERVENTIONS
            if name != "on"
        }
    return record


def donors_among(cues: Sequence[Hashable]) -> list[int]:
    """For each episode the next one, cyclically, that had another cue; where all are alike, the next one."""
    others = [donor_of(cues, place) for place in range(len(cues))]
    return [(place + 1) % len(cues) if other is None else other for place, other in enumerate(others)]


def memory_evidence(record: Json) -> str:
    """One task's record after the last stage, in words."""
    changes = record["loss_change"]
    text = (
        f"Held-out loss {number(record['loss']['on'])} with its memory; {_moved(changes['reset'])} when it is reset at "
        f"every query, {_moved(changes['swapped'])} with that of another episode."
    )
    decision = record["decision"]
    if decision is None:
        return f"{text} No cue of this task has to be remembered."
    right = {name: f"{row['correct']}/{row['n']}" for name, row in decision["interventions"].items()}
    text += (
        f" Where only memory can know the cue it acts rightly in {right['on']} episodes, in {right['reset']} after a "
        f"reset; chance is {whole_percent(decision['chance'])}."
    )
    return text + (f" It follows the donor in {right['swapped']}." if "swapped" in right else "")


def _moved(change: Json) -> str:
    ends = "" if change["low"] is None else f" [{percent(change['low'])}, {percent(change['high'])}]"
    return f"{percent(change['estimate'])}{ends}"
