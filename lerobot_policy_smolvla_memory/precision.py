"""In which floating-point type each part of a policy is held, whatever the vision-language model's config names.

LeRobot makes the action expert in the type of that config, and SmolVLM2's is bfloat16: with 8 bits of mantissa, a step
of AdamW that is smaller than 1/256 of its weight is rounded away. So here

    expert, projections, memory     are float32, always: a stage that holds them fixed may be followed by one that
                                    trains them, and adapters are merged into them
    vision, connector, vlm_text     are float32 as a whole when anything of them learns; what is frozen keeps the type
                                    it was stored in

Loading is exact: float32 holds every bfloat16 and float16 as it is, and what is narrower than what it is to take makes
room first.
"""

from collections.abc import Iterable, Mapping
from functools import reduce

import torch
from safetensors import safe_open
from torch import Tensor, nn

EXACT = torch.float32
NARROW = {"BF16": torch.bfloat16, "F16": torch.float16}
"""Types of safetensors that float32 holds exactly, and that a frozen part may keep."""


class StoredNarrower(UserWarning):
    """Weights that learn were stored in a type that rounds the steps of training."""


def stored_dtypes(model_file: str) -> dict[str, torch.dtype]:
    """Name → type of the tensors in a file of safetensors; what is neither bfloat16 nor float16 counts as float32."""
    with safe_open(model_file, framework="pt") as file:
        return {key: NARROW.get(file.get_slice(key).get_dtype(), EXACT) for key in file.keys()}  # noqa: SIM118


def make_room(module: nn.Module, stored: Mapping[str, torch.dtype]) -> None:
    """Widen what would round the weights that are to be loaded into it; tied parameters stay tied."""
    for name, tensor in module.state_dict(keep_vars=True).items():
        dtype = tensor.dtype
        if tensor.is_floating_point() and torch.promote_types(dtype, stored.get(name, dtype)) != dtype:
            tensor.data = tensor.data.to(EXACT)


def settle(
    policy: nn.Module,
    groups: Mapping[str, Iterable[str]],
    stored: Mapping[str, torch.dtype],
    *,
    may_stay_narrow: Iterable[str],
) -> None:
    """Hold every group in the type that it is to be held in; exact as long as frozen parts are as they were stored.

    Args:
        groups: name → names of its parameters.
        stored: parameter → the type it was stored in; of tied ones, one is enough.
        may_stay_narrow: groups that keep the type they were stored in while they are frozen.
    """
    parameters = dict(policy.named_parameters())
    for group, names in groups.items():
        held = [parameters[name] for name in names]
        dtypes = {stored[name] for name in names if name in stored}
        is_frozen = group in may_stay_narrow and not any(parameter.requires_grad for parameter in held)
        dtype = reduce(torch.promote_types, dtypes) if is_frozen and dtypes else EXACT
        for parameter in held:
            parameter.data = parameter.data.to(dtype)


def in_own_dtype(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A forward pre-hook: what another part computed in its type arrives in this module's."""
    dtype = next(module.parameters()).dtype
    return tuple(value.to(dtype) for value in inputs)
