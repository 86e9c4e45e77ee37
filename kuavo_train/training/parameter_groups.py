"""Frozen means frozen: named parameter groups, counted, and fingerprinted before and after a stage."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TypedDict

import torch
from peft.tuners.lora import Linear as AdaptedLinear
from torch import nn

from kuavo_train.errors import ConfigError
from kuavo_train.reading import Json


@dataclass(frozen=True)
class ParameterGroup:
    group: str
    parameters: int
    trainable: bool
    fingerprint: str

    def as_begun(self) -> Json:
        """The group in parameters.json when a stage begins; its end adds to it."""
        record = asdict(self)
        record["fingerprint_before"] = record.pop("fingerprint")
        return record

    @classmethod
    def when_begun(cls, record: Json) -> "ParameterGroup":
        return cls(record["group"], record["parameters"], record["trainable"], record["fingerprint_before"])


class GroupCounts(TypedDict):
    """`dtype` names the types that the group is held in."""

    group: str
    parameters: int
    trainable: bool
    dtype: str


def parameter_groups(policy: nn.Module) -> dict[str, list[str]]:
    """Group → parameter names. Low-rank adapters are a group beside those of the layers they adapt."""
    adapters = {
        f"{path}.{name}"
        for path, layer in policy.named_modules()
        if isinstance(layer, AdaptedLinear)
        for name, _ in layer.named_parameters()
        if not name.startswith("base_layer.")
    }
    groups = {group: [name for name in names if name not in adapters] for group, names in _own_groups(policy).items()}
    return groups | ({"lora": sorted(adapters)} if adapters else {})


def _own_groups(policy: nn.Module) -> dict[str, list[str]]:
    """Policies without groups of their own get one per part of their network."""
    own_groups = getattr(policy, "parameter_groups", None)
    if own_groups is not None:
        return own_groups()
    paths = {name: name.split(".") for name, _ in policy.named_parameters()}
    depth = len({path[0] for path in paths.values()}) == 1  # LeRobot's policies hold their network in one module
    groups: dict[str, list[str]] = {}
    for name, path in paths.items():
        groups.setdefault(path[min(depth, len(path) - 1)], []).append(name)
    return groups


def check_freezing(policy: nn.Module, key: str, frozen: Sequence[str]) -> None:
    """Raises `ConfigError` when `key` names a group that the policy does not have, or all that it has."""
    groups = parameter_groups(policy)
    for group in frozen:
        if group not in groups:
            raise ConfigError(f"{key} must name groups of {', '.join(groups)}, got {group!r}")
    if set(groups) <= set(frozen):
        raise ConfigError(f"{key} must leave something to train, got {list(frozen)}")


def freeze(policy: nn.Module, frozen: Sequence[str]) -> None:
    """Take the named groups out of training. Raises `ConfigError` as `check_freezing`, and where nothing trains."""
    check_freezing(policy, "training.freeze", frozen)
    groups, parameters = parameter_groups(policy), dict(policy.named_parameters())
    for group in frozen:
        for name in groups[group]:
            parameters[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in policy.parameters()):
        raise ConfigError(f"training.freeze must leave something to train, got {list(frozen)}")


def trainable_parameters(policy: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in policy.named_parameters() if parameter.requires_grad}


def parameter_counts(policy: nn.Module) -> list[GroupCounts]:
    """Of every group its name, its number of parameters, whether it is trained, and in which types it is held."""
    parameters = dict(policy.named_parameters())
    return [
        {
            "group": group,
            "parameters": sum(parameters[name].numel() for name in names),
            "trainable": any(parameters[name].requires_grad for name in names),
            "dtype": dtype_names(parameters[name].dtype for name in names),
        }
        for group, names in parameter_groups(policy).items()
    ]


def dtype_names(dtypes: Iterable[torch.dtype]) -> str:
    """Each of them once: "bfloat16", or "bfloat16, float32"."""
    return ", ".join(sorted({str(dtype).removeprefix("torch.") for dtype in dtypes}))


def take_fingerprints(policy: nn.Module) -> list[ParameterGroup]:
    """Size, trainability and sha256 of every group's values."""
    parameters = dict(policy.named_parameters())
    return [
        ParameterGroup(
            group,
            sum(parameters[name].numel() for name in names),
            any(parameters[name].requires_grad for name in names),
            fingerprint({name: parameters[name] for name in names}),
        )
        for group, names in parameter_groups(policy).items()
    ]


def fingerprint(parameters: Mapping[str, torch.Tensor]) -> str:
    """sha256 of names and values."""
    digest = hashlib.sha256()
    for name in sorted(parameters):
        values = parameters[name].detach().cpu().contiguous()
        digest.update(name.encode() + values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def compare_fingerprints(before: Sequence[ParameterGroup], after: Sequence[ParameterGroup]) -> Json:
    """What parameters.json holds. Raises `RuntimeError` when a frozen group changed."""
    rows = []
    for then, now in zip(before, after, strict=True):
        changed = then.fingerprint != now.fingerprint
        if changed and not then.trainable:
            raise RuntimeError(f"frozen parameter group {then.group} changed: {then.fingerprint} → {now.fingerprint}")
        rows.append({**then.as_begun(), "fingerprint_after": now.fingerprint, "changed": changed})
    return {"groups": rows}
