"""The small base: what makes it, what is handed out, and what a run that starts from it checks."""

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies.factory import get_policy_class, make_pre_post_processors
from safetensors.torch import save_file

from kuavo_sim import CUE_SKILLS, SKILLS
from kuavo_sim.tasks import TASKS
from kuavo_train.base import FOLDER, SETTLED, folder_of, with_settled
from kuavo_train.compose import compose_run
from kuavo_train.config import CONFIG_FOLDER, MODELS_FOLDER
from kuavo_train.data.checkpoint_tasks import KnownTasks
from kuavo_train.data.feature_space import FeatureSpace
from kuavo_train.data.normalization import normalization_from_checkpoint
from kuavo_train.errors import ConfigError
from kuavo_train.runs.files import copy_folder
from kuavo_train.training.policy_factory import check_base, check_sizes

BASE = MODELS_FOLDER / FOLDER.name
STATE, ACTION = ("a", "b"), ("a", "b", "x")


def test_a_base_is_an_ordinary_run_of_the_skills_without_memory_and_with_words_of_no_task() -> None:
    assert with_settled([]) == ["profile=base", *SETTLED, "run=base"]
    configs = compose_run(with_settled(["profile=smoke", "seed=3"]))
    assert [config.run for config in configs] == ["base-smoke"] * len(configs)
    assert {config.strategy for config in configs} == {"joint"}
    assert not {config.stage.name for config in configs} & set(TASKS)
    first = configs[0]
    assert (first.seed, first.policy["num_mem_tokens"]) == (3, 0)
    assert first.tiny_vlm is not None
    assert first.tiny_vlm.corpus == "words"


def test_a_base_meets_a_memory_by_choosing_the_policy_and_learns_skills_with_cues_from_a_folder_beside() -> None:
    words = ["policy=smolvla_memory", f"config_dir={CONFIG_FOLDER / 'cue_skills'}"]
    configs = compose_run(with_settled(words))
    assert [config.stage.name for config in configs] == [*SKILLS, *CUE_SKILLS]
    later = compose_run([])[0].policy
    for key in ("num_mem_tokens", "mem_backprop_depth", "mem_at_end", "mem_update"):
        assert {config.policy[key] for config in configs} == {later[key]}  # as the runs that start from it
    assert {config.strategy for config in configs} == {"joint"}


def test_only_the_run_named_base_replaces_the_base_that_comes_along() -> None:
    assert folder_of(compose_run(with_settled([]))[0]) == FOLDER
    memory = ["policy=smolvla_memory"]
    for words, run in (
        (memory, "base-smolvla_memory"),
        (["profile=smoke", *memory], "base-smoke-smolvla_memory"),
        (["run=longer"], "longer"),
        (["profile=smoke", "run=base"], "base"),
    ):
        config = compose_run(with_settled(words))[0]
        assert config.run == run
        assert folder_of(config) == Path("outputs") / run / FOLDER.name


@pytest.mark.parametrize("profile", ["embedded", "study"])
def test_simulated_runs_start_from_the_base_and_hold_fixed_what_the_robots_profile_holds_fixed(profile: str) -> None:
    config = compose_run([f"profile={profile}"])[0]
    assert config.policy["pretrained_path"] == str(BASE)
    assert config.data.normalization == "pretrained"
    on_the_robot = compose_run(["profile=robot"])[0].training
    for key in ("freeze_first_stage", "freeze"):
        assert getattr(config.training, key) == getattr(on_the_robot, key) == ["vision", "connector", "vlm_text"]
    assert config.policy["num_mem_tokens"] > 0  # memory joins at the first stage, as on the robot


@pytest.mark.parametrize("words", [["base=none"], ["profile=smoke"], ["policy=act"], ["policy=diffusion"]])
def test_without_a_base_the_first_stage_trains_everything_from_nothing(words: list[str]) -> None:
    config = compose_run(words)[0]
    assert config.policy["pretrained_path"] is None
    assert config.base_sha256 is None
    assert config.data.normalization == "joint"
    assert config.training.freeze_first_stage == []


def test_a_run_from_nothing_has_the_bases_sizes_and_other_ones_are_refused() -> None:
    sizes = compose_run(["base=none"])[0].tiny_vlm
    assert sizes is not None
    check_sizes(sizes, BASE / "vlm")
    with pytest.raises(ConfigError, match=r"tiny_vlm.patch_size must be what .* have \(8\), got 16; .*base=none"):
        check_sizes(replace(sizes, patch_size=16), BASE / "vlm")


def test_a_base_stays_as_it_was_until_the_next_one_is_copied_whole(tmp_path: Path) -> None:
    source, into = tmp_path / "result", tmp_path / "base"
    for folder in (source, into):
        folder.mkdir()
        (folder / "made_by").write_text(folder.name)
    (source / "gone").symlink_to(tmp_path / "nowhere")
    with pytest.raises(shutil.Error):
        copy_folder(source, into)
    assert (into / "made_by").read_text() == "base"
    (source / "gone").unlink()
    copy_folder(source, into)
    assert (into / "made_by").read_text() == "result"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "result"]


def test_other_weights_than_those_named_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    check_base(None, tmp_path)
    with pytest.raises(ConfigError, match=r"base_sha256 must be that of .*, got 123, .*base_sha256=null"):
        check_base("123", tmp_path)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    values = {"mean": 1.0, "std": 2.0, "min": -1.0, "max": 3.0}
    sizes = {"observation.state": len(STATE), "action": len(ACTION)}
    tensors = {
        f"{key}.{kind}": torch.full((size,), value) + torch.arange(size)
        for key, size in sizes.items()
        for kind, value in values.items()
    }
    save_file(tensors, str(tmp_path / "policy_preprocessor_step_5_normalizer_processor.safetensors"))
    return tmp_path


def test_tasks_with_the_first_of_a_bases_dimensions_take_over_its_statistics_of_these(checkpoint: Path) -> None:
    found = normalization_from_checkpoint(checkpoint, FeatureSpace(STATE, ACTION[:2]), FeatureSpace(STATE, ACTION))
    assert found.space == FeatureSpace(STATE, ACTION[:2])
    assert found.array("action", "mean").tolist() == [1.0, 2.0]
    assert found.array("action", "std").tolist() == [2.0, 3.0]


def test_dimensions_at_other_places_than_a_bases_are_refused(checkpoint: Path) -> None:
    swapped = FeatureSpace(STATE, ("b", "a"))
    with pytest.raises(ConfigError, match=r"action must have the dimensions .* \(a, b, x\), got b, a; .*base=none"):
        normalization_from_checkpoint(checkpoint, swapped, FeatureSpace(STATE, ACTION))


def test_the_base_that_comes_along_is_small_whole_and_has_learnt_no_job() -> None:
    files = [path for path in BASE.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 8_000_000
    named = compose_run(["base=kuavo_sim_base"])[0].base_sha256
    assert named == hashlib.sha256((BASE / "model.safetensors").read_bytes()).hexdigest()
    known = KnownTasks.load(BASE)
    assert [task.name for task in known.tasks] == list(SKILLS)
    told = {text for task in known.tasks for text in task.instructions}
    assert not told & {job.instruction for job in TASKS.values()}
    card = (BASE / "README.md").read_text()
    assert [name for name in SKILLS if f"| {name} |" not in card] == []


def test_lerobot_opens_the_base_with_its_processors() -> None:
    config = PreTrainedConfig.from_pretrained(str(BASE))
    policy = get_policy_class(config.type).from_pretrained(str(BASE))
    before, after = make_pre_post_processors(config, pretrained_path=str(BASE))
    cameras = {key: torch.zeros(1, *feature.shape) for key, feature in config.image_features.items()}
    ready = before({**cameras, "observation.state": torch.zeros(1, 16), "task": ["Put the can on the red mark."]})
    actions = after(policy.select_action(ready))
    assert actions.shape == (1, 20)
    assert torch.isfinite(actions).all()
