"""Config → policy, processors, optimizer, scheduler, of LeRobot's and torch's classes."""

import difflib
import hashlib
import json
import operator
import re
import warnings
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import MISSING, asdict, dataclass, fields
from functools import reduce
from io import StringIO
from pathlib import Path
from typing import get_type_hints

import torch
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from lerobot.configs import FeatureType, NormalizationMode, PolicyFeature, PreTrainedConfig
from lerobot.policies.factory import get_policy_class, make_pre_post_processors
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.processor import PolicyProcessorPipeline
from lerobot.utils.constants import ACTION, IMAGENET_STATS, OBS_STATE
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer

from kuavo_train.config import RunConfig, TinyVLMConfig
from kuavo_train.data.normalization import Normalization
from kuavo_train.data.policy_traits import PolicyTraits
from kuavo_train.data.recordings.hub import one_line, remedy
from kuavo_train.errors import ConfigError, Problems, require, said
from kuavo_train.keys import fits, in_words
from kuavo_train.reading import Json, JsonValue
from kuavo_train.training.ema import check_average
from kuavo_train.training.lora import ADAPTED_GROUP, add_adapters
from kuavo_train.training.parameter_groups import check_freezing, freeze
from kuavo_train.training.task_adapters import adapter_fields, hold_all_but_the_newest
from lerobot_policy_smolvla_memory.parameter_groups import VLM_GROUPS  # its package registers the policy
from lerobot_policy_smolvla_memory.precision import StoredNarrower, stored_dtypes
from lerobot_policy_smolvla_memory.pretrained_weights import UnfitWeights
from lerobot_policy_smolvla_memory.tiny_vlm import make_tiny_vlm
from lerobot_policy_smolvla_memory.tiny_vlm_words import WORDS
from lerobot_policy_smolvla_memory.vlm_description import VLM_FOLDER, vlm_described_in

NOT_A_FIELD = ("type", "pretrained_path")
"""Keys of `policy` that say which policy, not how it is made."""
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
WEIGHTS_OF_PARTS = {"load_vlm_weights": False, "pretrained_backbone_weights": None}
"""Fields of policies that say which weights a part of it starts from, and what says none."""
NOT_LOADED = (HfHubHTTPError, HFValidationError, SafetensorError)
"""What the hub and safetensors raise beside OSError when something is missing or damaged."""


@dataclass(frozen=True)
class BuiltPolicy:
    """
    Attributes:
        stored: parameter → the type that its weights were stored in; nothing of new ones.
    """

    policy: PreTrainedPolicy
    preprocessor: PolicyProcessorPipeline
    postprocessor: PolicyProcessorPipeline
    stored: Mapping[str, torch.dtype]


def policy_defaults(kind: str) -> Json:
    """What a policy's LeRobot config holds where a configuration says nothing. Raises `ConfigError` for no policy."""
    defaults = {}
    for item in fields(_policy_class(kind).config_class):
        value = item.default_factory() if item.default_factory is not MISSING else item.default
        if value is not MISSING:
            defaults[item.name] = list(value) if isinstance(value, tuple) else value
    return defaults


def policy_config_class(policy: Json) -> type[PreTrainedConfig]:
    """The class of the policy's LeRobot config, which has every field that is given; looked up before data is opened.

    Raises:
        ConfigError: a policy that LeRobot does not know, or a field that it does not have, with the nearest ones, or a
            value of another type than the field's.
    """
    config_class = _policy_class(policy["type"]).config_class
    known = [item.name for item in fields(config_class)]
    for name, value in policy.items():
        if name not in (*known, *NOT_A_FIELD):
            close = difflib.get_close_matches(name, known)
            meant = f"; did you mean {' or '.join(f'policy.{each}' for each in close)}?" if close else ""
            raise ConfigError(f"policy.{name} must be a field of {config_class.__name__}, got {value!r}{meant}")
    kinds = get_type_hints(config_class)
    for name in kinds.keys() & policy.keys():
        require(fits(policy[name], kinds[name]), f"policy.{name}", f"be {in_words(kinds[name])}", policy[name])
    return config_class


SIZES_IN_CONFIG = {
    "text_hidden": ("text_config", "hidden_size"),
    "text_layers": ("text_config", "num_hidden_layers"),
    "vision_hidden": ("vision_config", "hidden_size"),
    "vision_layers": ("vision_config", "num_hidden_layers"),
    "image_size": ("vision_config", "image_size"),
    "patch_size": ("vision_config", "patch_size"),
    "scale_factor": ("scale_factor",),
}
"""Field of `tiny_vlm` → where a SmolVLM's config.json has it."""


def configure_policy(
    config: RunConfig,
    *,
    normalization: Normalization,
    image_shapes: Mapping[str, tuple[int, ...]],
    instructions: Sequence[str],
    learnt: Sequence[Sequence[str]],
    frozen: Sequence[str],
    checkpoint: Path | None,
    device: torch.device,
) -> PreTrainedConfig:
    """The LeRobot config of a stage's policy.

    Args:
        image_shapes: camera → (3, H, W), in the policy's order.
        instructions: of all tasks; the tiny tokenizer learns its words from them.
        learnt: of each task by the end of the stage, its instructions.
        frozen: parameter groups this stage holds fixed.
        checkpoint: folder of the stage before; None starts from `policy.pretrained_path`, or from new weights.

    Raises:
        ConfigError: fields or values that the policy refuses, or a vision-language model whose config and tokenizer
            cannot be had.
    """
    values = {key: value for key, value in config.policy.items() if key not in NOT_A_FIELD}
    source = _source(config, checkpoint)
    if checkpoint is not None and "vlm_model_name" in values:
        # A checkpoint keeps its own: a task added later must not change its tokenizer.
        stored = PreTrainedConfig.from_pretrained(str(checkpoint)).vlm_model_name
        values["vlm_model_name"] = vlm_described_in(checkpoint, stored)
    elif config.tiny_vlm is not None and "vlm_model_name" in values:
        brought = _vlm_brought_by(source)
        if brought is None:
            values["vlm_model_name"] = _tiny_vlm(config, instructions)
        else:
            check_sizes(config.tiny_vlm, brought)
            values["vlm_model_name"] = str(brought)
    elif "vlm_model_name" in values and source is not None and Path(source).is_dir():
        values["vlm_model_name"] = vlm_described_in(source, values["vlm_model_name"])
    if source is not None:
        # It holds the weights of the parts as well; fetched once more they would only be overwritten.
        values |= {key: nothing for key, nothing in WEIGHTS_OF_PARTS.items() if key in values}
    config_class = policy_config_class(config.policy)
    if config.adapters is not None:
        values |= adapter_fields(config.adapters, learnt, values["vlm_model_name"])
    policy_config = _lerobot_config(
        config_class,
        {**values, **_freezing_flags(config_class, frozen), "device": device.type},
        normalization=normalization,
        image_shapes=image_shapes,
    )
    if misnamed := _misnamed("policy.vlm_model_name", PolicyTraits.of(policy_config).vlm_name):
        raise ConfigError("\n".join([*_misnamed("policy.pretrained_path", source), *misnamed]))
    _check_vlm_description(policy_config)
    return policy_config


def build_policy(
    config: RunConfig,
    policy_config: PreTrainedConfig,
    *,
    normalization: Normalization,
    frozen: Sequence[str],
    checkpoint: Path | None,
    device: torch.device,
) -> BuiltPolicy:
    """The policy that `configure_policy` has planned, its weights, and the shared normalization in its processors.

    Raises:
        ConfigError: weights that cannot be had or do not fit, a frozen VLM that nobody trained, an average of weights
            beside statistics that are not averaged; in this stage or a later one a group that the policy does not have,
            nothing to train, adapters on an expert that is not there or frozen.
    """
    source = _source(config, checkpoint)
    if misnamed := _misnamed("policy.pretrained_path", source):
        raise ConfigError(misnamed[0])
    if source is not None and source != checkpoint:
        check_base(config.base_sha256, source)
    _check_frozen_vlm(config, policy_config, frozen, source)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StoredNarrower)  # preflight reports it, of what learns in this stage
        policy = _with_weights(_policy_class(policy_config.type), policy_config, source)
    if hasattr(policy_config, "pretrained_backbone_weights"):
        policy_config.pretrained_backbone_weights = None  # or whoever opened a checkpoint would fetch them first
    _check_freezing(config, policy)
    freeze(policy, frozen)
    hold_all_but_the_newest(policy)
    if hasattr(policy, "settle_precision"):
        policy.settle_precision()
    add_adapters(policy, config.training.lora)
    check_average(policy, config.training.ema)
    statistics = {**normalization.for_lerobot(), **_picture_statistics(policy_config)}
    preprocessor, postprocessor = make_pre_post_processors(policy_config, dataset_stats=statistics)
    return BuiltPolicy(policy.to(device), preprocessor, postprocessor, _stored_dtypes(source))


def check_base(expected: str | None, source: str | Path) -> None:
    """Raises `ConfigError` where the weights in a folder are not those that the configuration names."""
    weights = Path(source) / constants.SAFETENSORS_SINGLE_FILE
    if expected is None or not weights.is_file():
        return
    found = hashlib.sha256(weights.read_bytes()).hexdigest()
    if found != expected:
        raise ConfigError(
            f"base_sha256 must be that of {weights}, got {expected}, where {found} is there; restore the file, or say "
            "base_sha256=null to start from what is there"
        )


def _check_freezing(config: RunConfig, policy: PreTrainedPolicy) -> None:
    """Raises `ConfigError` for what the first stage or the later ones could not hold fixed, whichever this one is."""
    problems = Problems()
    for key in ("freeze_first_stage", "freeze"):
        frozen = getattr(config.training, key)
        problems.attempt(check_freezing, policy, f"training.{key}", frozen)
        if config.training.lora is not None and ADAPTED_GROUP in frozen:
            problems.append(
                f"training.lora must have an expert to adapt, got a frozen one (training.{key}); set training.lora=null"
            )
    problems.raise_all()


def _check_frozen_vlm(
    config: RunConfig, policy_config: PreTrainedConfig, frozen: Sequence[str], source: str | Path | None
) -> None:
    """Raises `ConfigError` when a part of the VLM is frozen that nobody has trained."""
    has_vlm = PolicyTraits.of(policy_config).vlm_name is not None
    own_weights = config.tiny_vlm is None and getattr(policy_config, "load_vlm_weights", True)
    held_fixed = [group for group in VLM_GROUPS if group in frozen]
    if not has_vlm or source is not None or own_weights or not held_fixed or config.allow_random_frozen_vlm:
        return
    got = "the random ones of tiny_vlm" if config.tiny_vlm else "none (policy.load_vlm_weights=false)"
    raise ConfigError(
        f"a frozen VLM must have pretrained weights, got {got} and policy.pretrained_path=null with "
        f"{', '.join(held_fixed)} frozen; give pretrained ones, or train it (training.freeze_first_stage=[]), or set "
        "allow_random_frozen_vlm=true"
    )


def _picture_statistics(policy_config: PreTrainedConfig) -> dict[str, dict[str, torch.Tensor]]:
    """ImageNet's for every camera, as in LeRobot's training; none for a policy that takes pictures as they are."""
    if policy_config.normalization_mapping.get("VISUAL") in (None, NormalizationMode.IDENTITY):
        return {}
    imagenet = {kind: torch.tensor(values) for kind, values in IMAGENET_STATS.items()}
    return dict.fromkeys(policy_config.image_features, imagenet)


def _source(config: RunConfig, checkpoint: Path | None) -> str | Path | None:
    """Folder or hub id whose weights the policy starts from; None for new ones."""
    return checkpoint or config.policy.get("pretrained_path")


def _vlm_brought_by(source: str | Path | None) -> Path | None:
    """The config and tokenizer that a folder of weights has beside it, those it was trained with."""
    folder = None if source is None else Path(source) / VLM_FOLDER
    return folder if folder is not None and folder.is_dir() else None


def check_sizes(sizes: TinyVLMConfig, brought: Path) -> None:
    """Raises `ConfigError` where `tiny_vlm` names other sizes than those of the VLM that comes with the weights."""
    there = json.loads((brought / "config.json").read_text())
    problems = Problems()
    for name, path in SIZES_IN_CONFIG.items():
        given, found = getattr(sizes, name), reduce(operator.getitem, path, there)
        if given != found:
            problems.append(
                f"tiny_vlm.{name} must be what the weights at {brought.parent} have ({found}), got {given}; leave it "
                "out, or start from other weights (base=none)"
            )
    problems.raise_all()


def _tiny_vlm(config: RunConfig, instructions: Sequence[str]) -> str:
    """Folder of the tiny VLM, made now unless it is there."""
    settings = asdict(config.tiny_vlm)  # type: ignore[arg-type]
    settings["corpus"] = list(instructions) if settings["corpus"] == "tasks" else [" ".join(WORDS.split())]
    name = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    return str(make_tiny_vlm(Path(config.outputs).resolve() / "tiny_vlm" / name, **settings))


def _policy_class(kind: str) -> type[PreTrainedPolicy]:
    try:
        return get_policy_class(kind)
    except (ValueError, ImportError, KeyError) as error:
        known = PreTrainedConfig.get_known_choices()
        reason = f": {error}" if kind in known else f" ({', '.join(sorted(known))})"
        raise ConfigError(f"policy.type must be a policy LeRobot knows, got {kind!r}{reason}") from error


def _lerobot_config(
    config_class: type[PreTrainedConfig],
    values: Json,
    *,
    normalization: Normalization,
    image_shapes: Mapping[str, tuple[int, ...]],
) -> PreTrainedConfig:
    for kind, mode in values.get("normalization_mapping", {}).items():
        if kind != "VISUAL" and mode != "MEAN_STD":  # action errors of all policies are in the same units
            raise ConfigError(f"policy.normalization_mapping of {kind} must be MEAN_STD, got {mode}")
    space = normalization.space
    inputs = {camera: PolicyFeature(FeatureType.VISUAL, shape) for camera, shape in image_shapes.items()}
    inputs[OBS_STATE] = PolicyFeature(FeatureType.STATE, (len(space.state_names),))
    outputs = {ACTION: PolicyFeature(FeatureType.ACTION, (len(space.action_names),))}
    try:
        return config_class(
            **{name: _as_field(name, value) for name, value in values.items()},
            input_features=inputs,
            output_features=outputs,
            push_to_hub=False,
        )
    except (ValueError, TypeError) as error:
        raise ConfigError(f"policy: {error}") from error


def _as_field(name: str, value: JsonValue) -> object:
    """What LeRobot's config holds for a value of YAML."""
    if name == "normalization_mapping":
        return {kind: NormalizationMode(mode) for kind, mode in value.items()}
    # LeRobot's tuples are of numbers or words; it could not write one of lists.
    return tuple(value) if isinstance(value, list) and not any(isinstance(each, list) for each in value) else value


def _freezing_flags(config_class: type[PreTrainedConfig], frozen: Sequence[str]) -> dict[str, bool]:
    """SmolVLA's own switches, so that it skips what the frozen groups make superfluous."""
    flags = {
        "freeze_vision_encoder": "vision" in frozen,
        "train_expert_only": {"vision", "vlm_text"} <= set(frozen),
        "train_state_proj": "state_proj" not in frozen,
    }
    known = {item.name for item in fields(config_class)}
    return {name: value for name, value in flags.items() if name in known}


def _misnamed(key: str, name: str | Path | None) -> list[str]:
    """What is wrong with a path at which there is nothing, which the hub's library would take for a hub id."""
    if name is None or Path(name).is_dir() or HUB_ID.fullmatch(str(name)):
        return []
    return [f"{key} must be an existing folder or a hub id, got {str(name)!r}"]


def _check_vlm_description(policy_config: PreTrainedConfig) -> None:
    """Raises `ConfigError` when the vision-language model's config or tokenizer cannot be had."""
    name = PolicyTraits.of(policy_config).vlm_name
    if name is None:
        return
    try:
        AutoTokenizer.from_pretrained(name, config=AutoConfig.from_pretrained(name))  # or it reads the config again
    except (OSError, ValueError, *NOT_LOADED) as error:
        raise ConfigError(_not_had("policy.vlm_model_name", name, error)) from error


def _with_weights(
    policy_class: type[PreTrainedPolicy], config: PreTrainedConfig, source: str | Path | None
) -> PreTrainedPolicy:
    """The policy with the weights of `source`, or new ones; never new ones in place of some that cannot be had."""
    if source is None:
        try:
            return policy_class(config)
        except (OSError, UnfitWeights, *NOT_LOADED) as error:  # of a part with weights of its own
            if (name := PolicyTraits.of(config).vlm_name) is not None:
                raise ConfigError(_not_had("policy.vlm_model_name", name, error)) from error
            raise ConfigError(
                f"policy.pretrained_backbone_weights must be in torchvision's cache (TORCH_HOME) or to be fetched, got "
                f"{getattr(config, 'pretrained_backbone_weights', None)}: {error}; null begins with new weights"
            ) from error
    try:
        with redirect_stdout(StringIO()):  # LeRobot prints that it loads
            return policy_class.from_pretrained(str(source), config=config, strict=True)
    except (OSError, ValueError, RuntimeError, *NOT_LOADED) as error:
        raise ConfigError(_not_had("policy.pretrained_path", source, error)) from error


def _stored_dtypes(source: str | Path | None) -> dict[str, torch.dtype]:
    """Parameter → type of the weights of `source`, which have just been loaded."""
    if source is None:
        return {}
    if Path(source).is_dir():
        return stored_dtypes(str(Path(source) / constants.SAFETENSORS_SINGLE_FILE))
    return stored_dtypes(hf_hub_download(str(source), constants.SAFETENSORS_SINGLE_FILE, local_files_only=True))


def _not_had(key: str, source: str | Path, error: Exception) -> str:
    """What was tried, why it failed, and what to give instead."""
    reason = said(error)
    if Path(source).is_dir():
        return f"{key} must be something to load policy weights from, got the folder {source}: {reason}"
    where = "only in the local cache (offline)" if constants.HF_HUB_OFFLINE else f"at {constants.ENDPOINT}"
    return (
        f"{key} must be a folder, or a hub id that can be had, got {source}, looked for {where}: {one_line(error)}; "
        f"{remedy(error)}\n"
        f"Nothing is put in its place. Without the hub, copy it here and give the folder: {key}=/path/to/"
        f"{Path(source).name}; a mirror of the hub: hf_endpoint=https://…"
    )
