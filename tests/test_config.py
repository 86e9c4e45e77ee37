"""The configuration composes, says the exact numbers of the four tasks, and refuses what cannot be meant."""

import shutil
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path

import hydra
import pytest
from omegaconf import DictConfig, OmegaConf
from stages import changed

from kuavo_train.compose import compose_run, compose_stage, overrides_for_all_tasks, resolve
from kuavo_train.config import CONFIG_FOLDER, AugmentationConfig, LoraConfig, RunConfig, StageConfig
from kuavo_train.config_folders import ConfigFolders
from kuavo_train.data.mixture import mixture_of
from kuavo_train.errors import ConfigError
from kuavo_train.keys import fits, parsed, words_for_hydra

RECIPES = {  # task → epochs, lr, warm-up, decay, replay
    "moving_grasp": (100, 5e-5, 1500, 25000, {"moving_grasp": 1.0}),
    "weighing": (25, 3.5e-5, 800, 20000, {"moving_grasp": 0.2, "weighing": 0.8}),
    "placement": (30, 2.5e-5, 800, 20000, {"moving_grasp": 0.1, "weighing": 0.2, "placement": 0.7}),
    "sorting": (35, 2e-5, 800, 20000, {"moving_grasp": 0.1, "weighing": 0.1, "placement": 0.2, "sorting": 0.6}),
}


def shares(config: RunConfig) -> dict[str, float]:
    """Of a stage that learns one task, however many frames it has."""
    return mixture_of(config).shares({config.stage.name: 1})


@cache
def all_tasks(*words: str) -> tuple[RunConfig, ...]:
    """Of the four tasks, composed once for the same words: to read."""
    return tuple(compose_run(words))


@cache
def composed_of(task: str, *words: str) -> DictConfig:
    """What Hydra makes of one task alone, as for `python -m kuavo_train`."""
    folders = ConfigFolders()
    folders.register_tasks()
    with hydra.initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        return hydra.compose("train", overrides=words_for_hydra([f"task=tasks/{task}", *words], folders))


@cache
def one_task(task: str, *words: str) -> RunConfig:
    return resolve(composed_of(task, *words))


def choices(group: str) -> list[str]:
    return [f"{group}={file.stem}" for file in sorted((CONFIG_FOLDER / group).glob("*.yaml"))]


@pytest.mark.parametrize("policy", choices("policy"))
@pytest.mark.parametrize("profile", choices("profile"))
def test_every_policy_comes_in_the_size_of_every_profile(profile: str, policy: str) -> None:
    config = one_task("task1_moving_grasp", profile, policy)
    assert f"profile={config.profile}" == profile
    name = policy.removeprefix("policy=")
    assert config.run == (config.profile if name == "smolvla_memory" else f"{config.profile}-{name}")
    assert config.policy["type"] == ("smolvla_memory" if name == "smolvla" else name)
    planned = config.policy.get("chunk_size") or config.policy["horizon"]
    assert (planned >= 50) == (config.profile == "robot")
    if config.profile != "robot":  # nothing is fetched
        assert not config.policy.get("load_vlm_weights")
        assert config.policy.get("pretrained_backbone_weights") is None


def test_what_a_profile_changes_of_a_policy_is_in_force() -> None:
    chosen = {
        profile: one_task("task2_weighing", f"profile={profile}").policy
        for profile in ("embedded", "smoke", "study", "robot")
    }
    changed = {name: (p["num_steps"], p["mem_backprop_depth"], p["sampling_temperature"]) for name, p in chosen.items()}
    assert changed == {"embedded": (10, 8, 0), "smoke": (2, 4, 1), "study": (10, 16, 0), "robot": (10, 4, 1)}


def test_no_key_of_a_policy_stands_where_a_profile_cannot_change_it() -> None:
    """A policy's own file comes after the profile, and would win."""
    folder = CONFIG_FOLDER / "policy"
    for file in folder.glob("*/*.yaml"):
        own, of_profile = (OmegaConf.load(path).get("policy", {}) for path in (folder / file.name, file))
        assert not set(own) & set(of_profile), file


OTHER_GROUPS = [choice for group in ("strategy", "memory", "finetune", "recipe") for choice in choices(group)]


@pytest.mark.parametrize("choice", OTHER_GROUPS)
def test_every_group_composes_with_the_robots_profile(choice: str) -> None:
    config = one_task("task2_weighing", "profile=robot", choice)
    if config.mixture != "all_tasks":
        assert sum(shares(config).values()) == pytest.approx(1)


def test_the_presets_say_what_they_are_named_for() -> None:
    presets = {
        choice: one_task("task2_weighing", "profile=robot", choice)
        for group in ("memory", "finetune", "recipe")
        for choice in choices(group)
    }
    tokens = {name.split("=")[1]: preset.policy["num_mem_tokens"] for name, preset in presets.items()}
    assert (tokens["light"], tokens["standard"], tokens["strong"], tokens["max"]) == (2, 4, 8, 16)
    frames = {name: presets[f"memory={name}"].policy["mem_frames"] for name in ("frames", "both", "standard")}
    assert frames == {"frames": 8, "both": 8, "standard": 0}
    assert (tokens["frames"], tokens["both"]) == (0, 4)
    assert presets["finetune=expert_only"].training.freeze == ["vision", "connector", "vlm_text"]
    assert presets["finetune=end_to_end"].training.freeze == []
    assert presets["finetune=lora"].training.lora == LoraConfig(rank=64, alpha=64)
    assert presets["finetune=lora"].training.lr == pytest.approx(7e-4)  # 1e-3, and the stage's decay
    recipes = [presets[f"recipe={size}_data"].training for size in ("small", "default", "large")]
    assert [recipe.epochs for recipe in recipes] == [85, 25, 10]
    assert {recipe.lr for recipe in recipes} == {7e-5}  # 1e-4, and the stage's decay


def test_the_task_files_carry_the_exact_recipes() -> None:
    configs = all_tasks("profile=robot")
    assert [config.stage.name for config in configs] == list(RECIPES)
    for config in configs:
        stage, training = config.stage, config.training
        epochs, lr, warmup, decay, replay = RECIPES[stage.name]
        assert (stage.epochs, stage.lr, stage.warmup_steps, stage.decay_steps) == (epochs, lr, warmup, decay)
        assert (training.epochs, training.lr) == (epochs, lr)
        assert stage.replay == replay
        assert (training.batch_size, training.betas, training.weight_decay) == (64, [0.9, 0.999], 5e-7)


def test_the_robot_profile_is_smolvla_as_it_is_fine_tuned() -> None:
    config = one_task("task2_weighing", "profile=robot", "data.root=/data/kuavo")
    policy, training = config.policy, config.training
    assert config.stage.root == "/data/kuavo/weighing"
    assert policy["pretrained_path"] == "lerobot/smolvla_base"
    assert policy["vlm_model_name"] == "HuggingFaceTB/SmolVLM2-500M-Video-Instruct"
    assert (policy["chunk_size"], policy["n_action_steps"]) == (50, 8)
    assert (policy["max_state_dim"], policy["max_action_dim"]) == (32, 32)
    assert (training.eps, training.grad_clip_norm, training.decay_lr) == (1e-8, 1.0, 1e-6)
    assert (training.device, training.mixed_precision) == ("cuda", "bf16")
    assert training.freeze_first_stage == training.freeze == ["vision", "connector", "vlm_text"]
    assert (config.validation.every_epochs, config.data.held_out_episodes) == (2, 20)
    assert (config.tiny_vlm, config.simulation, config.offline, config.hf_endpoint) == (None, None, False, None)


def test_the_embedded_profile_scales_the_recipe_and_keeps_its_decay() -> None:
    rates = [config.training.lr for config in all_tasks()]
    assert [rate / rates[0] for rate in rates] == pytest.approx([1.0, 0.7, 0.5, 0.4])


INSTRUCTIONS = [
    "Grasp the object from the conveyor belt using visual guidance. Place it precisely at the first marked target "
    "location on the table. Then grasp it again and place it precisely at the second marked target location on the "
    "table.",
    "Pick up the package from the conveyor belt, weigh it on the electronic scale, then pick it up again and place it "
    "in the designated storage container",
    "Pick up a bottle from the cluttered daily chemical bottles, transfer it to the other hand, and place it in the "
    "specified pose with the label facing up in the yellow area. Requirements: bottle mouth outside the yellow area, "
    "most of the bottle body inside the yellow area, label facing up",
    "Move from the starting point to the rack, pick up the workpiece, turn around, move to the placement rack, and "
    "place it in the designated position in the material container",
]


def test_instructions_are_the_exact_texts() -> None:
    assert [" ".join(config.stage.instruction.split()) for config in all_tasks()] == INSTRUCTIONS


def test_sequential_learns_without_replay() -> None:
    configs = [changed(config, strategy="sequential", mixture="own_task") for config in all_tasks()]
    assert [shares(config) for config in configs] == [{name: 1.0} for name in RECIPES]
    chosen = one_task("task2_weighing", "strategy=sequential")
    assert (chosen.strategy, chosen.mixture) == ("sequential", "own_task")


def test_a_fifth_task_is_one_more_file(tmp_path: Path) -> None:
    folder = tmp_path / "configs"
    shutil.copytree(CONFIG_FOLDER, folder)
    recipe = (folder / "tasks" / "task4_sorting.yaml").read_text().replace("index: 4", "index: 5")
    recipe = recipe.replace("name: sorting", "name: stacking").replace("Move from", "Stack from")
    recipe = recipe.replace("sorting: 0.6", "sorting: 0.3, stacking: 0.3")
    (folder / "tasks" / "task5_stacking.yaml").write_text(recipe)
    configs = compose_run(folder=folder)
    assert [config.stage.name for config in configs] == [*RECIPES, "stacking"]
    assert configs[-1].stage.folder_name == "stage5_stacking"
    assert shares(configs[-1])["stacking"] == 0.3


def test_learn_gives_the_order_and_the_places_of_the_stages() -> None:
    configs = compose_run(["learn=[weighing,moving_grasp]"])
    assert [config.stage.folder_name for config in configs] == ["stage1_weighing", "stage2_moving_grasp"]
    assert shares(configs[0]) == {"weighing": 1.0}
    assert mixture_of(configs[0]).dealt == {"moving_grasp": 0.2}


@pytest.mark.parametrize(
    ("learn", "replay"),
    [
        ("[placement]", {"placement": 1.0}),
        ("[moving_grasp,placement]", {"moving_grasp": 0.125, "placement": 0.875}),
        ("[moving_grasp,weighing,sorting]", {"moving_grasp": 0.125, "weighing": 0.125, "sorting": 0.75}),
    ],
)
def test_shares_of_tasks_that_are_not_learnt_go_to_the_others_in_proportion(learn: str, replay: dict) -> None:
    assert shares(compose_run([f"learn={learn}"])[-1]) == replay


def test_a_share_of_a_task_that_is_nowhere_is_refused_and_not_given_to_the_others(tmp_path: Path) -> None:
    folder = tmp_path / "configs"
    shutil.copytree(CONFIG_FOLDER, folder)
    file = folder / "tasks" / "task2_weighing.yaml"
    file.write_text(file.read_text().replace("moving_grasp: 0.2", "juggling: 0.2"))
    with pytest.raises(ConfigError, match=r"replay must name only tasks learnt by then .*got 'juggling'"):
        compose_run(["learn=[weighing]"], folder=folder)


def stage_of(*words: str) -> tuple[RunConfig, list[StageConfig]]:
    """The stage that a command line asks for, as `python -m kuavo_train` finds it, and its curriculum."""
    ConfigFolders().register_tasks()
    with hydra.initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        return compose_stage(hydra.compose("train", overrides=list(words)), words)


def test_a_stage_run_alone_has_its_place_in_the_order_given() -> None:
    config, curriculum = stage_of("task=tasks/task2_weighing", "learn=[weighing,moving_grasp]")
    assert config.stage.folder_name == "stage1_weighing"
    assert [stage.name for stage in curriculum] == ["weighing", "moving_grasp"]


def test_a_stage_run_alone_keeps_what_was_set_for_it_alone() -> None:
    config, curriculum = stage_of("task=tasks/task2_weighing", "stage.epochs=3", "learn=[moving_grasp,weighing]")
    assert config.stage.epochs == 3
    assert [stage.epochs for stage in curriculum] == [100, 3]


def test_a_stage_of_a_task_that_is_not_to_be_learnt_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"learn must include the task of this stage \(placement\), got \['wei"):
        stage_of("task=tasks/task3_placement", "learn=[weighing,moving_grasp]")


def test_a_joint_stage_learns_the_tasks_of_learn_without_a_task_being_chosen() -> None:
    config, curriculum = stage_of("strategy=joint", "learn=[placement,weighing]")
    assert (config.stage.name, mixture_of(config).learns) == ("joint", ("placement", "weighing"))
    assert [stage.name for stage in curriculum] == ["placement", "weighing"]


def test_a_stages_own_recipe_does_not_spill_over_to_other_tasks() -> None:
    given = ["task=tasks/task2_weighing", "stage.epochs=3", "+stage.x=1", "~stage.replay.weighing", "seed=5"]
    assert overrides_for_all_tasks(given) == ["seed=5"]


SETTABLE = [  # override, section, field, what it is then
    ("stage.environment=my_module:my/Env-v0", "stage", "environment", "my_module:my/Env-v0"),
    ("stage.environment_settings.renderer=egl", "stage", "environment_settings", {"renderer": "egl"}),
    ("stage.environment_settings.wind=inf", "stage", "environment_settings", {"wind": float("inf")}),
    ("stage.replay={weighing: 1.0}", "stage", "replay", {"weighing": 1.0}),
    ("stage.replay.moving_grasp=0.1 stage.replay.weighing=0.9", "stage", "replay",
     {"moving_grasp": 0.1, "weighing": 0.9}),
    ("stage.scale={action.left_claw: 0.01}", "stage", "scale", {"action.left_claw": 0.01}),
    ("stage.cameras={there.images.head: observation.images.head}", "stage", "cameras",
     {"there.images.head": "observation.images.head"}),
    ("stage.state_names=[a,b]", "stage", "state_names", ["a", "b"]),
    ("stage.repo_id=team/weighing", "stage", "repo_id", "team/weighing"),
    ("training.lora.rank=8", "training", "lora", LoraConfig(rank=8)),
    ("policy.num_images=3", "policy", "num_images", 3),
    ("data.augmentation.tfs={}", "data", "augmentation", AugmentationConfig(tfs={})),
]  # fmt: skip


@pytest.mark.parametrize(("given", "section", "field", "expected"), SETTABLE, ids=[item[0] for item in SETTABLE])
def test_every_key_is_set_from_the_command_line_without_a_plus_and_a_mapping_replaces_the_one_before(
    given: str, section: str, field: str, expected: object
) -> None:
    words = [given] if given.count("=") == 1 else given.split(" ")
    config = one_task("task2_weighing", *words)
    holder = getattr(config, section)
    assert (holder[field] if isinstance(holder, dict) else getattr(holder, field)) == expected


@pytest.mark.parametrize(
    ("value", "kind", "fitting"),
    [
        (1, float, True),
        (True, float, False),
        (float("nan"), float, False),
        (True, int, False),
        (1.5, int, False),
        (None, int, False),
        (None, int | None, True),
        ([1, 2], tuple[int, int], True),
        ([1, 2, 3], tuple[int, int], False),
        ([1, 2, 3], tuple[int, ...], True),
        (["a", 2], list[str], False),
        ("ab", list[str], False),
    ],
)
def test_a_value_fits_a_type_or_does_not(value: object, kind: object, *, fitting: bool) -> None:
    assert fits(value, kind) == fitting


BAD_VALUES = [  # settings of task 2's configuration, what the message must name
    ("training.lr=-1", r"training.lr must be positive, got -1"),
    ("training.lr=fast", r"training.lr must be a number, got 'fast'"),
    ("training.lr=inf", r"training.lr must be a finite number, got inf"),
    ("training.betas=[0.9,nan]", r"training.betas must be a finite number, got nan"),
    (
        "training.grad_clip_norm=inf training.weight_decay=nan",
        r"training.weight_decay must be a finite number, got nan",
    ),
    ("training.batch_size=0", r"training.batch_size must be at least 1, got 0"),
    ("training.batch_size=two", r"training.batch_size must be a whole number, got 'two'"),
    ("training.betas=[0.9]", r"training.betas must be two numbers in \[0, 1\)"),
    ("training.betas=[0.9,1.5]", r"training.betas must be two numbers in \[0, 1\), got \[0.9, 1.5\]"),
    ("training.decay_lr=1", r"training.decay_lr must not exceed training.lr"),
    ("training.mixed_precision=fp16", r"training.mixed_precision must be one of no, bf16, got 'fp16'"),
    ("training.device=tpu", r"training.device must be auto, cpu"),
    ("training.max_steps=0", r"training.max_steps must be at least 1, got 0"),
    ("training.gradient_accumulation_steps=0", r"gradient_accumulation_steps must be at least 1"),
    ("data.cameras=head", r"data.cameras must be a list, got 'head'"),
    ("data.held_out_episodes=0", r"data.held_out_episodes must be at least 1, got 0"),
    ("data.cameras=[]", r"data.cameras must name at least one camera"),
    ("data.cameras=[a,a]", r"data.cameras must not repeat a camera"),
    ("data.normalization=task", r"data.normalization must be one of joint, first_stage, pretrained, got 'task'"),
    ("data.video_backend=ffmpeg", r"data.video_backend must be one of"),
    ("data.image_size=[8,8]", r"data.image_size must be \[height, width\]"),
    ("data.num_workers=-1", r"data.num_workers must not be negative"),
    ("simulation.episodes=1", r"simulation.episodes must be at least 2"),
    ("simulation.renderer=vulkan", r"simulation.renderer must be one of rays, egl, got 'vulkan'"),
    ("simulation.image_size=4", r"simulation.image_size must be at least 16"),
    ("validation.share=0", r"validation.share must be above 0, or null, got 0"),
    ("replay.share=1.0", r"replay.share must be a share in \(0, 1\), or null, got 1.0"),
    ("validation.result=worst", r"validation.result must be one of best, last, got 'worst'"),
    ("validation.draws=0", r"validation.draws must be at least 1"),
    ("forgetting.well_retained_change=0.5", r"forgetting.well_retained_change must be in \[0, "),
    ("forgetting.budget=-0.1", r"forgetting.budget must not be negative, got -0.1"),
    ("forgetting.on_exceed=cry", r"forgetting.on_exceed must be one of warn, stop, raise_replay, got 'cry'"),
    ("forgetting.raise_factor=1", r"forgetting.raise_factor must be more than 1, got 1"),
    ("forgetting.raise_limit=1", r"forgetting.raise_limit must be in \(0, 1\), got 1"),
    ("forgetting.new_task_floor=0", r"forgetting.new_task_floor must be in \(0, 1\), got 0"),
    (
        "forgetting.budget=0.1 data.held_out_episodes=1",
        r"data.held_out_episodes must be at least 2 with a forgetting.budget, got 1",
    ),
    ("seed=-1", r"seed must not be negative, got -1"),
    ("run=a/b", r"run must be a folder name"),
    ("tracking=tensorboard", r"tracking must be one of off, offline, online"),
    ("hf_endpoint=mirror", r"hf_endpoint must be an address like https://.*, or null, got 'mirror'"),
    ("data.claw_limits=[1,0]", r"data.claw_limits must be \[open, closed\] in ascending order, or null, got \[1"),
    ("resume=perhaps", r"resume must be true or false, got 'perhaps'"),
]


@pytest.mark.parametrize(("settings", "message"), BAD_VALUES, ids=[item[0] for item in BAD_VALUES])
def test_a_bad_value_is_refused_by_key_rule_and_value(settings: str, message: str) -> None:
    composed = deepcopy(composed_of("task2_weighing"))
    for override in map(parsed, settings.split(" ")):
        OmegaConf.update(composed, override.key_or_group, override.value())
    with pytest.raises(ConfigError, match=message):
        resolve(composed)


BAD_OVERRIDES = [  # of a command line, what the message must name: keys, choices, mappings, what one forbids another
    ("strategy=ewc ewc.strength=inf", r"ewc.strength must be a finite number, got inf"),
    ("training.learning_rate=1", r"training.learning_rate must be a key .* did you mean .*training.lr"),
    ("+training.learning_rate=1", r"training.learning_rate must be a key .* did you mean .*training.lr"),
    ("enviroment=a:b", r"enviroment must be a key of the configuration, .*stage.environment"),
    ("zebra=1", r"zebra must be a key of the configuration, got one that is not; --cfg job shows all keys"),
    ("training=5", r"training must be a mapping of settings, such as training.epochs=…, got 5"),
    ("~training.lora", r"training.lora must be set to a value \(training.lora=…\), not deleted"),
    ("training.epochs=${nothing.there}", r"training.epochs: .*nothing"),
    ("training.lr", r"arguments must be key=value, got 'training.lr'"),
    ("training.lr=[1", r"arguments must be key=value, got 'training.lr=\[1'"),
    (
        "strategy=sequential forgetting.budget=0.1 forgetting.on_exceed=raise_replay",
        r"forgetting.on_exceed must be warn or stop where nothing is replayed \(strategy=sequential\), got 'raise_r",
    ),
    ("strategy=ewc ewc.strength=-1", r"ewc.strength must not be negative, got -1"),
    ("strategy=ewc ewc.batches=0", r"ewc.batches must be at least 1, got 0"),
    ("strategy=ewc ewc=null", r"ewc must have settings with strategy=ewc, got None"),
    ("strategy=merge merge.alphas=[0.5,1.5]", r"merge.alphas must be one or more numbers in \[0, 1\], got \[0.5, 1.5"),
    ("strategy=merge merge.episodes=0", r"merge.episodes must be at least 1, or null, got 0"),
    ("strategy=joint merge.alphas=[0.5]", r"merge must be null with strategy=joint, which has nothing to keep, got "),
    ("strategy=merge merge.alphas=[]", r"merge.alphas must be one or more numbers in \[0, 1\], got \[\]"),
    ("strategy=joint mixture=replay", r"mixture must be all_tasks with strategy=joint, got 'replay'"),
    ("mixture=own_task", r"mixture must be replay with strategy=replay, got 'own_task'"),
    ("strategy=sequential mixture=replay", r"mixture must be own_task with strategy=sequential, got 'replay'"),
    ("strategy=ewc mixture=all_tasks", r"mixture must be replay or own_task with strategy=ewc, got 'all_tasks'"),
    ("strategy=sequential replay.share=0.4", r"replay.share must be null where nothing is replayed .*, got 0.4"),
    ("strategy=adapters mixture=replay", r"mixture must be own_task with strategy=adapters, got 'replay'"),
    ("strategy=adapters ewc.strength=1 ewc.batches=1", r"ewc must be null with adapters, which change no weight"),
    ("strategy=adapters training.lora.rank=2", r"training.lora must be null with adapters"),
    ("strategy=adapters policy=act", r"policy.type must be smolvla_memory with adapters, got 'act'"),
    ("strategy=adapters policy.compile_model=true", r"policy.compile_model must be false with adapters.*, got True"),
    ("mixture=all_tasks", r"mixture must be replay with strategy=replay, got 'all_tasks'"),
    ("mixture=soup", r"mixture must be one of replay, own_task, all_tasks, got 'soup'"),
    ("strategy=dreaming", r"strategy must be one of adapters, distill, ewc, .*, got 'dreaming'"),
    ("learn=[weighing,weighing]", r"learn must name a task once, got 'weighing'"),
    ("learn=[]", r"learn must name at least one task, or be null for all, got \[\]"),
    ("learn=[juggling]", r"learn must name tasks of configs/tasks .*, got 'juggling'"),
    ("profile=huge", r"profile must be one of base, embedded, robot, smoke, study, got 'huge'"),
    ("task=tasks/task9_nothing", r"task must be one of tasks/task1_moving_grasp, .*, got 'tasks/task9_nothing'"),
    ("stage.replay={}", r"replay must give the task itself a share, got {}"),
    ("ewc.strength=3", r"ewc must have batches, got nothing"),
    ("adapters.rank=0", r"adapters.rank must be at least 1, got 0"),
    ("adapters.start=far", r"adapters.start must be one of nearest, zero, got 'far'"),
    ("training.lora.rank=half", r"training.lora.rank must be a whole number, got 'half'"),
    ("stage.scale={left_claw:0.1}", r"scale must give state.NAME or action.NAME a factor that is not 0"),
]


@pytest.mark.parametrize(("override", "message"), BAD_OVERRIDES, ids=[item[0] for item in BAD_OVERRIDES])
def test_a_bad_override_is_refused_by_key_rule_and_value(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose_run(override.split(" "))


BAD_TASK_FILES: list[tuple[str, str, str]] = [  # text in task 2's file, its replacement, the message
    (
        "weighing: 0.8",
        "weighing: 0.7",
        r"stage 2 .* replay share of tasks moving_grasp, weighing: their sum must be 1, got 0.9",
    ),
    ("weighing: 0.8", "weighing: 1.8", r"replay share of task weighing must be in \[0, 1\], got 1.8"),
    ("moving_grasp: 0.2, weighing", "placement: 0.2, weighing", r"must name only tasks learnt by then .*'placement'"),
    ("moving_grasp: 0.2, weighing: 0.8", "moving_grasp: 1.0", r"replay must give the task itself a share"),
    ("index: 2", "index: 1", r"stage.index must be unique, got 1"),
    ("name: weighing", "name: moving_grasp", r"stage.name must be unique|replay"),
    ("name: weighing", "name: Weighing!", r"stage.name must consist of lower-case letters"),
    ("epochs: 25", "epochs: 0", r"stage 2 \(weighing\): epochs must be at least 1, got 0"),
    ("lr: 3.5e-5", "lr: 0", r"stage 2 \(weighing\): lr must be positive"),
    ("episodes: null", "episodes: [9, 3]", r"episodes must be \[first, last\] with 0 <= first <= last, got \[9, 3\]"),
    ("warmup_steps: 800", "warm_up: 800", r"stage.warm_up must be a key .* did you mean .*stage.warmup_steps"),
]


@pytest.mark.parametrize(("text", "replacement", "message"), BAD_TASK_FILES)
def test_a_bad_task_file_is_refused(tmp_path: Path, text: str, replacement: str, message: str) -> None:
    folder = tmp_path / "configs"
    shutil.copytree(CONFIG_FOLDER, folder)
    file = folder / "tasks" / "task2_weighing.yaml"
    assert text in file.read_text()
    file.write_text(file.read_text().replace(text, replacement))
    with pytest.raises(ConfigError, match=message):
        compose_run(folder=folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stage: [unclosed", r"task9_own.yaml must be YAML with the stage of a task, got while parsing"),
        ("- a list", r"task9_own.yaml must be YAML with the stage of a task"),
        ("", r"task9_own.yaml: stage.index must be a whole number, the place in the order, got None"),
        (
            "stage: {index: two}",
            r"task9_own.yaml: stage.index must be a whole number, the place in the order, got 'two'",
        ),
    ],
)
def test_a_file_that_is_no_tasks_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    folder = tmp_path / "configs"
    shutil.copytree(CONFIG_FOLDER, folder)
    (folder / "tasks" / "task9_own.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        compose_run(folder=folder)


def test_overrides_reach_every_task(small_configs: Callable[..., list[RunConfig]]) -> None:
    assert {config.training.batch_size for config in small_configs("training.batch_size=3")} == {3}
