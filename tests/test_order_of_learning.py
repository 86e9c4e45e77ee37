"""What `learn` makes of the stages, told to the user."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from kuavo_sim.skills import SKILLS
from kuavo_sim.tasks import TASKS
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


BACKWARDS = "learn=[sorting,placement,weighing,moving_grasp]"


def test_a_share_of_replay_goes_equally_to_all_earlier_tasks_in_any_order() -> None:
    configs = compose_run([BACKWARDS, "replay.share=0.4"])
    assert [config.stage.replay for config in configs[:3]] == [
        {"sorting": 1.0},
        {"sorting": 0.4, "placement": 0.6},
        {"sorting": 0.2, "placement": 0.2, "weighing": 0.6},
    ]
    assert not any(config.dealt for config in configs)


def test_preflight_names_the_earlier_tasks_that_an_order_leaves_without_replay() -> None:
    config = compose_run([BACKWARDS])[1]
    findings = Findings()
    findings.facts["tasks"] = cast(Any, [{"name": name} for name in ("sorting", "placement", "weighing")])
    findings.look_at_plan(config, {"placement": 1.0}, 1, cast(Any, SimpleNamespace(description="", problems=[])))
    assert [note for note in findings.notes if "give" in note and "no share: sorting; replay.share=0.4" in note]


def test_the_eight_tasks_are_the_four_jobs_and_four_skills_that_can_be_simulated() -> None:
    configs = compose_run(["config_dir=configs/eight_tasks"])
    assert [config.stage.index for config in configs] == list(range(1, 9))
    assert [config.stage.simulation_task in TASKS for config in configs] == [True] * 4 + [False] * 4
    assert {str(config.stage.simulation_task) for config in configs[4:]} <= set(SKILLS)
    for place, config in enumerate(configs):
        assert set(config.stage.replay) == {earlier.stage.name for earlier in configs[: place + 1]}
        assert config.stage.replay[config.stage.name] >= 0.58
