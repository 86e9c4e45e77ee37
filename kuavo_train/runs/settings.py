"""Which settings a stage answers for: what it was begun with against what it is called with now, key by key.

A stage's config.yaml is what its files mean. A key that differs later is obeyed where it cannot change the result
(`FREE`) or is only measured with (`MEASURED`, while the stage is not finished), and refused by name otherwise.
"""

from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, asdict, dataclass, fields, is_dataclass
from typing import TYPE_CHECKING

from kuavo_train.config import RunConfig
from kuavo_train.errors import ConfigError
from kuavo_train.reading import Json, JsonValue

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

PLACES = "where files lie; what lies there is hashed or compared"
FOLLOWED = "training's keys follow it, and are compared"
SPEED = "how fast, by how many, or where it is computed; results agree but for rounding"
WATCHING = "what is reported and kept on the way"
PROBED = "nothing that is trained; probes and memory_report go by it"
ENTRY = "how the run is entered, or a check on the way in"
FREE = {  # key, or group of keys → why it cannot change the result
    "run": PLACES,
    "outputs": PLACES,
    "data.root": PLACES,
    "data.cache_root": PLACES,
    "data.replay_file": PLACES,
    "stage.root": PLACES,
    "stage.repo_id": PLACES,
    "tasks_dir": PLACES,
    "config_dir": PLACES,
    "hf_endpoint": PLACES,
    "offline": PLACES,
    "profile": "a name; the keys that it sets are compared",
    "learn": "the tasks learnt before, and their shares, are compared",
    "dealt": "the shares are compared",
    "stage.epochs": FOLLOWED,
    "stage.lr": FOLLOWED,
    "stage.warmup_steps": FOLLOWED,
    "stage.decay_steps": FOLLOWED,
    "stage.cue_column": PROBED,
    "stage.cue_visible_column": PROBED,
    "stage.decision_column": PROBED,
    "engine": SPEED,
    "axes": "names of settings that are compared",
    "processes": SPEED,
    "data.frame_cache": SPEED,
    "data.feature_cache": SPEED,
    "data.feature_cache_limit_gib": SPEED,
    "data.feature_fill": SPEED,
    "data.context_cache_limit_gib": SPEED,
    "data.num_workers": SPEED,
    "data.record_workers": SPEED,
    "training.device": SPEED,
    "policy.device": SPEED,
    "policy.compile_model": SPEED,
    "policy.gradient_checkpointing": SPEED,
    "validation.batch_size": SPEED,
    "rollout.parallel": SPEED,
    "rollout.workers": SPEED,
    "training.log_every": WATCHING,
    "training.save_every": WATCHING,
    "tracking": WATCHING,
    "wandb": WATCHING,
    "resume": ENTRY,
    "data_only": ENTRY,
    "data.claw_limits": ENTRY,
    "allow_random_frozen_vlm": ENTRY,
}
MEASURED = (  # what is measured, judged or written with the result; obeyed as long as the stage is not finished
    "rollout.episodes",
    "rollout.every_epochs",
    "validation.unseen_tasks",
    "stage.loss_target",
    "stage.final_loss_limit",
    "forgetting.well_retained_change",
    "forgetting.slight_change",
    "forgetting.well_retained_drop",
    "forgetting.slight_drop",
    "forgetting.well_retained_loss",
    "forgetting.slight_loss",
    "licence",
)
SHARED = (  # what all stages of a run have in common: one policy, one way of keeping, comparable numbers
    "seed",
    "strategy",
    "mixture",
    "ewc",
    "distill",
    "adapters",
    "merge",
    "replay",
    "policy",
    "tiny_vlm",
    "data.cameras",
    "data.image_size",
    "data.feature_dtype",
    "data.feature_stride",
    "data.normalization",
    "validation.draws",
    "validation.share",
    "rollout.seed",
    "rollout.max_steps",
)
PUT_BACK = "put them back, or choose another run=NAME"
LONGEST_VALUE = 200  # characters of a value in a message


@dataclass(frozen=True)
class Difference:
    """A key whose value is not what it was."""

    key: str
    was: object
    now: object

    def __str__(self) -> str:
        return f"{self.key} (was {_text(self.was)}, is {_text(self.now)})"


def differences(was: Json, now: RunConfig, *, policy_defaults: Json, first: bool, finished: bool) -> list[Difference]:
    """The keys in which a stage would be another than it was begun as.

    Args:
        was: the stage's config.yaml. A key that was not there yet had its default; one that is gone is left out.
        policy_defaults: of the policy's LeRobot config.
        first: whether it is the run's first stage.
        finished: whether the stage is over, so that what is only measured cannot be obeyed any more.
    """
    idle = "training.freeze" if first else "training.freeze_first_stage"
    free = [*FREE, idle, *(() if finished else MEASURED)]
    return [each for each in _compare(was, now, policy_defaults) if not _among(each.key, free)]


def shared_differences(was: Json, now: RunConfig, *, policy_defaults: Json) -> list[Difference]:
    """The keys in which a stage would not belong to the run of another, whose config.yaml `was` is."""
    found = _compare(was, now, policy_defaults)
    return [each for each in found if _among(each.key, SHARED) and not is_free(each.key)]


def is_free(key: str) -> bool:
    """Whether what `key` holds cannot change a result."""
    return _among(key, FREE)


def refuse(different: Iterable[object], what: str) -> None:
    """Raises `ConfigError` saying what must keep its settings and which differ, if any do."""
    listed = ", ".join(map(str, different))
    if listed:
        raise ConfigError(f"{what}: {listed}; {PUT_BACK}")


def _compare(
    was: Mapping[str, JsonValue], now: "DataclassInstance", policy_defaults: Json, where: str = ""
) -> list[Difference]:
    found = []
    base = getattr(now, "base_sha256", None)
    same_base = base is not None and was.get("base_sha256") == base  # whose folder may have moved
    for field in fields(now):
        key, value = f"{where}{field.name}", getattr(now, field.name)
        before = was.get(field.name, _default(field))
        if before is MISSING:
            continue
        if is_dataclass(value) and not isinstance(value, type) and isinstance(before, Mapping):
            found += _compare(before, value, policy_defaults, f"{key}.")
        elif key == "policy" and isinstance(before, Mapping):
            pairs = [{**policy_defaults, **each} for each in (before, value)]
            names = [name for name in {**pairs[0], **pairs[1]} if not (name == "pretrained_path" and same_base)]
            found += [Difference(f"policy.{name}", *(pair.get(name) for pair in pairs)) for name in names]
        else:
            found.append(Difference(key, before, _plain(value)))
    return [each for each in found if each.was != each.now]


def _default(field: Field) -> object:
    """What a key held before there was such a key."""
    if field.default_factory is not MISSING:
        return _plain(field.default_factory())
    return field.default


def _plain(value: object) -> object:
    """As YAML holds it."""
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


def _among(key: str, keys: Iterable[str]) -> bool:
    return any(key == each or key.startswith(f"{each}.") for each in keys)


def _text(value: object) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}…"
