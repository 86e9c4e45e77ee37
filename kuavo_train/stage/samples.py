"""Which episodes a stage reads, and what its samples are made of."""

from collections.abc import Sequence

from kuavo_train.config import RunConfig, StageConfig
from kuavo_train.data.dataset import MixedDataset, frames_of_sample
from kuavo_train.data.images.plan import Images
from kuavo_train.data.normalization import Normalization
from kuavo_train.data.sampler import Order
from kuavo_train.data.task import Task
from kuavo_train.stage.lineage import seen_tasks, stages_before
from kuavo_train.training.policy_factory import BuiltPolicy


def episodes_trained(order: Order) -> dict[str, Sequence[int]]:
    """Task → the episodes the stage trains on."""
    return {task.name: order.episodes[place] for place, task in enumerate(order.tasks)}


def episodes_read(
    config: RunConfig, curriculum: Sequence[StageConfig], tasks: Sequence[Task], order: Order
) -> dict[str, list[int]]:
    """Task → the episodes the stage trains on, validates or chooses by."""
    trained = episodes_trained(order)
    seen, later = seen_tasks(config, curriculum), bool(stages_before(config, curriculum))
    validated = seen if later and not config.validation.unseen_tasks else [task.name for task in tasks]
    return {
        task.name: [
            *trained.get(task.name, ()),
            *(task.validated if task.name in validated else ()),
            *(task.choosing_episodes if later and task.name in seen else ()),
        ]
        for task in tasks
    }


def dataset_of(images: Images, normalization: Normalization, built: BuiltPolicy, tasks: Sequence[Task]) -> MixedDataset:
    return MixedDataset(
        tasks,
        [images.sources[task.name] for task in tasks],
        normalization,
        **frames_of_sample(built.policy.config),
        image_key=images.image_key,
        contexts=[images.contexts[task.name] for task in tasks if images.contexts],
        context_key=images.context_key,
        complete=images.complete,
    )
