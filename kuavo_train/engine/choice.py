"""The engine that a configuration names."""

from pathlib import Path

from kuavo_train.config import EngineConfig
from kuavo_train.engine.engine import Engine, Train
from kuavo_train.engine.inline import Inline
from kuavo_train.engine.local import Local
from kuavo_train.engine.side_by_side import SideBySide


def engine_of(config: EngineConfig, work: Train, logs: Path, processes: int = 1) -> Engine:
    """
    Args:
        work: trains a cell, in whatever process the engine chooses.
        logs: the folder for what cells print that are not trained in this process.
        processes: that train a cell together.
    """
    if config.name == "inline":
        return Inline(work)
    if config.name == "local":
        return SideBySide(Local(config.jobs, work, logs), logs)
    from kuavo_train.engine.slurm import Slurm  # submitit looks for a cluster

    return SideBySide(Slurm(config, work, logs, processes), logs)
