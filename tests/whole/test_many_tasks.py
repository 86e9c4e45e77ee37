"""Another order of the tasks, and more of them, through the same commands."""

import json
from pathlib import Path
from typing import Any

import pytest
from small_datasets import TASK_NAMES, write_dataset
from stages import changed, records, run

from kuavo_train.compose import compose_run
from kuavo_train.config import CONFIG_FOLDER, RunConfig
from kuavo_train.curriculum import train_all_stages
from kuavo_train.data.task import open_task
from kuavo_train.reporting.run_analysis import analyse
from kuavo_train.reporting.write_report import write_report
from kuavo_train.runs.run_folder import stage_folder
from kuavo_train.runs.stored_run import StoredRun
from kuavo_train.stage.validated_tasks import validated_tasks

SKILL_NAMES = ("put_in_bin", "put_on_box", "hand_over", "turn_and_put")


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory) -> list[RunConfig]:
    """A finished run of the eight tasks, of which two of three held-out episodes each are validated."""
    folder = tmp_path_factory.mktemp("eight")
    for number, name in enumerate((*TASK_NAMES, *SKILL_NAMES)):
        write_dataset(folder / "data" / name, base=name in ("sorting", "turn_and_put"), seed=number, length=10)
    configs = compose_run(smallest(folder, f"config_dir={CONFIG_FOLDER / 'eight_tasks'}", "data.held_out_episodes=3"))
    assert train_all_stages(configs) == 0
    return configs


def smallest(folder: Path, *words: str) -> list[str]:
    return [
        "profile=smoke",
        "simulation=null",
        "rollout.episodes=0",
        f"outputs={folder / 'outputs'}",
        f"data.root={folder / 'data'}",
        "tiny_vlm.image_size=32",
        "policy.resize_imgs_with_padding=[32,32]",
        "policy.chunk_size=6",
        "policy.n_action_steps=4",
        "policy.num_mem_tokens=0",
        "training.max_steps=1",
        "training.batch_size=8",
        *words,
    ]


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_every_one_of_eight_stages_replays_all_tasks_before_it(eight: list[RunConfig]) -> None:
    for place, config in enumerate(eight):
        declared = read(stage_folder(config).path / "replay_audit.json")["declared"]
        assert set(declared) == {earlier.stage.name for earlier in eight[: place + 1]}


def test_a_task_is_validated_on_the_same_part_of_its_episodes_all_through_a_run(eight: list[RunConfig]) -> None:
    tasks = read(eight[0].run_folder / "run.json")["tasks"]
    part = {task["name"]: task["dataset"]["validated_episodes"] for task in tasks}
    assert len(part) == 8
    assert all(set(part[task["name"]]) < set(task["dataset"]["held_out_episodes"]) for task in tasks)
    for config in eight:
        for record in records(stage_folder(config)):
            assert [episode["episode"] for episode in record["episodes"]] == part[record["task"]]


def test_a_report_says_which_part_is_validated(eight: list[RunConfig]) -> None:
    analysis = analyse(StoredRun.open(eight[0].run_folder))
    (said,) = [check for check in analysis.matrix["checks"] if "2 of 3 held-out episodes a task" in check["detail"]]
    assert said["passed"]
    assert {task["validated_episodes"] for task in analysis.matrix["tasks"]} == {2}
    assert "<th>validated</th>" in write_report(analysis).read_text(encoding="utf-8")


def test_a_stage_says_what_its_validations_cost_beside_its_training(
    eight: list[RunConfig], capfd: pytest.CaptureFixture[str]
) -> None:
    assert run([changed(config, run="again") for config in eight]) == 0
    said = capfd.readouterr().out
    assert "2 of 3 held-out episodes, the same ones throughout the run (validation.share)" in said
    # Before and at the end 8 tasks of 2 episodes of 3 queries, after the step one.
    assert "3 validations, 102 queries beside 8 training samples" in said


def test_a_later_stage_keeps_the_part_that_the_run_has_on_record(eight: list[RunConfig], tmp_path: Path) -> None:
    two = [changed(config, run="two", outputs=str(tmp_path), validation={"share": 1.0}) for config in eight[:2]]
    assert run(two) == 0
    longer = {"max_steps": None, "epochs": 8, "batch_size": 32}  # would have room for all three
    assert run(two, 1, training=longer, validation={"every_epochs": 8}) == 0
    for stage, kind in ((0, "start"), (1, "end")):
        assert {len(record["episodes"]) for record in records(stage_folder(two[stage]), kind)} == {2}


def test_a_run_that_was_killed_before_its_first_checkpoint_obeys_another_share(
    eight: list[RunConfig], tmp_path: Path
) -> None:
    begun = [changed(config, run="begun", outputs=str(tmp_path)) for config in eight[:2]]
    begun[0].run_folder.mkdir(parents=True)
    record = (eight[0].run_folder / "run.json").read_text(encoding="utf-8")
    (begun[0].run_folder / "run.json").write_text(record, encoding="utf-8")
    tasks = [open_task(config.stage, config.data) for config in begun]
    obeying = validated_tasks(changed(begun[0], validation={"share": None}), tasks, 4)
    assert [task.validated for task in obeying] == [task.held_out_episodes for task in tasks]
    (stage_folder(begun[0]).path / "checkpoints" / "000001").mkdir(parents=True)
    kept = validated_tasks(changed(begun[0], validation={"share": None}), tasks, 4)
    assert {len(task.validated) for task in kept} == {2}


def test_the_four_jobs_are_learnt_in_the_opposite_order_with_replay(datasets: Path, tmp_path: Path) -> None:
    order = "learn=[sorting,placement,weighing,moving_grasp]"
    words = smallest(tmp_path, order, "replay.share=0.4", f"data.root={datasets}", "data.held_out_episodes=2")
    configs = compose_run(words)
    assert train_all_stages(configs) == 0
    run_record = StoredRun.open(configs[0].run_folder)
    assert [stage.name for stage in run_record.stages] == ["sorting", "placement", "weighing", "moving_grasp"]
    assert [stage.replay.declared["sorting"] for stage in run_record.stages if stage.replay] == pytest.approx(
        [1.0, 0.4, 0.2, 0.1334]
    )
    assert analyse(run_record).matrix["partial"] is False
