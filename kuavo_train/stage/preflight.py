"""What is wrong with a stage, before any training time is spent: the opening of a training, and a step without values,
which shows what memory training takes."""

import contextlib
from collections.abc import Sequence

from accelerate import Accelerator

from kuavo_train.config import RunConfig, StageConfig
from kuavo_train.stage.findings import Findings, NotReady
from kuavo_train.stage.followed_step import step_memory_of
from kuavo_train.stage.lineage import Start, checkpoint_to_resume, result_before
from kuavo_train.stage.setup import accelerator_for, open_stage


def examine_stage(config: RunConfig, curriculum: Sequence[StageConfig]) -> Findings:
    """What `run_stage` would begin with, without recording, training or writing into the run's folder."""
    findings = Findings()
    accelerator = findings.attempt(accelerator_for, config) or Accelerator(cpu=True)
    start = Start(
        resumed=findings.attempt(checkpoint_to_resume, config, curriculum),
        before=findings.attempt(result_before, config, curriculum),
    )
    with contextlib.suppress(NotReady):  # why is among the findings
        opened = open_stage(config, curriculum, start, accelerator, findings)
        findings.look_at_step(config, step_memory_of(opened))
    return findings
