"""The policies that are compared: ours and LeRobot's SmolVLA on the same weights, at two sizes."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from lerobot.utils.constants import ACTION, OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS, OBS_STATE
from torch import Tensor

from kuavo_train.training.parameter_groups import freeze
from lerobot_policy_smolvla_memory import SmolVLAMemoryConfig, SmolVLAMemoryPolicy
from lerobot_policy_smolvla_memory.configuration_smolvla_memory import image_features_key
from lerobot_policy_smolvla_memory.tiny_vlm import make_tiny_vlm

CAMERAS = [f"observation.images.{name}" for name in ("head_cam_h", "wrist_cam_l", "wrist_cam_r")]
STATE, ACTIONS = 16, 20
LAYOUTS = {"start": (True, False), "both": (True, True), "end": (False, True)}  # mem_at_start, mem_at_end
VLM_FROZEN = ("vision", "connector", "vlm_text")
VISION_FROZEN = ("vision", "connector")


@dataclass(frozen=True)
class Size:
    """A model and what it is shown.

    Args:
        vlm: sizes for `make_tiny_vlm`.
        image: pixels per side, as the model sees them. Language, chunk: in tokens and actions.
        batch: rows of a training step.
    """

    image: int
    layers: int
    chunk: int
    batch: int
    vlm: dict[str, Any] = field(default_factory=dict)
    language: int = 48

    @property
    def is_large(self) -> bool:
        """A step takes seconds: few repetitions, and of the recipes only that with a frozen VLM."""
        return self.image == 512

    def make_vlm(self, folder: Path) -> Path:
        corpus = ["put the parcel into the container"]
        return make_tiny_vlm(folder, image_size=self.image, text_layers=self.layers, corpus=corpus, **self.vlm)


# SmolVLM2-500M's widths. Random weights.
_SMOLVLM2 = {
    "text_hidden": 960,
    "head_dim": 64,
    "key_value_heads": 5,
    "text_intermediate": 2560,
    "vision_hidden": 768,
    "vision_intermediate": 3072,
    "scale_factor": 4,
    "write_weights": False,
}
SIZES = {
    # The embedded profile's: `make_tiny_vlm` has them as defaults.
    "embedded": Size(image=64, layers=4, chunk=16, batch=32),
    # SmolVLM2-500M cut to 16 layers, as SmolVLA cuts it.
    "full": Size(
        image=512, layers=16, chunk=50, batch=2, vlm=_SMOLVLM2 | {"vision_layers": 12, "vocabulary_size": 49_280}
    ),
    # A quarter of its depth in every part: the same ratios in a quarter of the time.
    "quarter": Size(image=512, layers=4, chunk=50, batch=2, vlm=_SMOLVLM2 | {"vision_layers": 3}),
    # Of milliseconds: for tests.
    "tiny": Size(
        image=32,
        layers=2,
        chunk=4,
        batch=4,
        vlm={"text_hidden": 32, "head_dim": 16, "vision_hidden": 32, "vision_layers": 1},
        language=6,
    ),
}


def lerobot_policy(size: Size, vlm: Path, *, frozen: Sequence[str] = VLM_FROZEN) -> SmolVLAPolicy:
    """LeRobot's SmolVLA with seeded random weights that do something: those of std 0.02 are nearly the identity."""
    torch.manual_seed(0)
    policy = SmolVLAPolicy(SmolVLAConfig(**_settings(size, vlm, frozen)))
    with torch.no_grad():
        for parameter in policy.model.vlm_with_expert.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return policy


def our_policy(
    theirs: SmolVLAPolicy,
    size: Size,
    vlm: Path,
    *,
    frozen: Sequence[str] = VLM_FROZEN,
    tokens: int = 0,
    layout: str = "end",
    **settings: Any,
) -> SmolVLAMemoryPolicy:
    """Ours on the very weights of LeRobot's, shared with it. What is frozen is frozen in both."""
    policy = new_policy(size, vlm, frozen=frozen, tokens=tokens, layout=layout, **settings)
    policy.load_state_dict(theirs.state_dict(keep_vars=True), strict=False, assign=True)
    return policy


def new_policy(
    size: Size, vlm: Path, *, frozen: Sequence[str] = VLM_FROZEN, tokens: int, layout: str = "end", **settings: Any
) -> SmolVLAMemoryPolicy:
    """Ours with new weights."""
    mem_at_start, mem_at_end = LAYOUTS[layout]
    settings |= {"num_mem_tokens": tokens, "mem_at_start": mem_at_start, "mem_at_end": mem_at_end}
    policy = SmolVLAMemoryPolicy(SmolVLAMemoryConfig(**_settings(size, vlm, frozen), **settings))
    freeze(policy, list(frozen))
    return policy


def features(cameras: Sequence[str], *, image: int, state: int, actions: int) -> dict[str, Any]:
    """What a policy's config says it reads and answers: square pictures of `image` pixels, dimensions."""
    camera = PolicyFeature(FeatureType.VISUAL, (3, image, image))
    return {
        "input_features": {OBS_STATE: PolicyFeature(FeatureType.STATE, (state,)), **dict.fromkeys(cameras, camera)},
        "output_features": {ACTION: PolicyFeature(FeatureType.ACTION, (actions,))},
    }


def _settings(size: Size, vlm: Path, frozen: Sequence[str]) -> dict[str, Any]:
    return {
        "vlm_model_name": str(vlm),
        "load_vlm_weights": False,
        "device": "cpu",
        **features(CAMERAS, image=size.image, state=STATE, actions=ACTIONS),
        "resize_imgs_with_padding": (size.image, size.image),
        "chunk_size": size.chunk,
        "n_action_steps": min(8, size.chunk),
        "num_vlm_layers": size.layers,
        "num_steps": 10,
        "freeze_vision_encoder": "vision" in frozen,
        "train_expert_only": "vlm_text" in frozen,
    }


def make_batch(size: Size, *, rows: int | None = None) -> dict[str, Any]:
    """Random observations and actions, as they come out of LeRobot's preprocessor."""
    rows = rows or size.batch
    generator = torch.Generator().manual_seed(0)
    return {
        **{camera: torch.rand(rows, 3, size.image, size.image, generator=generator) for camera in CAMERAS},
        OBS_STATE: torch.randn(rows, STATE, generator=generator),
        OBS_LANGUAGE_TOKENS: torch.randint(8, 256, (rows, size.language), generator=generator),
        OBS_LANGUAGE_ATTENTION_MASK: torch.ones(rows, size.language, dtype=torch.bool),
        ACTION: torch.randn(rows, size.chunk, ACTIONS, generator=generator),
    }


@torch.no_grad()
def with_features(policy: SmolVLAMemoryPolicy, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch with the vision encoder's tokens in the place of the pictures, as the feature cache gives them."""
    features = {image_features_key(camera): policy.embed_camera(batch[camera]) for camera in CAMERAS}
    return {**{key: value for key, value in batch.items() if key not in CAMERAS}, **features}
