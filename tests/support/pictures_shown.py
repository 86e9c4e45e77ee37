"""What a policy's image encoder is given."""

import pytest
import torch

from lerobot_policy_smolvla_memory import SmolVLAMemoryPolicy


def pictures_shown(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pictures the encoder is given, call by call; blank ones are there for shape and number alone."""
    calls: list[int] = []
    embed = SmolVLAMemoryPolicy.embed_camera

    def counted(policy: SmolVLAMemoryPolicy, pictures: torch.Tensor) -> torch.Tensor:
        calls.append(int(pictures.flatten(1).any(dim=1).sum()))
        return embed(policy, pictures)

    monkeypatch.setattr(SmolVLAMemoryPolicy, "embed_camera", counted)
    return calls
