"""One stage from the command line: `python -m kuavo_train task=tasks/task2_weighing`.

With strategy=joint there is a single stage, for all tasks: leave task= out.
"""

from omegaconf import DictConfig

from kuavo_train.command_line import hydra_entry
from kuavo_train.compose import compose_stage


def main(composed: DictConfig, overrides: list[str]) -> int:
    config, curriculum = compose_stage(composed, overrides)
    # The heavy imports come after the configuration has been found good.
    from kuavo_train.stage.setup import record_missing_data
    from kuavo_train.stage.stage import run_stage

    if config.data_only:
        record_missing_data(config, curriculum)
        return 0
    return run_stage(config, curriculum)


def command() -> None:
    hydra_entry(main)()


if __name__ == "__main__":
    command()
