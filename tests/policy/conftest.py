"""A SmolVLA so small that a forward pass takes milliseconds, and batches for it."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports the hub

from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies.smolvla import smolvlm_with_expert
from tiny_sizes import ACTION_DIM, CAMERAS, CHUNK, LANGUAGE_LENGTH, STATE_DIM
from torch import Tensor
from transformers import AutoConfig, AutoProcessor

from lerobot_policy_smolvla_memory import SmolVLAMemoryConfig, SmolVLAMemoryPolicy
from lerobot_policy_smolvla_memory.tiny_vlm import make_tiny_vlm

torch.set_num_threads(1)


_config_of = cache(AutoConfig.from_pretrained)
_processor_of = cache(AutoProcessor.from_pretrained)


@pytest.fixture(autouse=True, scope="module")
def _vlm_read_once() -> Iterator[None]:
    """LeRobot reads config and processor of the VLM for every policy: more than half of what a tiny one takes."""
    configs = SimpleNamespace(from_pretrained=lambda name: deepcopy(_config_of(name)))
    processors = SimpleNamespace(from_pretrained=_processor_of)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(smolvlm_with_expert, "AutoConfig", configs)
        patched.setattr(smolvlm_with_expert, "AutoProcessor", processors)
        yield


@pytest.fixture(scope="session")
def tiny_vlm(tmp_path_factory) -> Path:
    return make_tiny_vlm(
        tmp_path_factory.mktemp("vlm") / "tiny",
        text_hidden=32,
        text_layers=4,
        head_dim=16,
        vision_hidden=32,
        vision_layers=1,
        image_size=32,
        patch_size=16,
        scale_factor=2,
        corpus=["put the red block into the box"],
    )


@pytest.fixture(scope="session")
def hub(tmp_path_factory) -> dict[str, Any]:
    """Settings of a policy on a VLM that is stored as SmolVLM2 is: in bfloat16, in its configs as well."""
    sizes = {"text_hidden": 32, "head_dim": 16, "vision_hidden": 32, "vision_layers": 1, "image_size": 32}
    vlm = make_tiny_vlm(tmp_path_factory.mktemp("hub") / "vlm", dtype="bfloat16", **sizes)
    return {"vlm_model_name": str(vlm), "load_vlm_weights": True}


@pytest.fixture(scope="session")
def make_config(tiny_vlm) -> Callable[..., SmolVLAMemoryConfig]:
    def make(**changes) -> SmolVLAMemoryConfig:
        settings = {
            "vlm_model_name": str(tiny_vlm),
            "device": "cpu",
            "input_features": {
                "observation.state": PolicyFeature(FeatureType.STATE, (STATE_DIM,)),
                **{camera: PolicyFeature(FeatureType.VISUAL, (3, 32, 32)) for camera in CAMERAS},
            },
            "output_features": {"action": PolicyFeature(FeatureType.ACTION, (ACTION_DIM,))},
            "resize_imgs_with_padding": (32, 32),
            "chunk_size": CHUNK,
            "n_action_steps": 2,
            "max_state_dim": 8,
            "max_action_dim": 8,
            "num_steps": 3,
            "num_mem_tokens": 2,
            "freeze_vision_encoder": False,
            "train_expert_only": False,
        }
        return SmolVLAMemoryConfig(**{**settings, **changes})

    return make


@pytest.fixture(scope="session")
def make_policy(make_config) -> Callable[..., SmolVLAMemoryPolicy]:
    """A policy with seeded weights, and with layers that do more than the small standard initialization.

    A transformer with weights of std 0.02 is close to the identity: much that is wrong would go unnoticed.
    """

    def make(*, seed: int = 0, **changes) -> SmolVLAMemoryPolicy:
        torch.manual_seed(seed)
        policy = SmolVLAMemoryPolicy(make_config(**changes))
        with torch.no_grad():
            for name, parameter in policy.named_parameters():
                if parameter.dim() == 2 and "vlm_with_expert" in name:
                    parameter.normal_(std=parameter.shape[-1] ** -0.5)
        return policy

    return make


@pytest.fixture
def make_batch() -> Callable[..., dict[str, Tensor]]:
    def make(rows: int, *, seed: int = 0) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        lengths = 3 + torch.arange(rows) % (LANGUAGE_LENGTH - 2)  # of every row another, up to all of it
        return {
            **{camera: torch.rand(rows, 3, 32, 32, generator=generator) for camera in CAMERAS},
            "observation.state": torch.randn(rows, STATE_DIM, generator=generator),
            "observation.language.tokens": torch.randint(8, 256, (rows, LANGUAGE_LENGTH), generator=generator),
            "observation.language.attention_mask": torch.arange(LANGUAGE_LENGTH) < lengths[:, None],
            "action": torch.randn(rows, CHUNK, ACTION_DIM, generator=generator),
        }

    return make


@pytest.fixture
def make_noise() -> Callable[..., dict[str, Tensor]]:
    """`noise` and `time` of flow matching for a batch."""

    def make(rows: int, *, seed: int = 1) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {
            "noise": torch.randn(rows, CHUNK, 8, generator=generator),
            "time": torch.rand(rows, generator=generator) * 0.998 + 0.001,
        }

    return make
