"""SmolVLM's vision encoder for pictures that are whole, as a robot's are: transformers' own numbers, to the bit.

transformers lets a mask say which patches a picture has, and looks at the mask's values on the way: a GPU is waited for
with every picture, and its work cannot be recorded. Of a whole picture the shape says all of it.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers.models.smolvlm.modeling_smolvlm import SmolVLMVisionEmbeddings, SmolVLMVisionTransformer

BELOW_ONE = 1.0 - 1e-6  # as transformers


def encode_pictures(vision: "SmolVLMVisionTransformer", pictures: Tensor) -> Tensor:
    """Pictures [B, 3, height, width] in [-1, 1] → hidden states of their patches [B, N, H_vision]."""
    pictures = pictures.to(vision.dtype)
    patches = vision.embeddings.patch_embedding(pictures).flatten(2).transpose(1, 2)
    places = _places(vision.embeddings, pictures).expand(len(pictures), -1)
    hidden = vision.encoder(patches + vision.embeddings.position_embedding(places)).last_hidden_state
    return vision.post_layernorm(hidden)


def _places(embeddings: "SmolVLMVisionEmbeddings", pictures: Tensor) -> Tensor:
    """[N] the position embedding of each patch, by where it lies between the picture's edges.

    It is rounded to the pictures' type before it is looked up, and so are weights that were trained with it.
    """
    side, device = embeddings.num_patches_per_side, pictures.device
    boundaries = torch.arange(1 / side, 1.0, 1 / side, device=device)

    def along(pixels: int) -> Tensor:
        patches = pixels // embeddings.patch_size
        step = 1.0 / torch.full((), patches, device=device)
        fractions = torch.arange(patches, device=device, dtype=torch.float32) * step
        return torch.bucketize(fractions.clamp(max=BELOW_ONE).to(pictures.dtype), boundaries, right=True)

    down, across = (along(pixels) for pixels in pictures.shape[2:])
    return (down[:, None] * side + across).flatten()
