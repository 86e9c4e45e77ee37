"""What a job of a cluster does in a test: it is preempted in the third step, the first time that it runs."""

import os
import signal
from collections.abc import Sequence
from typing import Any

from kuavo_train.config import RunConfig
from kuavo_train.runs.run_folder import stage_folder
from kuavo_train.study import train_cell
from kuavo_train.training.learner import Learner


def train_preempted(configs: Sequence[RunConfig]) -> int:
    """With the warning that SLURM sends to a job's processes."""
    learn = Learner.learn

    def learn_warned(learner: Learner, *arguments: Any, step: int, **named: Any) -> dict[str, float]:
        if step == 2:
            os.kill(os.getpid(), signal.SIGUSR1)
        return learn(learner, *arguments, step=step, **named)

    if stage_folder(configs[0]).status == "absent":
        Learner.learn = learn_warned  # type: ignore[method-assign]
    return train_cell(configs)
