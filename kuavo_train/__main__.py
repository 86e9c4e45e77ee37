"""One stage from the command line: `python -m kuavo_train task=tasks/task2_weighing`."""

from omegaconf import DictConfig

from kuavo_train.compose import compose_run, hydra_entry, overrides_for_all_tasks
from kuavo_train.config import resolve


def main(composed: DictConfig, overrides: list[str]) -> int:
    config = resolve(composed)
    configs = compose_run(overrides_for_all_tasks(overrides), current=config)
    curriculum = [other.stage for other in configs]
    # The heavy imports come after the configuration has been found good.
    from kuavo_train.stage import record_missing_data, run_stage

    if config.data_only:
        record_missing_data(config, curriculum)
        return 0
    return run_stage(config, curriculum)


if __name__ == "__main__":
    hydra_entry(main)()
