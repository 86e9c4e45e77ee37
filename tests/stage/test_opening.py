"""How a stage begins, or is refused before it writes anything: lineage, settings of its run, policy and data."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from stages import changed, run

from kuavo_train.config import LoraConfig, RunConfig, SimulationConfig
from kuavo_train.curriculum import train_all_stages
from kuavo_train.data.normalization import Normalization
from kuavo_train.errors import ConfigError
from kuavo_train.runs.files import write_json
from kuavo_train.runs.run_folder import stage_folder

Configs = Callable[..., list[RunConfig]]


def first_stage_copied(configs: list[RunConfig], folder: Path) -> Path:
    """`outputs` of a run whose first stage alone is finished."""
    later = shutil.ignore_patterns("stage[234]*", "report")
    shutil.copytree(configs[0].run_folder, folder / "outputs" / "smoke", symlinks=True, ignore=later)
    return folder / "outputs"


def test_a_checkpoint_with_another_normalization_is_refused(four_stages: list[RunConfig], tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    first = stage_folder(four_stages[0]).path
    shutil.copytree(first, outputs / "smoke" / first.name)
    normalization = json.loads((four_stages[0].run_folder / "normalization.json").read_text())
    moved = [replace(config, outputs=str(outputs)) for config in four_stages]
    with pytest.raises(ConfigError, match="must have the run's normalization none"):
        run(moved, 1)
    normalization["statistics"]["action"]["mean"][0] += 0.5
    other = Normalization("joint", normalization["statistics"])
    write_json(outputs / "smoke" / "normalization.json", other.to_json())
    with pytest.raises(ConfigError, match=r"must have the run's normalization .* it belongs to another run"):
        run(moved, 1)


def test_a_started_folder_is_refused_without_resume_and_a_finished_one_always(
    four_stages: list[RunConfig], small_configs: Configs
) -> None:
    with pytest.raises(ConfigError, match=r"stage 1 .* is finished in .*; delete the folder to run it again"):
        run(four_stages, 0)
    configs = small_configs()
    stage_folder(configs[0]).path.mkdir(parents=True)
    (stage_folder(configs[0]).path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="must be empty to start into; continue with resume=true, or delete it"):
        run(configs, 0)


def test_a_stage_without_the_one_before_names_the_command_to_run(small_configs: Configs) -> None:
    configs = small_configs()
    command = "task=tasks/task1_moving_grasp run=smoke profile=smoke"
    message = rf"must follow a finished stage 1 \(moving_grasp\), got absent .*{command}"
    with pytest.raises(ConfigError, match=message):
        run(configs, 1)


def test_a_damaged_checkpoint_is_refused(four_stages: list[RunConfig], tmp_path: Path) -> None:
    outputs = first_stage_copied(four_stages, tmp_path)
    weights_file = outputs / "smoke/stage1_moving_grasp/checkpoints/best/pretrained_model/model.safetensors"
    content = bytearray(weights_file.read_bytes())
    content[-1] ^= 1
    weights_file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"model.safetensors must have sha256 .*delete the checkpoint folder"):
        run(four_stages, 1, outputs=str(outputs))


def test_a_run_keeps_its_seed_data_and_policy(four_stages: list[RunConfig], tmp_path: Path) -> None:
    outputs = first_stage_copied(four_stages, tmp_path)
    message = r"run smoke must keep the settings it began with .*: seed \(was 0, is 7\); .* choose another run=NAME"
    with pytest.raises(ConfigError, match=message):
        run(four_stages, 1, outputs=str(outputs), seed=7)


def test_a_run_keeps_its_held_out_episodes(four_stages: list[RunConfig], tmp_path: Path) -> None:
    outputs = first_stage_copied(four_stages, tmp_path)
    message = r"the held-out episodes of \w+ must stay those run smoke began with .* put data.held_out_episodes"
    with pytest.raises(ConfigError, match=message):
        run(four_stages, 1, outputs=str(outputs), data={"split_seed": 5})


def test_a_finished_run_answers_for_its_own_settings_alone(
    four_stages: list[RunConfig], capsys: pytest.CaptureFixture
) -> None:
    def called_again(**changes: Any) -> int:
        return train_all_stages([changed(config, **changes) for config in four_stages])

    assert called_again(training={"log_every": 1}, data={"num_workers": 3}, resume=True) == 0
    assert capsys.readouterr().out.count("is finished in") == 4
    with pytest.raises(ConfigError) as refused:
        called_again(training={"lr": 0.001}, policy={"num_mem_tokens": 8})
    for words in ("training.lr (was 0.002, is 0.001)", "policy.num_mem_tokens (was 4, is 8)", "another run=NAME"):
        assert words in str(refused.value)
    with pytest.raises(ConfigError, match=r"policy.num_mem_token must be a field of .*mean policy.num_mem_tokens"):
        called_again(policy={"num_mem_token": 8})


BAD_STAGES: list[tuple[tuple[str, ...], dict[str, Any], str]] = [
    # words for Hydra, settings, what preflight or the factory must say
    (
        (),
        {"policy": {"tokenizer_max_length": 20}},
        r"instruction of moving_grasp must fit policy.tokenizer_max_length=20 tokens, got",
    ),
    (
        ("learn=[moving_grasp,sorting]",),
        {"policy": {"max_action_dim": 16}},
        r"policy.max_action_dim must be at least 20",
    ),
    ((), {"policy": {"no_such_field": 1}}, r"policy.no_such_field must be a field of SmolVLAMemoryConfig, got 1"),
    ((), {"policy": {"num_mem_tokens": 1.5}}, r"policy.num_mem_tokens must be a whole number, got 1.5"),
    ((), {"policy": {"mem_at_end": 1}}, r"policy.mem_at_end must be true or false, got 1"),
    (
        (),
        {"policy": {"resize_imgs_with_padding": [32]}},
        r"policy.resize_imgs_with_padding must be a list of whole numbers, got \[32",
    ),
    (
        ("memory=frames",),
        {"policy": {"mem_backprop_depth": 0}},
        r"policy: mem_frames=8 needs mem_backprop_depth to be at least 1, got",
    ),
    (
        ("memory=frames",),
        {"policy": {"mem_frame_tokens": 2}},
        r"policy: mem_frame_tokens must be at least one for each of the 3 cam",
    ),
    (
        ("memory=both",),
        {"policy": {"mem_frame_sampling": "all"}},
        r"policy: mem_frame_sampling must be one of even, recent, got 'all'",
    ),
    ((), {"policy": {"mem_weight": "heavy"}}, r"policy.mem_weight must be a number, got 'heavy'"),
    ((), {"policy": {"type": "smolvlaa"}}, r"policy LeRobot knows, got 'smolvlaa' \(act, .*, smolvla_memory"),
    ((), {"policy": {"n_action_steps": 99}}, r"policy: .*99.*n_action_steps"),
    (
        (),
        {"policy": {"pretrained_path": "/nowhere/at/all"}},
        r"policy.pretrained_path must be an existing folder or a hub id",
    ),
    (
        (),
        {"policy": {"pretrained_path": "nobody/nothing"}},
        r"a folder, or a hub id that can be had, got nobody/nothing, looked for only in the local cache \(offline\).*"
        r"\n.*copy it here and give the folder: policy.pretrained_path=/path/to/nothing",
    ),
    (
        (),
        {"training": {"freeze_first_stage": ["expert", "eyes"]}},
        r"training.freeze_first_stage must name groups of .*, got 'eyes'",
    ),
    (  # of later stages alone
        (),
        {"training": {"freeze": ["eyes"]}},
        r"training.freeze must name groups of vision, .*, got 'eyes'",
    ),
    (
        (),
        {"training": {"freeze": ["vision", "connector", "vlm_text", "expert", "state_proj", "action_proj", "memory"]}},
        r"training.freeze must leave something to train",
    ),
    (
        (),
        {"training": {"lora": LoraConfig(), "freeze": ["expert"]}},
        r"an expert to adapt, got a frozen one \(training.freeze\)",
    ),
    (
        (),
        {"training": {"freeze_first_stage": ["vision"]}},
        r"a frozen VLM must have pretrained weights, got the random ones",
    ),
    (
        (),
        {"data": {"normalization": "pretrained"}},
        r"data.normalization=pretrained needs observation.state statistics",
    ),
]


@pytest.mark.parametrize(("words", "settings", "message"), BAD_STAGES, ids=[str(item[:2]) for item in BAD_STAGES])
def test_preflight_refuses_what_would_fail_silently(
    small_configs: Configs, words: tuple[str, ...], settings: dict[str, Any], message: str
) -> None:
    configs = small_configs(*words, **settings)
    with pytest.raises(ConfigError, match=message):
        run(configs, 0)
    assert not stage_folder(configs[0]).path.exists()


def to_record(configs: list[RunConfig], folder: Path) -> list[RunConfig]:
    """The same tasks, whose demonstrations are to be simulated into a folder."""
    simulation = SimulationConfig(episodes=3, image_size=32)
    return [changed(c, simulation=simulation, stage={"root": str(folder / c.stage.name)}) for c in configs]


def test_a_misspelt_field_of_the_policy_is_refused_before_anything_is_recorded(
    small_configs: Configs, tmp_path: Path
) -> None:
    configs = to_record(small_configs(policy={"chunk_sise": 3}), tmp_path / "data")
    message = r"policy.chunk_sise must be a field of SmolVLAMemoryConfig, got 3; did you mean policy.chunk_size"
    with pytest.raises(ConfigError, match=message):
        run(configs, 0)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        ("replay", r"strategy_settings.wieght of strategy=replay must not be there.*no settings, got 1"),
        ("nothing", r"strategy must be the name of a file"),
    ],
)
def test_a_mistake_in_the_strategy_is_refused_before_anything_is_recorded(
    small_configs: Configs, tmp_path: Path, strategy: str, message: str
) -> None:
    configs = to_record(small_configs(strategy=strategy, strategy_settings={"wieght": 1}), tmp_path / "data")
    with pytest.raises(ConfigError, match=message):
        run(configs, 0)
    assert not (tmp_path / "data").exists()


def test_a_dataset_of_the_users_own_is_not_taken_for_a_recording(small_configs: Configs, datasets: Path) -> None:
    configs = to_record(small_configs(), datasets)
    with pytest.raises(
        ConfigError,
        match=r"moving_grasp.*; to train on a dataset of your own there, set simulation=null rollout.episodes=0",
    ):
        run(configs, 0)


def test_missing_datasets_are_all_named_at_once(small_configs: Configs, tmp_path: Path) -> None:
    configs = [replace(config, simulation=None) for config in to_record(small_configs(), tmp_path / "none")]
    with pytest.raises(ConfigError) as refused:
        run(configs, 0)
    assert all(f"({config.stage.name}): dataset" in str(refused.value) for config in configs)
