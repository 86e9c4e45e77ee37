"""The end of a stage: its result is chosen, validated and audited, and the stage is on record as finished."""

from accelerate.utils import gather_object

from kuavo_train.data.replay.buffer import choose
from kuavo_train.reporting.run_analysis import analyse, write_matrix
from kuavo_train.runs.files import now, write_json, write_text
from kuavo_train.runs.stored_run import StoredRun
from kuavo_train.stage import model_card
from kuavo_train.stage.parts import Stage
from kuavo_train.training.checkpoint import load_weights
from kuavo_train.training.lora import merge_adapters
from kuavo_train.training.parameter_groups import compare_fingerprints, take_fingerprints


def conclude(stage: Stage) -> None:
    """The stage's result is its best checkpoint, or what the strategy makes of it: validate it, audit, record."""
    opened, learner, progress, view = stage.opened, stage.learner, stage.progress, stage.view
    config, folder = opened.config, opened.folder
    opened.accelerator.wait_for_everyone()
    policy = learner.bare_policy
    learner.average.keep()
    groups = compare_fingerprints(stage.groups_before, take_fingerprints(policy))
    merge_adapters(policy)
    best = folder.checkpoints.at("best" if progress.best_step is None else progress.best_step)
    if best.step != progress.step:
        load_weights(policy, best)
    result, loss = opened.strategy.result(view, best, progress.best_loss)
    names = [task.name for task in opened.tasks] if config.validation.unseen_tasks else opened.seen
    records = stage.validation.validate("end", step=best.step, epoch=opened.timetable.number(best.step), names=names)
    drawn = gather_object([(progress.drawn, progress.drawn_episodes, progress.not_kept)])
    opened.strategy.end(view)
    _keep_for_replay(stage)
    if not opened.accelerator.is_main_process:
        return
    write_json(folder.path / "parameters.json", groups)
    audit = opened.order.audit(
        [frames for frames, _, _ in drawn],
        [episodes for _, episodes, _ in drawn],
        not_kept=[others for _, _, others in drawn],
        batches_per_step=config.training.gradient_accumulation_steps,
    )
    write_json(folder.path / "replay_audit.json", {"stage": config.stage.index, **audit})
    card = model_card.model_card(config, opened.learnt, opened.order.shares, records, steps=progress.step)
    write_text(result.pretrained_model / model_card.FILE_NAME, card)
    folder.checkpoints.point("best", result.folder.name)  # a copy of it, where there are no links, has the card too
    folder.write(
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


def _keep_for_replay(stage: Stage) -> None:
    """Choose what later stages may replay of the task that has been learnt, and put it on record."""
    opened, config = stage.opened, stage.opened.config
    if not config.replay.keeps_part:
        return
    task = next(task for task in opened.tasks if task.name == config.stage.name)
    losses = stage.validation.losses_of_training(task) if config.replay.select == "loss" else {}
    kept = choose(task, config.replay, config.seed, losses)
    if opened.accelerator.is_main_process:
        write_json(opened.folder.buffer, kept.to_json())
