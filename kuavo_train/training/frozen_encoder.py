"""The policy's image encoder, as something whose outputs can be computed once and kept."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib.metadata import version

import torch
from lerobot.policies.pretrained import PreTrainedPolicy

from kuavo_train.data.images.features import Encoder
from kuavo_train.training.parameter_groups import fingerprint, parameter_groups
from lerobot_policy_smolvla_memory.configuration_smolvla_memory import image_features_key

ENCODER_GROUPS = ("vision", "connector")


def frozen_encoder(
    policy: PreTrainedPolicy, *, precision: str, autocast: Callable[[], AbstractContextManager]
) -> Encoder | None:
    """The encoder of a policy that holds it fixed and can embed a camera on its own; None of any other.

    Args:
        precision: of training, `autocast` its context: embeddings are computed as a step would compute them.
    """
    groups = parameter_groups(policy)
    if not hasattr(policy, "embed_camera") or not set(ENCODER_GROUPS) <= set(groups):
        return None
    parameters = dict(policy.named_parameters())
    weights = {name: parameters[name] for group in ENCODER_GROUPS for name in groups[group]}
    if any(parameter.requires_grad for parameter in weights.values()):
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
    return Encoder(embed, settings, image_features_key, next(iter(weights.values())).device)
