"""The end of a stage: its result is chosen, validated and audited, and the stage is on record as finished."""

from collections.abc import Sequence

from accelerate.utils import gather_object

from kuavo_train.reporting.run_analysis import analyse, write_matrix
from kuavo_train.runs.files import now, write_json, write_text
from kuavo_train.runs.stored_run import StoredRun
from kuavo_train.stage import model_card
from kuavo_train.stage.setup import OpenedStage
from kuavo_train.stage.stage_validation import StageValidation
from kuavo_train.strategies.strategy import StageView
from kuavo_train.training.checkpoint import load_weights
from kuavo_train.training.learner import Learner
from kuavo_train.training.lora import merge_adapters
from kuavo_train.training.parameter_groups import ParameterGroup, compare_fingerprints, take_fingerprints
from kuavo_train.training.trainer import Progress


def conclude(
    opened: OpenedStage,
    learner: Learner,
    progress: Progress,
    *,
    validation: StageValidation,
    view: StageView,
    groups_before: Sequence[ParameterGroup],
) -> None:
    """The stage's result is its best checkpoint, or what the strategy makes of it: validate it, audit, record.

    Args:
        groups_before: fingerprints of the parameters when the stage began.
    """
    config, folder = opened.config, opened.folder
    opened.accelerator.wait_for_everyone()
    policy = learner.bare_policy
    learner.average.keep()
    groups = compare_fingerprints(groups_before, take_fingerprints(policy))
    merge_adapters(policy)
    best = folder.checkpoints.at("best" if progress.best_step is None else progress.best_step)
    if best.step != progress.step:
        load_weights(policy, best)
    result, loss = opened.strategy.result(view, best, progress.best_loss)
    names = [task.name for task in opened.tasks] if config.validation.unseen_tasks else opened.seen
    records = validation.validate("end", step=best.step, epoch=opened.timetable.number(best.step), names=names)
    drawn = gather_object([(progress.drawn, progress.drawn_episodes)])
    opened.strategy.end(view)
    if not opened.accelerator.is_main_process:
        return
    write_json(folder.path / "parameters.json", groups)
    audit = opened.order.audit(
        [frames for frames, _ in drawn],
        [episodes for _, episodes in drawn],
        batches_per_step=config.training.gradient_accumulation_steps,
    )
    write_json(folder.path / "replay_audit.json", {"stage": config.stage.index, **audit})
    card = model_card.model_card(config, opened.learnt, opened.order.shares, records, steps=progress.step)
    write_text(result.pretrained_model / model_card.FILE_NAME, card)
    folder.checkpoints.point("best", result.folder.name)  # a copy of it, where there are no links, has the card too
    folder.tell(
        status="finished",
        steps=progress.step,
        seconds=round(progress.seconds, 1),
        best={"step": best.step, "loss": loss},
        checkpoint=f"checkpoints/{result.folder.name}",
        checkpoint_hash=result.hash,
        finished=now(),
        **({"stopped": progress.stopped} if progress.stopped else {}),
    )
    write_matrix(analyse(StoredRun.open(config.run_folder), limits=config.forgetting.limits))
    print(f"finished stage {config.stage.index} ({config.stage.name}): {folder.path / 'checkpoints' / 'best'}")
