"""The stage as its strategy sees it."""

from collections.abc import Callable, Iterator
from itertools import batched

from torch import Tensor

from kuavo_train.data.batch import Batch, preprocess
from kuavo_train.stage.setup import OpenedStage, fresh_memory
from kuavo_train.stage.stage_checkpoints import StageCheckpoints
from kuavo_train.stage.stage_validation import StageValidation
from kuavo_train.strategies.strategy import StageView
from kuavo_train.training.learner import Learner


def view_of(
    opened: OpenedStage,
    learner: Learner,
    validation: StageValidation,
    checkpoints: StageCheckpoints,
) -> StageView:
    """The stage as its strategy sees it."""
    order, dataset = opened.order, opened.dataset(opened.order.tasks)

    def first_clips(batches: int) -> Iterator[Batch]:
        for number in range(batches):
            for process in range(order.processes):
                for draws in batched(order.batch(number, process=process), order.clip):
                    yield dataset.fetch(draws, clip=order.clip)

    def new_forward() -> Callable[[Batch], Tensor]:
        policy, recurrence = learner.bare_policy, fresh_memory(order, learner.bare_policy)

        def forward(clip: Batch) -> Tensor:
            prepared = preprocess(clip, learner.preprocessor, opened.accelerator.device)
            with opened.accelerator.autocast():
                loss, outputs = policy(prepared, **recurrence.before(clip))
            recurrence.after(clip, outputs)
            return loss

        return forward

    return StageView(
        config=opened.config,
        policy=learner.bare_policy,
        folder=opened.folder,
        earlier=opened.earlier,
        before=opened.start.before,
        is_main=opened.accelerator.is_main_process,
        shares=lambda: order.shares,
        first_clips=first_clips,
        new_forward=new_forward,
        new_memory=lambda policy: fresh_memory(order, policy, opened.accelerator.gather),
        losses=validation.losses,
        choosing_losses=validation.choosing_losses,
        save_result=checkpoints.save_result,
        repeatable=validation.agreement.repeatable,
        report=validation.tracker.log,
    )
