"""Weights are taken over whole, or not at all: those that are missing or do not fit are an error that lists them.

LeRobot and transformers would both go on with random ones in their place, and a warning.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText
from transformers.utils import logging

LISTED = 10
WIDENED = {
    "model.state_proj.weight": (1, "max_state_dim"),
    "model.action_in_proj.weight": (1, "max_action_dim"),
    "model.action_out_proj.weight": (0, "max_action_dim"),
    "model.action_out_proj.bias": (0, "max_action_dim"),
}
"""Tensors with a column or row for each dimension that state or action may have: that axis, and the field it is as
long as."""


class UnfitWeights(ValueError):
    """Weights that are not those of the model they are for."""


def check_policy_weights(
    policy: nn.Module,
    model_file: str,
    *,
    may_be_new: str,
    may_be_older: Collection[str] = (),
    may_differ: tuple[str, ...],
) -> set[str]:
    """What the file lacks and may lack: all tensors whose names begin with `may_be_new`, else some of `may_be_older`.

    Those of `WIDENED` may be of fewer dimensions than the policy's. Those whose names begin with one of `may_differ`
    are not looked at.

    Raises:
        UnfitWeights: keys missing, unexpected or of another shape.
    """
    with safe_open(model_file, framework="pt") as file:
        names = [key for key in file.keys() if not key.startswith(may_differ)]  # noqa: SIM118
        stored = {key: tuple(file.get_slice(key).get_shape()) for key in names}
    tensors = {key: value for key, value in policy.state_dict(keep_vars=True).items() if not key.startswith(may_differ)}
    wanted = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    stored_tensors = {tensors[key].data_ptr() for key in stored if key in tensors}
    # Tensors that share their storage are stored under one name.
    missing = [key for key in wanted if key not in stored and tensors[key].data_ptr() not in stored_tensors]
    optional = {key for key in wanted if key.startswith(may_be_new)}
    if not optional <= set(missing):
        optional.intersection_update(may_be_older)
    problems = [f"{key} is missing" for key in missing if key not in optional]
    problems += [f"{key} is not part of this policy" for key in stored if key not in wanted]
    problems += [
        f"{key} is of shape {stored[key]}, this policy's of {shape}" + _as_wide_as(key, stored[key], shape)
        for key, shape in wanted.items()
        if key in stored and stored[key] != shape and not _is_narrower(key, stored[key], shape)
    ]
    is_older = any("._orig_mod." in key or key.startswith(("normalize_", "unnormalize_")) for key in stored)
    hint = "\nIt is of an older LeRobot; lerobot.processor.migrate_policy_normalization renews it" if is_older else ""
    _raise(f"{model_file} does not fit this policy", problems, hint)
    return optional.intersection(missing)


class Widened(NamedTuple):
    """A tensor made wider: `weight` is the policy's, `before` the number of dimensions that were stored."""

    weight: Tensor
    before: int
    now: int


def widened_weights(policy: nn.Module, model_file: str) -> dict[str, Widened]:
    """Of the tensors of `WIDENED`, those that the file has for fewer dimensions than the policy, made as wide.

    What is stored is kept to the last bit. What is new is 0: whatever stands in a dimension that the weights do not
    know, a state or noise, all others are computed as before. It learns from the first step on, since its gradient is
    a product of what comes in and of the error.
    """
    widened = {}
    tensors = policy.state_dict()
    with safe_open(model_file, framework="pt") as file:
        for key in WIDENED.keys() & tensors.keys() & set(file.keys()):
            stored, weight = file.get_tensor(key), torch.zeros_like(tensors[key])
            if _is_narrower(key, stored.shape, weight.shape):
                weight[tuple(slice(size) for size in stored.shape)] = stored
                axis, _ = WIDENED[key]
                widened[key] = Widened(weight, stored.shape[axis], weight.shape[axis])
    return widened


def _is_narrower(key: str, stored: Sequence[int], wanted: Sequence[int]) -> bool:
    """Whether all that differs is that the stored tensor knows fewer dimensions of state or action."""
    if key not in WIDENED or len(stored) != len(wanted):
        return False
    axis, _ = WIDENED[key]
    return all(a < b if place == axis else a == b for place, (a, b) in enumerate(zip(stored, wanted, strict=True)))


def _as_wide_as(key: str, stored: Sequence[int], wanted: Sequence[int]) -> str:
    """The field to raise, where the weights know more dimensions than the policy."""
    if not _is_narrower(key, wanted, stored):
        return ""
    axis, field = WIDENED[key]
    return f": {field} must be at least {stored[axis]}, what the weights were trained with"


def check_vlm_weights(vlm_model_name: str) -> None:
    """Compare the weights of a vision-language model with its own config, reading nothing but their names and shapes.

    Raises:
        UnfitWeights: keys missing or of another shape. Those that its architecture has no use for are left alone.
        OSError: no such folder or hub id, or one without weights.
    """
    _, found = AutoModelForImageTextToText.from_pretrained(
        vlm_model_name, device_map="meta", output_loading_info=True, ignore_mismatched_sizes=True
    )
    problems = [f"{key} is missing" for key in sorted(found["missing_keys"])]
    problems += [
        f"{key} is of shape {tuple(stored)}, its config's of {tuple(shape)}"
        for key, stored, shape in sorted(found["mismatched_keys"])
    ]
    _raise(f"{vlm_model_name} does not hold the model that its config describes", problems)


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """transformers shows one for weights that are written or read in a blink."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def take_rounded_weights_again(vlm: nn.Module, vlm_model_name: str) -> None:
    """LeRobot loads a vision-language model in bfloat16. What that has rounded becomes what is stored, in float32."""
    stored = AutoModelForImageTextToText.from_pretrained(vlm_model_name, dtype=torch.float32).state_dict()
    for name, parameter in vlm.named_parameters():
        if not torch.equal(parameter.data.float(), stored[name]):
            parameter.data = stored[name].clone()


def _raise(complaint: str, problems: Sequence[str], hint: str = "") -> None:
    if not problems:
        return
    listed = "\n  ".join(problems[:LISTED])
    more = "\n  …" if len(problems) > LISTED else ""
    raise UnfitWeights(f"{complaint}: {len(problems)} of its weights\n  {listed}{more}{hint}")
