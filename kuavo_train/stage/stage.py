"""One stage as a story: open, begin, train (validating and saving on the way), conclude.

setup.py opens it, parts.py puts it together, training.py has the hooks of its trainer, conclusion.py its end.
"""

import contextlib
from collections.abc import Iterator, Sequence

from kuavo_train.config import RunConfig, StageConfig
from kuavo_train.errors import Interrupted, require
from kuavo_train.interruption import listening
from kuavo_train.runs.lease import Lease, NoLease, held
from kuavo_train.runs.run_folder import StageFolder, stage_folder
from kuavo_train.stage.agreement import Agreement
from kuavo_train.stage.conclusion import conclude
from kuavo_train.stage.description import describe
from kuavo_train.stage.findings import Findings
from kuavo_train.stage.lineage import start_of
from kuavo_train.stage.parts import begin
from kuavo_train.stage.remedies import reported_in_one_line
from kuavo_train.stage.setup import OpenedStage, accelerator_for, open_stage, record_missing_data
from kuavo_train.stage.training import train
from kuavo_train.strategies.chosen import chosen_strategy


def run_stage(config: RunConfig, curriculum: Sequence[StageConfig]) -> int:
    """Run the stage of `config` within its curriculum; returns the exit status (130, 143 or 138 when interrupted).

    Raises:
        ConfigError: before training; nothing is written that a later run would stumble over.
        RunError: something the user can mend, or TrainingDiverged: loss or gradient not finite. The last good
            checkpoint is kept.
    """
    with _heeding_signals(config) as agreement, _owning(config, agreement) as lease:
        opened = _open(config, curriculum, agreement)
        with begin(opened, agreement, lease) as stage:
            train(stage)
            conclude(stage)
    return agreement.exit_status


@contextlib.contextmanager
def _heeding_signals(config: RunConfig) -> Iterator[Agreement]:
    """A signal ends the stage with its exit status, and a word on what is kept."""
    accelerator = accelerator_for(config)
    together = accelerator.num_processes
    require(config.processes in (1, together), "processes", f"be the {together} that train together", config.processes)
    with listening() as listener:
        agreement = Agreement(listener, accelerator)
        try:
            with reported_in_one_line(config):
                yield agreement
            if listener.number is not None:  # in the midst of the last files: the stage is whole, but no other begins
                raise Interrupted(listener.number)
        except Interrupted as interrupted:
            accelerator.print(f"interrupted: {_kept(stage_folder(config))}", flush=True)
            agreement.exit_status = interrupted.exit_status


def _kept(folder: StageFolder) -> str:
    if folder.status == "absent":
        return "nothing was trained yet; the same command begins again"
    last = folder.checkpoints.latest()
    kept = f"the checkpoint of step {last.step} is in {last.folder}" if last else "nothing was trained yet"
    return f"{kept}; continue with resume=true"


def _owning(config: RunConfig, agreement: Agreement) -> contextlib.AbstractContextManager[Lease | NoLease]:
    """The stage's folder is held by the first of this run's processes. Raises `ConfigError` where another has it."""
    if not agreement.accelerator.is_main_process:
        return contextlib.nullcontext(NoLease())
    stage = config.stage
    return held(stage_folder(config).path, f"stage {stage.index} ({stage.name}) of run {config.run}")


def _open(config: RunConfig, curriculum: Sequence[StageConfig], agreement: Agreement) -> OpenedStage:
    """All that the stage needs, recorded and computed where it is missing, and what preflight says of it, printed."""
    accelerator, stage = agreement.accelerator, config.stage
    with agreement.listener.giving_up(), accelerator.main_process_first():
        # What the first process records and caches, the others find.
        start = start_of(config, curriculum)
        chosen_strategy(config)  # or its mistake would wait for the recording
        record_missing_data(config, curriculum)
        opened = open_stage(config, curriculum, start, accelerator, Findings())
    where = f"stage {stage.index} ({stage.name}) of run {config.run}, in {opened.folder.path}"
    accelerator.print(f"\n{where}\n{describe(opened.findings)}", flush=True)
    # Each process computes a share of what is missing.
    process, processes = accelerator.process_index, accelerator.num_processes
    agreement.repeatable(
        lambda: opened.images.fill(process=process, processes=processes, progress=accelerator.is_main_process)
    )
    return opened
