"""Weights are taken over whole, or not at all: those that are missing or do not fit are an error that lists them.

LeRobot and transformers would both go on with random ones in their place, and a warning.
"""

from collections.abc import Collection, Sequence

from safetensors import safe_open
from torch import nn
from transformers import AutoModelForImageTextToText

LISTED = 10


class UnfitWeights(ValueError):
    """Weights that are not those of the model they are for."""


def check_policy_weights(
    policy: nn.Module, model_file: str, *, may_be_new: str, may_be_older: Collection[str] = ()
) -> set[str]:
    """What the file lacks and may lack: all tensors whose names begin with `may_be_new`, else some of `may_be_older`.

    Raises:
        UnfitWeights: keys missing, unexpected or of another shape.
    """
    with safe_open(model_file, framework="pt") as file:
        stored = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    tensors = policy.state_dict(keep_vars=True)
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
        f"{key} is of shape {stored[key]}, this policy's of {shape}"
        for key, shape in wanted.items()
        if key in stored and stored[key] != shape
    ]
    is_older = any("._orig_mod." in key or key.startswith(("normalize_", "unnormalize_")) for key in stored)
    hint = "\nIt is of an older LeRobot; lerobot.processor.migrate_policy_normalization renews it" if is_older else ""
    _raise(f"{model_file} does not fit this policy", problems, hint)
    return optional.intersection(missing)


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


def _raise(complaint: str, problems: Sequence[str], hint: str = "") -> None:
    if not problems:
        return
    listed = "\n  ".join(problems[:LISTED])
    more = "\n  …" if len(problems) > LISTED else ""
    raise UnfitWeights(f"{complaint}: {len(problems)} of its weights\n  {listed}{more}{hint}")
