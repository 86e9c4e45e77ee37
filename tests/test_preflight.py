"""Preflight tells everything about a stage at once, as a table and for machines, and leaves nothing behind."""

import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from commands import Here
from small_datasets import CAMERAS, write_dataset
from stages import changed

from kuavo_train.config import RunConfig
from kuavo_train.stage.description import describe
from kuavo_train.stage.findings import Findings, NotReady, listed, token_counts
from kuavo_train.stage.preflight import examine_stage
from kuavo_train.stage.stage import run_stage

Configs = Callable[..., list[RunConfig]]
Overrides = Callable[..., list[str]]


def examine(configs: list[RunConfig], place: int = 0) -> Findings:
    return examine_stage(configs[place], [config.stage for config in configs])


def on_data(configs: list[RunConfig], root: Path) -> list[RunConfig]:
    return [changed(config, stage={"root": str(root / config.stage.name)}) for config in configs]


@pytest.fixture
def small_configs(small_configs: Configs) -> Configs:
    """Of all four tasks, of which the fourth has other dimensions."""
    return partial(small_configs, "learn=null")


def test_the_table_shows_what_will_be_trained_on_what(small_configs: Configs) -> None:
    findings = examine(small_configs())
    assert findings.problems == []
    table = describe(findings)
    for words in (
        "task               train  held out    frames     hours       fps    tokens     share",
        "moving_grasp           3         2        42      0.00        10",
        "cameras  head_cam_h 32×32, wrist_cam_l 32×32, wrist_cam_r 32×32",
        "state    16 = 7 left_arm + 2 claws + 7 right_arm",
        "action   20 = 7 left_arm + 2 claws + 7 right_arm + 2 base_position + 1 base_yaw + 1 base_mode   (sorting)",
        "  weighing       Pick up the package from the conveyor belt",
        "trained",
        "in trained groups",
        "checkpoints",
        "4 steps of 4 samples",
    ):
        assert words in table, words
    tokens = [task["tokens"] for task in findings.facts["tasks"]]
    assert all(10 < count <= findings.facts["token_limit"] for count in tokens)


def test_a_clip_stands_beside_the_episodes_in_seconds(small_configs: Configs) -> None:
    """The small episodes last 1.4 s at 10 Hz, and a query is made every 4 frames."""
    short = examine(small_configs(policy={"mem_backprop_depth": 2, "n_action_steps": 4}))
    said = "  clip     K = 2 queries × 4 steps / 10 Hz = 0.8 s; episodes last 1.4 – 1.4 s (median 1.4)"
    assert f"{said}; cues further back are carried without gradient" in describe(short).splitlines()
    assert short.facts["clip"] == {"queries": 2, "steps": 4}
    assert [task["episode_seconds"] for task in short.facts["tasks"]] == [(1.4, 1.4, 1.4)] * 4
    whole = examine(small_configs(policy={"mem_backprop_depth": 4, "n_action_steps": 4}))
    assert said.replace("K = 2", "K = 4").replace("= 0.8", "= 1.6") in describe(whole).splitlines()


def test_what_is_set_apart_to_choose_alphas_on_is_shown_and_so_is_the_memory_that_merging_takes(
    small_configs: Configs,
) -> None:
    """The statistics stay those of all training episodes, so that strategies compare."""
    plain, merging = examine(small_configs()), examine(small_configs("strategy=merge", "merge.episodes=1"))
    assert merging.problems == []
    assert "  merge    1 of 3 training episodes are set apart to choose alphas on" in describe(merging).splitlines()
    assert [(task["train_episodes"], task["choosing_episodes"]) for task in merging.facts["tasks"]] == [(2, 1)] * 4
    assert "set apart" not in describe(plain)
    memory = merging.facts["memory_bytes"]
    assert memory["merging"] == 2 * memory["gradients"]  # float32, as the weights are
    assert "merging" not in plain.facts["memory_bytes"]
    (problem,) = {each.partition("training episodes of ")[0] for each in examine(merging_on(small_configs, 3)).problems}
    assert problem == "merge.episodes must be less than the 3 "


def merging_on(small_configs: Configs, episodes: int) -> list[RunConfig]:
    return small_configs("strategy=merge", "merge.episodes=1", merge={"episodes": episodes})


def test_where_no_memory_is_trained_through_time_there_is_no_clip(small_configs: Configs) -> None:
    findings = examine(small_configs(policy={"mem_backprop_depth": 0}))
    assert findings.problems == []
    assert "clip" not in findings.facts
    assert not [line for line in describe(findings).splitlines() if line.startswith("  clip")]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"data": {"feature_stride": 3}}, "data.feature_stride must divide policy.n_action_steps=4: .*, got 3"),
        (
            {"data": {"feature_stride": 2}, "training": {"query_jitter": 1}},
            "training.query_jitter must be a multiple of data.feature_stride=2, .*, got 1",
        ),
    ],
)
def test_a_feature_stride_that_leaves_out_what_a_query_sees_is_a_problem(
    small_configs: Configs, changes: dict[str, dict[str, int]], problem: str
) -> None:
    problems = examine(small_configs(**changes)).problems
    assert [bool(re.fullmatch(problem, found)) for found in problems] == [True], problems


def test_training_and_preflight_find_the_same(small_configs: Configs) -> None:
    wrong = {"policy": {"max_state_dim": 4}, "tracking": "online", "training": {"freeze_first_stage": ["arm"]}}
    configs = small_configs(run="wrong", **wrong)
    problems = examine(configs).problems
    assert len(problems) >= 2
    with pytest.raises(NotReady) as refused:
        run_stage(configs[0], [config.stage for config in configs])
    assert str(refused.value) == f"preflight found problems\n{listed(problems)}"


def test_preflight_prints_its_table_and_nothing_else(small_run: Overrides, here: Here) -> None:
    shown = here("kuavo_train.preflight", *small_run("learn=null", "run=quiet"))
    assert shown.stderr == ""
    assert shown.stdout.splitlines()[0] == "stage 1 (moving_grasp) of run quiet"
    assert shown.stdout.splitlines()[-1] == "no problems"


def test_a_long_name_does_not_run_into_what_stands_beside_it(small_configs: Configs) -> None:
    findings = examine(small_configs())
    for task in findings.facts["tasks"]:
        task["name"] = f"{task['name']}_of_twenty_and_more"
    lines = describe(findings).splitlines()
    assert any(re.match("  moving_grasp_of_twenty_and_more +Grasp the object", line) for line in lines)
    assert len({len(row) for row in lines[:5]}) == 1  # the columns stand below each other


def test_preflight_writes_nothing_into_the_runs_folder(small_configs: Configs) -> None:
    configs = small_configs()
    examine(configs)
    assert not configs[0].run_folder.exists()


def test_all_problems_are_told_at_once_each_with_its_fix(
    small_configs: Configs, datasets: Path, tmp_path: Path
) -> None:
    shutil.copytree(datasets, tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / "weighing")
    shutil.rmtree(tmp_path / "data" / "placement")
    write_dataset(tmp_path / "data" / "placement", fps=20, size=48)
    policy = {"tokenizer_max_length": 20, "max_action_dim": 16, "pretrained_path": "/nowhere/at/all"}
    configs = small_configs(policy=policy, training={"device": "mps"})
    said = "\n".join(examine(on_data(configs, tmp_path / "data"), place=1).problems)
    for problem in (
        "must follow a finished stage 1",
        "stage 2 (weighing): dataset",
        "fps must be equal for all tasks, got {'moving_grasp': 10, 'placement': 20, 'sorting': 10}",
        "observation.images.wrist_cam_r must have one size (height, width) in all tasks",
        "data.image_size=[32,32]",
        "instruction of sorting must fit policy.tokenizer_max_length=20 tokens",
        "policy.max_action_dim must be at least 20",
        "policy.pretrained_path must be an existing folder or a hub id",
        "training.device must be available, got mps",
    ):
        assert problem in said, problem


def test_what_two_checks_come_upon_is_one_problem(small_configs: Configs) -> None:
    problems = examine(small_configs(policy={"chunk_sise": 3})).problems
    assert [problem for problem in problems if "chunk_sise" in problem] == problems
    assert len(problems) == 1


def test_what_is_wrong_with_a_dataset_does_not_hide_what_else_is(
    small_configs: Configs, datasets: Path, tmp_path: Path
) -> None:
    shutil.copytree(datasets, tmp_path / "data")
    for name, about in (
        ("weighing", {"claw_scale": 100, "fps": 15}),
        ("placement", {"cameras": CAMERAS[1:], "fps": 15}),
    ):
        shutil.rmtree(tmp_path / "data" / name)
        write_dataset(tmp_path / "data" / name, episodes=4, length=4, size=24, **about)
    configs = small_configs(policy={"tokenizer_max_length": 20})
    problems = examine(on_data(configs, tmp_path / "data")).problems
    for begin, words in (
        ("stage 2 (weighing)", "claws must be in"),
        ("stage 3 (placement)", "cameras must include observation.images.head_cam_h"),
        ("fps must be equal", "{'moving_grasp': 10, 'weighing': 15, 'placement': 15, 'sorting': 10}"),
        ("observation.images.head_cam_h, ", "'weighing': (24, 24)"),
        ("instruction of weighing", "20 tokens"),
    ):
        assert [words in problem for problem in problems if problem.startswith(begin)] == [True], begin


def test_one_joint_under_two_names_and_one_that_never_moves_are_noted(
    small_configs: Configs, datasets: Path, tmp_path: Path
) -> None:
    shutil.copytree(datasets, tmp_path / "data")
    info = tmp_path / "data" / "weighing" / "meta" / "info.json"
    info.write_text(info.read_text().replace("left_claw", "gripper_l").replace("right_claw", "gripper_r"))
    table = tmp_path / "data" / "placement" / "data" / "chunk-000" / "file-000.parquet"
    frames = pd.read_parquet(table)
    frames["action"] = [np.concatenate([[0.25], action[1:]]).astype(np.float32) for action in frames["action"]]
    frames.to_parquet(table)
    said = examine(on_data(small_configs(), tmp_path / "data"))
    assert said.problems == []
    names = "has gripper_l, gripper_r where moving_grasp has left_claw, right_claw; if they are the same"
    assert [note.partition(names)[0] for note in said.notes if names in note] == [
        "weighing: state ",
        "weighing: action ",
    ]
    assert "placement: action never changes in zarm_l1_link" in said.notes


def test_a_video_that_was_cut_off_is_named_with_the_episode_it_lacks(
    small_configs: Configs, datasets: Path, tmp_path: Path
) -> None:
    shutil.copytree(datasets, tmp_path / "data")
    root = tmp_path / "data" / "sorting"
    video = next((root / "videos").rglob("*wrist_cam_l*/**/*.mp4"))
    shutil.copy(next((datasets / "weighing" / "videos").rglob("*wrist_cam_l*/**/*.mp4")), video)
    whole = video.read_bytes()
    write_dataset(tmp_path / "short", episodes=4, base=True)
    shutil.copy(next((tmp_path / "short" / "videos").rglob("*wrist_cam_l*/**/*.mp4")), video)
    assert len(video.read_bytes()) < len(whole)
    problems = examine(on_data(small_configs(), tmp_path / "data")).problems
    assert len(problems) == 1
    file = video.relative_to(root)
    assert f"wrist_cam_l of episode 4 must lie in its file, of 5.60 s, got 5.60 to 7.00 s of {file}" in problems[0]


def test_the_command_prints_json_alone_and_fails_where_there_are_problems(small_run: Overrides, here: Here) -> None:
    done = here("kuavo_train.preflight", *small_run("learn=null", "policy.tokenizer_max_length=20"), "--json")
    assert done.returncode == 1, done.stderr
    assert json.loads(done.stdout)["problems"]


def test_machines_are_told_what_the_table_tells(small_configs: Configs) -> None:
    said = json.loads(examine(small_configs()).for_machines())
    assert said["problems"] == []
    assert [task["name"] for task in said["tasks"]] == ["moving_grasp", "weighing", "placement", "sorting"]
    assert {"parameters", "memory_bytes", "disk_bytes", "training", "notes"} <= said.keys()


def test_the_tokens_of_a_policy_whose_config_names_no_tokenizer_are_not_counted() -> None:
    policy_config = SimpleNamespace(tokenizer_max_length=48)  # as that of π0
    assert token_counts(policy_config, ["pick the red one"]) == []
