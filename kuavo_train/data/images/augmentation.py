"""LeRobot's random image transforms of training pictures, fixed within a clip.

A memory is learnt over consecutive queries: were each changed in its own way, light and camera would jump within
an episode as they never do on a robot. So all K queries of a clip share their parameters; the cameras of a clip
have their own. Parameters are a pure function of (seed, stage, process, step, batch, clip, camera).
"""

import zlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from lerobot.transforms.transforms import ImageTransformConfig, ImageTransforms, ImageTransformsConfig

from kuavo_train.config import AugmentationConfig
from kuavo_train.data.batch import Batch
from kuavo_train.errors import ConfigError

STREAM = zlib.crc32(b"augmentation")  # apart from the other randomness of a step


class Augmentation(Protocol):
    def __call__(self, batch: Batch, step: int, number: int) -> Batch:
        """The `number`-th batch of an optimizer step, its pictures floats, with other pictures."""


def no_augmentation(batch: Batch, step: int, number: int) -> Batch:
    return batch


class ClipAugmentation:
    """LeRobot's transforms, on the pictures' device.

    Args:
        cameras: keys of the pictures in a batch, [B, …, 3, H, W] float in [0, 1].

    Raises:
        ConfigError: a transform that LeRobot does not know, or not with these arguments.
    """

    def __init__(self, config: AugmentationConfig, *, cameras: Sequence[str], seed: int, stage: int, process: int):
        self.cameras = list(cameras)
        self.key, self.process = [STREAM, seed, stage, 0], process
        self.transforms = _transforms(config)

    def __call__(self, batch: Batch, step: int, number: int) -> Batch:
        changed = {}
        with torch.random.fork_rng(devices=[]):
            for place, camera in enumerate(self.cameras):
                augmented = []
                clips = batch.inputs[camera].split(batch.clip)
                for clip, frames in enumerate(clips, start=self.process * len(clips)):
                    key = [*self.key, step, number, clip, place]
                    # The CPU's generator alone: parameters are drawn there, a GPU's is the policy's.
                    torch.default_generator.manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))
                    augmented.append(self.transforms(frames))
                changed[camera] = torch.cat(augmented)
        return batch._replace(inputs={**batch.inputs, **changed})


def _transforms(config: AugmentationConfig) -> ImageTransforms:
    about = ImageTransformsConfig(
        enable=True, max_num_transforms=config.max_num_transforms, random_order=config.random_order
    )
    try:
        if config.tfs is not None:
            about.tfs = {name: ImageTransformConfig(**transform) for name, transform in config.tfs.items()}
        return ImageTransforms(about)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"data.augmentation.tfs must be LeRobot's image transforms, got {config.tfs}: {error}"
        ) from error
