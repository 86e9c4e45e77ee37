"""All stages in order, then the report: `python -m kuavo_train.curriculum [profile=… key=value …]`.

Finished stages are skipped and an unfinished one is resumed, so the same command continues what was cut off.
"""

from dataclasses import replace

from omegaconf import DictConfig

from kuavo_train.compose import compose_run, hydra_entry
from kuavo_train.config import ConfigError


def main(_composed: DictConfig, overrides: list[str]) -> int:
    for override in overrides:
        if override.lstrip("~+").startswith(("task=", "stage=", "stage.", "resume=")):
            raise ConfigError(
                f"overrides of the whole curriculum must hold for every stage, got {override}; "
                "run that stage with python -m kuavo_train, or edit its file in configs/tasks"
            )
    configs = compose_run(overrides)
    curriculum = [config.stage for config in configs]
    # The heavy imports come after the configuration has been found good.
    from kuavo_train.report import summary_table, write_report
    from kuavo_train.stage import record_missing_data, run_stage, stage_folder

    if configs[0].data_only:
        record_missing_data(configs[0], curriculum)
        return 0
    for config in configs:
        folder = stage_folder(config)
        if folder.status == "finished":
            print(f"stage {config.stage.index} ({config.stage.name}) is finished in {folder.path}")
            continue
        status = run_stage(replace(config, resume=True), curriculum)
        if status:
            return status
    report = write_report(configs[0].run_folder)
    print(f"\n{summary_table(configs[0].run_folder)}\n\nreport: {report}")
    return 0


if __name__ == "__main__":
    hydra_entry(main)()
