"""What is wrong with a stage, all of it at once, before any training time is spent.

    python -m kuavo_train.preflight task=tasks/task2_weighing            # a table, and what is wrong
    python -m kuavo_train.preflight task=tasks/task2_weighing --json     # the same for machines

Nothing is recorded and nothing is written into the run's folder; the exit status is 1 when there is a problem. The
same is looked at before every training.
"""

import contextlib
import sys

from omegaconf import DictConfig

from kuavo_train.command_line import hydra_entry
from kuavo_train.compose import compose_stage


def main(composed: DictConfig, overrides: list[str], *, as_json: bool = False) -> int:
    config, curriculum = compose_stage(composed, overrides)
    # The heavy imports come after the configuration has been found good.
    from kuavo_train.stage.description import describe
    from kuavo_train.stage.findings import listed
    from kuavo_train.stage.preflight import examine_stage

    with contextlib.redirect_stdout(sys.stderr):  # what libraries print on the way is not for machines
        findings = examine_stage(config, curriculum)
    if as_json:
        print(findings.for_machines())
        return int(bool(findings.problems))
    print(f"stage {config.stage.index} ({config.stage.name}) of run {config.run}\n{describe(findings)}")
    if findings.problems:
        print(f"problems\n{listed(findings.problems)}", file=sys.stderr)
        return 1
    print("no problems")
    return 0


def command() -> None:
    as_json = "--json" in sys.argv
    sys.argv = [word for word in sys.argv if word != "--json"]  # Hydra would refuse it
    hydra_entry(lambda composed, overrides: main(composed, overrides, as_json=as_json))()


if __name__ == "__main__":
    command()
