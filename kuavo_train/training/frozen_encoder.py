"""The frozen parts of a policy, as something whose outputs can be computed once and kept."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from importlib.metadata import version

import torch
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.processor import PolicyProcessorPipeline

from kuavo_train.data.batch import Batch, preprocess
from kuavo_train.data.images.contexts import ContextEncoder
from kuavo_train.data.images.features import Encoder
from kuavo_train.training.parameter_groups import fingerprint, parameter_groups
from lerobot_policy_smolvla_memory.configuration_smolvla_memory import ENCODED_CONTEXT, image_features_key
from lerobot_policy_smolvla_memory.parameter_groups import ENCODER_GROUPS, VLM_GROUPS

TOGETHER = 8  # pictures: few, so that a step that lacks few frames does not embed many more
LARGE = 256 * 256  # pixels: such pictures keep a CPU as busy one by one


def frozen_encoder(
    policy: PreTrainedPolicy, *, precision: str, autocast: Callable[[], AbstractContextManager]
) -> Encoder | None:
    """The encoder of a policy that holds it fixed and can embed a camera on its own; None of any other.

    Args:
        precision: of training, `autocast` its context: embeddings are computed as a step would compute them.
    """
    weights = _frozen(policy, ENCODER_GROUPS)
    if weights is None or not hasattr(policy, "embed_camera"):
        return None

    def embed(pictures: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), autocast():
            return policy.embed_camera(pictures)

    settings = {
        "weights": fingerprint(weights),
        "resize_imgs_with_padding": policy.config.resize_imgs_with_padding,
        "precision": precision,
        # The preprocessing is theirs.
        "versions": {name: version(name) for name in ("lerobot", "transformers")},
    }
    device = next(iter(weights.values())).device
    large = math.prod(policy.config.resize_imgs_with_padding or (0,)) >= LARGE
    together = 1 if large and device.type == "cpu" else TOGETHER
    return Encoder(embed, settings, image_features_key, device, together)


def frozen_context(
    policy: PreTrainedPolicy,
    preprocessor: PolicyProcessorPipeline,
    *,
    precision: str,
    autocast: Callable[[], AbstractContextManager],
) -> ContextEncoder | None:
    """The vision-language model of a policy that holds all of it fixed, and shows it images and language on their own;
    None of any other. Arguments as of `frozen_encoder`."""
    weights = _frozen(policy, VLM_GROUPS)
    if weights is None or not getattr(policy, "encodes_context", False):
        return None
    device = next(iter(weights.values())).device

    def encode(batch: Batch) -> torch.Tensor:
        with torch.no_grad(), autocast():
            return policy.encode_context(preprocess(batch, preprocessor, device))

    settings = {"weights": fingerprint(weights), "precision": precision}
    return ContextEncoder(encode, settings, ENCODED_CONTEXT)


def _frozen(policy: PreTrainedPolicy, wanted: Sequence[str]) -> dict[str, torch.nn.Parameter] | None:
    """The parameters of these groups; None where a group is not there, or learns."""
    groups = parameter_groups(policy)
    if not set(wanted) <= set(groups):
        return None
    parameters = dict(policy.named_parameters())
    weights = {name: parameters[name] for group in wanted for name in groups[group]}
    return None if any(parameter.requires_grad for parameter in weights.values()) else weights
