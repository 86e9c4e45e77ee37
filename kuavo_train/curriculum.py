"""All stages in order, then the report: `python -m kuavo_train.curriculum [profile=… key=value …]`.

Finished stages are skipped and an unfinished one is resumed, so the same command continues what was cut off. Where the
final policy is rolled out, the report opens with films of it.
"""

import os
from collections.abc import Sequence
from dataclasses import replace

from omegaconf import DictConfig

from kuavo_train.command_line import hydra_entry
from kuavo_train.compose import check_no_study, check_overrides, compose_run, stages_to_run
from kuavo_train.config import RunConfig
from kuavo_train.launcher import run_together


def main(_composed: DictConfig, overrides: list[str]) -> int:
    check_overrides(overrides)
    check_no_study(overrides)
    configs = compose_run(overrides)
    if configs[0].data_only:
        # The heavy imports come after the configuration has been found good, and where they are needed.
        from kuavo_train.stage.setup import record_missing_data

        record_missing_data(configs[0], [config.stage for config in configs])
        return 0
    status = train_all_stages(configs)
    if status or os.environ.get("RANK", "0") != "0":  # of several processes, the first one reports
        return status
    from kuavo_train.evaluation.films import ensure_films
    from kuavo_train.reporting.run_analysis import analyse
    from kuavo_train.reporting.text_report import success_table, summary_table
    from kuavo_train.reporting.write_report import write_report
    from kuavo_train.runs.stored_run import StoredRun

    run = StoredRun.open(configs[0].run_folder)
    ensure_films(run)
    analysis = analyse(run)
    report = write_report(analysis)
    print(f"\n{summary_table(analysis)}\n\nreport: {report}{success_table(analysis)}")
    return 0


def train_all_stages(configs: Sequence[RunConfig]) -> int:
    """Train what is not finished yet, in as many processes as the configs say.

    Args:
        configs: one per task, in the order of learning.

    Returns:
        The exit status of the first stage that does not come to its end, 0 where all do.

    Raises:
        ConfigError: a stage has been begun with other settings; nothing is trained then. Where several processes train,
            they say so themselves.
    """
    return run_together(configs[0].processes, _train_all_stages, configs)


def _train_all_stages(configs: Sequence[RunConfig]) -> int:
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
