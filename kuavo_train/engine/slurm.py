"""engine=slurm: every cell a job of the cluster, through submitit; those that begin together are an array.

Before a job is preempted, or its time is over, SLURM warns it by SIGUSR1. The stage under way writes its checkpoint and
ends, and then the signal is raised anew for submitit, which queues the job again: that goes on where the checkpoint
stands. Stopping the study cancels the jobs, and those are not queued again.
"""

import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit

from kuavo_train.command_line import errors_in_one_line, quieten_libraries
from kuavo_train.config import EngineConfig, RunConfig
from kuavo_train.engine.engine import Train, log_of, print_into, state_of
from kuavo_train.errors import ConfigError
from kuavo_train.launcher import findable
from kuavo_train.runs.study_file import Cell

CLUSTER = "slurm"
WARNING = signal.SIGUSR1
"""What stages listen to; submitit's own is SIGUSR2. Jobs read it from their environment."""
os.environ["SUBMITIT_PREEMPT_SIGNAL"] = submitit.JobEnvironment.USR_SIG = WARNING.name.removeprefix("SIG")

STOPPED = ".stopped"
"""A file in the folder of logs: the study was stopped, and no job is to be queued again."""


@dataclass(frozen=True)
class InJob:
    """What a job does, as submitit calls it."""

    work: Train
    configs: Sequence[RunConfig]
    log: Path

    def __call__(self) -> int:
        print_into(self.log)
        quieten_libraries()
        status = errors_in_one_line(lambda: self.work(self.configs))
        if state_of(status) == "interrupted" and not (self.log.parent / STOPPED).exists():
            signal.raise_signal(WARNING)  # submitit's own handler again: the job is queued anew, and this process ends
        return status

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """What the job does when its turn comes again. The cell's own files say how far it is."""
        return submitit.helpers.DelayedSubmission(self)


@dataclass(frozen=True)
class SlurmJob:
    cell: Cell
    job: submitit.Job[int]
    logs: Path

    def status(self) -> int | None:
        stopped = (self.logs / STOPPED).exists()
        if not self.job.done(force_check=stopped):
            return None
        try:
            return self.job.result()
        except submitit.core.utils.FailedJobError:  # its log says why
            return 1
        except submitit.core.utils.UncompletedJobError as error:
            with log_of(self.cell, self.logs).open("a") as log:
                log.write(f"error: {' '.join(str(error).split())}\n")
            return 128 + signal.SIGTERM if stopped else 1

    def stop(self, number: int) -> None:
        (self.logs / STOPPED).touch()
        self.job.cancel(check=False)


class Slurm:
    places = sys.maxsize  # the cluster has a queue
    look_s = 5.0

    def __init__(self, config: EngineConfig, work: Train, logs: Path, processes: int):
        """Raises `ConfigError` where there is no cluster, or it has no such options."""
        self.work, self.logs = findable(work), logs.absolute()
        try:
            self.executor = submitit.AutoExecutor(self.logs / "jobs", CLUSTER, slurm_max_num_timeout=config.requeues)
            self.executor.update_parameters(name=logs.parent.name, **_options(config, processes))
        except (RuntimeError, ValueError, TypeError) as error:
            raise ConfigError(f"engine=slurm must be used where SLURM's commands are: {error}") from error
        (self.logs / STOPPED).unlink(missing_ok=True)

    def start(self, cells: Sequence[Cell]) -> list[SlurmJob]:
        with self.executor.batch():
            jobs = [self.executor.submit(InJob(self.work, cell.configs, log_of(cell, self.logs))) for cell in cells]
        return [SlurmJob(cell, job, self.logs) for cell, job in zip(cells, jobs, strict=True)]


def _options(config: EngineConfig, processes: int) -> dict[str, Any]:
    """As submitit names them."""
    options: dict[str, Any] = {
        "timeout_min": config.minutes,
        "cpus_per_task": config.cpus,
        "gpus_per_node": processes if config.gpus is None else config.gpus,
        "mem_gb": config.memory_gb,
        "slurm_partition": config.partition,
        "slurm_array_parallelism": config.jobs,
        "slurm_signal_delay_s": config.warning_seconds,
        "slurm_setup": [f"export SUBMITIT_PREEMPT_SIGNAL={submitit.JobEnvironment.USR_SIG}", *config.setup],
        "slurm_additional_parameters": {"requeue": True, **config.more},
    }
    return {key: value for key, value in options.items() if value is not None}
