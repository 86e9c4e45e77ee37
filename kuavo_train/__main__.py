"""One stage from the command line: `python -m kuavo_train task=tasks/task2_weighing`.

With strategy=joint there is a single stage, for all tasks: leave task= out.
"""

from omegaconf import DictConfig

from kuavo_train.compose import compose_run, hydra_entry, overrides_for_all_tasks, stages_to_run
from kuavo_train.config import ConfigError, resolve


def main(composed: DictConfig, overrides: list[str]) -> int:
    config = resolve(composed)
    configs = compose_run(overrides_for_all_tasks(overrides), current=config)
    curriculum = [other.stage for other in configs]
    if config.mixture == "all_tasks":
        for override in overrides:
            if override.startswith(("task=", "stage.")):
                raise ConfigError(f"strategy=joint has one stage for all tasks: leave out what chooses one, {override}")
        config = stages_to_run(configs)[0]
    # The heavy imports come after the configuration has been found good.
    from kuavo_train.stage import record_missing_data, run_stage

    if config.data_only:
        record_missing_data(config, curriculum)
        return 0
    return run_stage(config, curriculum)


if __name__ == "__main__":
    hydra_entry(main)()
