"""All stages in order, then the report: `python -m kuavo_train.curriculum [profile=… key=value …]`.

Finished stages are skipped and an unfinished one is resumed, so the same command continues what was cut off.
"""

import os
from collections.abc import Sequence
from dataclasses import replace

from omegaconf import DictConfig

from kuavo_train.command_line import hydra_entry
from kuavo_train.compose import check_overrides, compose_run, stages_to_run
from kuavo_train.config import RunConfig


def main(_composed: DictConfig, overrides: list[str]) -> int:
    check_overrides(overrides)
    configs = compose_run(overrides)
    # The heavy imports come after the configuration has been found good.
    from kuavo_train.reporting.run_analysis import analyse
    from kuavo_train.reporting.text_report import summary_table
    from kuavo_train.reporting.write_report import write_report
    from kuavo_train.runs.stored_run import StoredRun
    from kuavo_train.stage.setup import record_missing_data

    if configs[0].data_only:
        record_missing_data(configs[0], [config.stage for config in configs])
        return 0
    status = train_all_stages(configs)
    if status or os.environ.get("RANK", "0") != "0":  # of several processes, the first one reports
        return status
    analysis = analyse(StoredRun.open(configs[0].run_folder))
    report = write_report(analysis)
    print(f"\n{summary_table(analysis)}\n\nreport: {report}")
    return 0


def train_all_stages(configs: Sequence[RunConfig]) -> int:
    """Train what is not finished yet; returns the exit status of the first stage that does not come to its end.

    Args:
        configs: one per task, in the order of learning.

    Raises:
        ConfigError: a stage has been begun with other settings; nothing is trained then.
    """
    from kuavo_train.runs.run_folder import stage_folder
    from kuavo_train.stage.stage import run_stage

    check_curriculum_settings(configs)
    for config in stages_to_run(configs):
        folder = stage_folder(config)
        if folder.status == "finished":
            print(f"stage {config.stage.index} ({config.stage.name}) is finished in {folder.path}")
        elif status := run_stage(replace(config, resume=True), [each.stage for each in configs]):
            return status
    return 0


def check_curriculum_settings(configs: Sequence[RunConfig]) -> None:
    """Raises `ConfigError` where a stage has been begun with other settings, naming them."""
    from kuavo_train.stage.lineage import check_settings

    for config in stages_to_run(configs):
        check_settings(config, [each.stage for each in configs])


def command() -> None:
    hydra_entry(main)()


if __name__ == "__main__":
    command()
