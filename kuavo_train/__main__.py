"""One stage from the command line: `python -m kuavo_train task=tasks/task2_weighing`.

With strategy=joint there is a single stage, for all tasks: leave task= out.
"""

from collections.abc import Sequence

from omegaconf import DictConfig

from kuavo_train.command_line import hydra_entry
from kuavo_train.compose import compose_stage
from kuavo_train.config import RunConfig, StageConfig
from kuavo_train.launcher import run_together


def main(composed: DictConfig, overrides: list[str]) -> int:
    config, curriculum = compose_stage(composed, overrides)
    if config.data_only:
        from kuavo_train.stage.setup import record_missing_data

        record_missing_data(config, curriculum)
        return 0
    return run_together(config.processes, _train, config, curriculum)


def _train(config: RunConfig, curriculum: Sequence[StageConfig]) -> int:
    from kuavo_train.stage.stage import run_stage  # heavy, and the configuration comes first

    return run_stage(config, curriculum)


def command() -> None:
    hydra_entry(main)()


if __name__ == "__main__":
    command()
