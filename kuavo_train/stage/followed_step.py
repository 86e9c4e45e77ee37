"""A stage's training step, followed through without values: what it would hold in memory."""

from dataclasses import replace

import numpy as np
import torch

from kuavo_train.data.batch import Batch, preprocess
from kuavo_train.data.images.contexts import FILE, CachedContexts
from kuavo_train.data.sampler import Draw
from kuavo_train.stage.setup import OpenedStage
from kuavo_train.training.step_memory import StepMemory, can_be_followed, step_memory


def step_memory_of(opened: OpenedStage) -> StepMemory | None:
    """Of a batch of one process; None for a policy that cannot be followed."""
    policy, accelerator = opened.built.policy, opened.accelerator
    if not can_be_followed(policy):
        return None
    prepared = preprocess(_blank_sample(opened), opened.built.preprocessor, accelerator.device)
    return step_memory(
        policy,
        {name: value for name, value in prepared.items() if isinstance(value, torch.Tensor)},
        samples=opened.config.batch_of_process,
        queries=opened.order.clip,
        autocast=accelerator.autocast,
    )


def _blank_sample(opened: OpenedStage) -> Batch:
    """A sample in which nothing is seen, with the longest instruction of the mixture. No picture is read for it."""
    images, task = opened.images, opened.order.tasks[0]
    embeddings = images.embeddings.get(task.name)
    features = opened.built.policy.config.image_features

    def unseen(camera: str, rows: np.ndarray) -> torch.Tensor:
        if embeddings is None:
            return torch.zeros((len(rows), *features[camera].shape), dtype=torch.uint8)
        return torch.zeros((len(rows), *embeddings.shapes[camera]), dtype=torch.bfloat16)

    def unknown(rows: np.ndarray) -> torch.Tensor:
        return torch.zeros((len(rows), *longest_context), dtype=torch.bfloat16)

    contexts = [each.cache.shapes[FILE] for each in images.contexts.values() if isinstance(each, CachedContexts)]
    longest_context = max(contexts, default=())
    blank = replace(images, sources={task.name: unseen}, contexts={task.name: unknown} if contexts else {})
    texts = [text for each in opened.order.tasks for text in each.instructions.texts]
    sample = replace(opened, images=blank).dataset([task]).fetch([Draw(0, int(task.train_rows[0]))])
    return sample._replace(instructions=[max(texts, key=len)])
