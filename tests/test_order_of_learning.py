"""What `learn` makes of the stages, told to the user."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from kuavo_train.compose import compose_run
from kuavo_train.data.mixture import mixture_of
from kuavo_train.errors import ConfigError
from kuavo_train.stage.findings import Findings
from kuavo_train.stage.lineage import result_before


def test_a_stage_out_of_turn_names_the_file_of_the_task_before_and_the_order(tmp_path: Path) -> None:
    configs = compose_run(["learn=[weighing,moving_grasp]", f"outputs={tmp_path}"])
    message = r"follow a finished stage 1 \(weighing\).* task=tasks/task2_weighing .*'learn=\[weighing,moving_grasp\]'"
    with pytest.raises(ConfigError, match=message):
        result_before(configs[1], [config.stage for config in configs])


def test_preflight_says_whose_replay_shares_went_to_whom() -> None:
    config = compose_run(["learn=[moving_grasp,placement]"])[-1]
    findings = Findings()
    findings.facts["tasks"] = []
    shares = mixture_of(config).shares({"placement": 1})
    findings.look_at_plan(config, shares, 1, cast(Any, SimpleNamespace(description="", problems=[])))
    message = "(weighing 0.2) go to the others: moving_grasp 0.125, placement 0.875"
    assert [note for note in findings.notes if message in note]
