"""Whole stages on small real datasets: order, replay, freezing, validation, interruption, resumption."""

import json
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
import yaml
from accelerate import Accelerator
from forked import interrupted_in_step
from safetensors.torch import load_file

from kuavo_train.compose import compose_run
from kuavo_train.config import RunConfig
from kuavo_train.curriculum import train_all_stages
from kuavo_train.errors import ConfigError, RunError
from kuavo_train.runs.files import write_json
from kuavo_train.runs.run_folder import StageFolder, stage_folder
from kuavo_train.stage import setup
from kuavo_train.stage.findings import Findings
from kuavo_train.stage.lineage import Start
from kuavo_train.stage.setup import open_stage
from kuavo_train.stage.stage import run_stage
from kuavo_train.training import step_metrics
from kuavo_train.training.learner import Learner, TrainingDiverged
from kuavo_train.training.step_metrics import STEP_PARTS

Overrides = Callable[..., list[str]]


def run(configs: list[RunConfig], place: int, **changes: Any) -> int:
    return run_stage(replace(configs[place], **changes), [config.stage for config in configs])


def weights(folder: StageFolder, link: str = "last") -> dict[str, torch.Tensor]:
    return load_file(folder.path / "checkpoints" / link / "pretrained_model" / "model.safetensors")


def assert_equal_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def records(folder: StageFolder, kind: str | None = None) -> list[dict[str, Any]]:
    return [record for record in folder.validations.read() if kind in (None, record["kind"])]


@pytest.fixture(scope="module")
def four_stages(datasets: Path, tmp_path_factory: pytest.TempPathFactory) -> list[RunConfig]:
    """A run in which all four stages are finished."""
    outputs = tmp_path_factory.mktemp("four") / "outputs"
    configs = compose_run(
        [
            "profile=smoke",
            "simulation=null",
            "rollout.episodes=0",
            f"outputs={outputs}",
            f"data.root={datasets}",
            "tiny_vlm.image_size=32",
            "policy.resize_imgs_with_padding=[32,32]",
            "policy.chunk_size=6",
            "policy.n_action_steps=4",
            "training.max_steps=5",
            "training.batch_size=4",
            "training.log_every=2",
            "training.save_every=2",
            "training.freeze=[vision,connector,vlm_text,action_proj]",
            "policy.mem_backprop_depth=2",
        ]
    )
    for place in range(4):
        assert run(configs, place) == 0
    return configs


def test_each_stage_replays_what_its_shares_say(four_stages: list[RunConfig]) -> None:
    for config in four_stages:
        audit = json.loads((stage_folder(config).path / "replay_audit.json").read_text())
        assert audit["declared"] == config.stage.replay
        assert audit["total_frames"] == 20
        assert audit["held_out_frames_drawn"] == 0
        for name, share in config.stage.replay.items():
            assert abs(audit["drawn"][name]["frames"] - share * 20) < 2  # a clip of two queries


def test_each_stage_starts_from_the_one_before(four_stages: list[RunConfig]) -> None:
    for config in four_stages[1:]:
        stage = open_stage(
            config,
            [each.stage for each in four_stages],
            Start(before=stage_folder(four_stages[config.stage.index - 2]).checkpoints.at("best")),
            Accelerator(cpu=True),
            Findings(),
        )
        began = {name: value for name, value in stage.built.policy.state_dict().items() if "memory" in name}
        before = weights(stage_folder(four_stages[config.stage.index - 2]), "best")
        assert began
        for name, value in began.items():
            assert torch.equal(value, before[name])


def test_frozen_groups_are_unchanged_and_trained_ones_are_not(four_stages: list[RunConfig]) -> None:
    first, later = (weights(stage_folder(config), "best") for config in four_stages[:2])
    groups = json.loads((stage_folder(four_stages[1]).path / "parameters.json").read_text())["groups"]
    by_name = {row["group"]: row for row in groups}
    for group in ("vision", "connector", "vlm_text", "action_proj"):  # the last is none of SmolVLA's own switches
        assert by_name[group]["trainable"] is False
        assert by_name[group]["fingerprint_before"] == by_name[group]["fingerprint_after"]
    for group in ("expert", "state_proj", "memory"):
        assert by_name[group]["changed"] is True
    vision = [name for name in first if "vision_model" in name]
    assert vision
    assert all(torch.equal(first[name], later[name]) for name in vision)
    assert any(not torch.equal(first[name], later[name]) for name in first)


def test_every_task_is_validated_on_the_same_questions_at_every_stage(four_stages: list[RunConfig]) -> None:
    start = records(stage_folder(four_stages[0]), "start")
    assert [record["task"] for record in start] == [config.stage.name for config in four_stages]
    episodes = {r["task"]: [(e["episode"], e["frames"]) for e in r["episodes"]] for r in start}
    for place, config in enumerate(four_stages):
        folder = stage_folder(config)
        end = records(folder, "end")
        assert len(end) == 4
        assert [record["seen"] for record in end] == [number <= place for number in range(4)]
        for record in end:
            assert [(e["episode"], e["frames"]) for e in record["episodes"]] == episodes[record["task"]]
        assert {record["task"] for record in records(folder, "epoch")} == {
            each.stage.name for each in four_stages[: place + 1]
        }
    for group in ("base_position", "base_yaw", "base_mode"):
        assert end[0]["action_error_by_group"][group] is None
        assert end[3]["action_error_by_group"][group] > 0


def test_all_stages_share_one_normalization(four_stages: list[RunConfig]) -> None:
    hashes = {stage_folder(config).checkpoints.at("best").manifest["normalization"] for config in four_stages}
    run_file = json.loads((four_stages[0].run_folder / "run.json").read_text())
    assert hashes == {run_file["normalization"]["hash"]}
    stored = [
        load_file(
            next((stage_folder(config).path / "checkpoints/best/pretrained_model").glob("*unnormalizer*.safetensors"))
        )
        for config in four_stages
    ]
    for other in stored[1:]:
        assert all(torch.equal(stored[0][name], other[name]) for name in stored[0])


def test_a_checkpoint_with_another_normalization_is_refused(four_stages: list[RunConfig], tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    shutil.copytree(
        Path(four_stages[0].outputs) / "smoke" / "stage1_moving_grasp", outputs / "smoke/stage1_moving_grasp"
    )
    normalization = json.loads((four_stages[0].run_folder / "normalization.json").read_text())
    moved = [replace(config, outputs=str(outputs)) for config in four_stages]
    with pytest.raises(ConfigError, match="must have the run's normalization none"):
        run(moved, 1)
    from kuavo_train.data.normalization import Normalization

    normalization["statistics"]["action"]["mean"][0] += 0.5
    other = Normalization("joint", normalization["statistics"])
    write_json(outputs / "smoke" / "normalization.json", other.to_json())
    with pytest.raises(ConfigError, match=r"must have the run's normalization .* it belongs to another run"):
        run(moved, 1)


def test_the_best_checkpoint_has_the_least_mean_loss_over_all_tasks_seen(four_stages: list[RunConfig]) -> None:
    folder = stage_folder(four_stages[2])
    means: dict[int, list[float]] = {}
    for record in records(folder, "epoch"):
        means.setdefault(record["step"], []).append(record["loss"])
    best = min(means, key=lambda step: sum(means[step]) / len(means[step]))
    assert folder.about["best"]["step"] == best == folder.checkpoints.at("best").step
    end = {record["task"]: record["loss"] for record in records(folder, "end")}
    during = {record["task"]: record["loss"] for record in records(folder, "epoch") if record["step"] == best}
    assert {task: end[task] for task in during} == pytest.approx(during)


def test_the_result_of_every_stage_has_a_model_card(four_stages: list[RunConfig]) -> None:
    for place, config in enumerate(four_stages):
        folder = stage_folder(config)
        result = folder.checkpoints.at("best")
        result.verify()
        _, header, text = (result.pretrained_model / "README.md").read_text().split("---\n", 2)
        header = yaml.safe_load(header)
        assert (header["license"], header["library_name"]) == ("apache-2.0", "lerobot")
        assert "smolvla_memory" in header["tags"]
        assert f"The last stage: {folder.about['steps']} steps" in text
        losses = {record["task"]: record["loss"] for record in records(folder, "end")}
        for number, other in enumerate(four_stages):
            name, learnt = other.stage.name, number <= place
            assert (f"| {name} | {losses[name]:.4f} |" in text) == learnt
            assert (f"- **{name}**: {' '.join(other.stage.instruction.split())}" in text) == learnt


def test_a_run_with_and_without_validation_ends_in_the_same_weights(small_run: Overrides, tmp_path: Path) -> None:
    often = compose_run(small_run("training.max_steps=6", "validation.every_epochs=1", "training.batch_size=16"))
    rarely = [replace(config, outputs=str(tmp_path / "rarely")) for config in often]
    rarely = [replace(c, validation=replace(c.validation, every_epochs=99, draws=3)) for c in rarely]
    assert run(often, 0) == run(rarely, 0) == 0
    assert len(records(stage_folder(often[0]), "epoch")) > len(records(stage_folder(rarely[0]), "epoch"))
    assert_equal_weights(weights(stage_folder(often[0])), weights(stage_folder(rarely[0])))


def test_accumulated_batches_are_one_step_of_the_schedule(small_run: Overrides, tmp_path: Path) -> None:
    recipe = [
        "training.log_every=1",
        "training.warmup_steps=2",
        "training.decay_steps=4",
        "policy.mem_backprop_depth=0",
    ]
    at_once = compose_run(small_run(*recipe))
    in_parts = compose_run(
        small_run(
            *recipe,
            f"outputs={tmp_path / 'parts'}",
            "training.batch_size=2",
            "training.gradient_accumulation_steps=2",
        )
    )
    assert run(at_once, 0) == run(in_parts, 0) == 0
    metrics = [stage_folder(configs[0]).metrics.read() for configs in (at_once, in_parts)]
    for key in ("step", "lr", "task_frames"):
        one, other = ([record[key] for record in records] for records in metrics)
        assert one == other
    assert len({record["lr"] for record in metrics[1]}) == 4


def test_every_part_of_a_steps_time_is_told(small_run: Overrides, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that goes on by a second whenever it is looked at, which is once at the end of each part."""
    monkeypatch.setattr(step_metrics, "clock", partial(next, count()))
    configs = compose_run(small_run("training.log_every=1", "training.gradient_accumulation_steps=2"))
    assert run(configs, 0) == 0
    for record in stage_folder(configs[0]).metrics.read():
        parts = {part: record[f"{part}_ms"] / 1000 for part in STEP_PARTS}
        assert parts == {"wait": 1, "data": 2, "forward": 2, "backward": 2, "optimizer": 1}
        whole = sum(parts.values()) + 1  # with the look at the step's end
        assert record["samples_per_s"] == round(2 * 4 / whole, 2)


def test_the_memorys_own_loss_is_reported_apart_from_that_on_the_actions(small_run: Overrides) -> None:
    lines = []
    for weight in (0, 5):
        configs = compose_run(
            small_run("training.max_steps=1", f"policy.mem_action_loss={weight}", f"run=weight{weight}")
        )
        assert run(configs, 0) == 0
        lines += stage_folder(configs[0]).metrics.read()
    without, heavy = lines
    assert "memory_loss" not in without
    assert heavy["memory_loss"] > 0
    assert heavy["loss"] < without["loss"] + heavy["memory_loss"]  # not five times that on top


@pytest.mark.parametrize(
    ("stop_after", "depth", "words"),
    [(1, 0, ()), (3, 2, ()), (3, 2, ("memory=frames",)), (3, 1, ("memory=both", "policy.mem_frames=2"))],
    ids=["alone", "through time", "frames", "both"],
)
def test_an_interrupted_stage_resumes_to_bit_identical_weights(
    small_run: Overrides,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stop_after: int,
    depth: int,
    words: tuple[str, ...],
) -> None:
    whole = compose_run(small_run("training.max_steps=6", f"policy.mem_backprop_depth={depth}", *words))
    assert run(whole, 0) == 0
    cut = [replace(config, outputs=str(tmp_path / "cut")) for config in whole]
    with interrupted_in_step(stop_after):
        assert run(cut, 0) == 128 + signal.SIGTERM
    folder = stage_folder(cut[0])
    assert folder.status == "interrupted"
    assert folder.checkpoints.at("last").step == stop_after
    other = replace(cut[0].training, lr=5e-4, freeze_first_stage=["expert"], log_every=1)
    message = r"other settings: training.lr \(was 0.001, is 0.0005\), training.freeze_first_stage .*; put them back"
    with pytest.raises(ConfigError, match=message):
        run(cut, 0, resume=True, training=other)
    assert run(cut, 0, resume=True) == 0
    assert_equal_weights(weights(stage_folder(whole[0])), weights(folder))
    states = [each.checkpoints.at("last").training_state() for each in (stage_folder(whole[0]), folder)]
    for state in states:
        state["progress"].pop("seconds")
    assert states[0]["scheduler"] == states[1]["scheduler"]
    one, other = states
    assert one["progress"] == other["progress"]
    assert bool(one["memory"]) == (depth > 0)
    assert_equal_weights(one["memory"], other["memory"])
    moments = [state["optimizer"]["state"] for state in states]
    for number in moments[0]:
        assert torch.equal(moments[0][number]["exp_avg_sq"], moments[1][number]["exp_avg_sq"])
    for name, keys in {"metrics": ("step", "loss", "lr"), "validations": ("step", "task", "kind", "loss")}.items():
        one, other = (
            [[line[key] for key in keys] for line in getattr(each, name).read()]
            for each in (stage_folder(whole[0]), folder)
        )
        assert len(one) > 2
        assert one == other


def test_a_stage_killed_before_its_first_checkpoint_starts_again(
    small_run: Overrides, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = compose_run(small_run())

    def die(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Learner, "learn", die)
        with pytest.raises(KeyboardInterrupt):
            run(configs, 0)
    assert run(configs, 0, resume=True) == 0
    assert len(records(stage_folder(configs[0]), "start")) == len(configs)


def test_a_started_folder_is_refused_without_resume_and_a_finished_one_always(
    four_stages: list[RunConfig], small_run: Overrides
) -> None:
    with pytest.raises(ConfigError, match=r"stage 1 .* is finished in .*; delete the folder to run it again"):
        run(four_stages, 0)
    configs = compose_run(small_run())
    stage_folder(configs[0]).path.mkdir(parents=True)
    (stage_folder(configs[0]).path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="must be empty to start into; continue with resume=true, or delete it"):
        run(configs, 0)


def test_a_stage_without_the_one_before_names_the_command_to_run(small_run: Overrides) -> None:
    configs = compose_run(small_run())
    message = r"must follow a finished stage 1 \(moving_grasp\), got absent .*task=tasks/task1_moving_grasp run=smoke"
    with pytest.raises(ConfigError, match=message):
        run(configs, 1)


def test_a_damaged_checkpoint_is_refused(four_stages: list[RunConfig], tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    shutil.copytree(four_stages[0].run_folder, outputs / "smoke", symlinks=True)
    shutil.rmtree(outputs / "smoke" / "stage2_weighing")
    weights_file = outputs / "smoke/stage1_moving_grasp/checkpoints/best/pretrained_model/model.safetensors"
    content = bytearray(weights_file.read_bytes())
    content[-1] ^= 1
    weights_file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"model.safetensors must have sha256 .*delete the checkpoint folder"):
        run([replace(config, outputs=str(outputs)) for config in four_stages], 1)


def test_a_loss_that_is_not_finite_stops_at_the_last_good_checkpoint_and_names_its_samples(
    small_run: Overrides, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = compose_run(small_run("training.save_every=1", "training.max_steps=5"))
    build = setup.build_policy

    def with_poison(*arguments: Any, **named: Any) -> Any:
        built = build(*arguments, **named)
        forward, calls = built.policy.forward, []

        def poisoned(*batch: Any, **keys: Any) -> Any:
            loss, values = forward(*batch, **keys)
            calls.append(built.policy.training)
            return (loss * float("nan") if sum(calls) == 3 else loss), values

        built.policy.forward = poisoned
        return built

    monkeypatch.setattr(setup, "build_policy", with_poison)
    message = r"loss nan .* step 3 .*\(moving_grasp, \d, \d+\).*last good checkpoint is .*000002"
    with pytest.raises(TrainingDiverged, match=message):
        run(configs, 0)
    folder = stage_folder(configs[0])
    assert folder.status == "failed"
    assert folder.checkpoints.at("last").step == 2
    assert all(torch.isfinite(value).all() for value in weights(folder).values())


def test_a_run_keeps_its_seed_data_and_policy(four_stages: list[RunConfig], tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    shutil.copytree(four_stages[0].run_folder, outputs / "smoke", symlinks=True)
    shutil.rmtree(outputs / "smoke" / "stage2_weighing")
    moved = [replace(config, outputs=str(outputs), seed=7) for config in four_stages]
    message = r"run smoke must keep the settings it began with .*: seed \(was 0, is 7\); .* choose another run=NAME"
    with pytest.raises(ConfigError, match=message):
        run(moved, 1)


def test_a_run_keeps_its_held_out_episodes(four_stages: list[RunConfig], tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    shutil.copytree(four_stages[0].run_folder, outputs / "smoke", symlinks=True)
    shutil.rmtree(outputs / "smoke" / "stage2_weighing")
    moved = [replace(c, outputs=str(outputs), data=replace(c.data, split_seed=5)) for c in four_stages]
    message = r"the held-out episodes of \w+ must stay those run smoke began with .* put data.held_out_episodes"
    with pytest.raises(ConfigError, match=message):
        run(moved, 1)


def test_a_finished_run_answers_for_its_own_settings_alone(
    four_stages: list[RunConfig], capsys: pytest.CaptureFixture
) -> None:
    def called_again(training: dict[str, Any], policy: dict[str, Any], **changes: Any) -> int:
        configs = [replace(c, training=replace(c.training, **training), **changes) for c in four_stages]
        return train_all_stages([replace(config, policy=config.policy | policy) for config in configs])

    data = replace(four_stages[0].data, num_workers=3)
    assert called_again({"log_every": 1}, {}, data=data, resume=True) == 0
    assert capsys.readouterr().out.count("is finished in") == 4
    with pytest.raises(ConfigError) as refused:
        called_again({"lr": 0.002}, {"num_mem_tokens": 8})
    for words in ("training.lr (was 0.001, is 0.002)", "policy.num_mem_tokens (was 4, is 8)", "another run=NAME"):
        assert words in str(refused.value)
    with pytest.raises(ConfigError, match=r"policy.num_mem_token must be a field of .*mean policy.num_mem_tokens"):
        called_again({}, {"num_mem_token": 8})


BAD_STAGES: list[tuple[str, str]] = [  # override, what preflight or the factory must say
    (
        "policy.tokenizer_max_length=20",
        r"instruction of moving_grasp must fit policy.tokenizer_max_length=20 tokens, got",
    ),
    ("policy.max_action_dim=16 learn=[moving_grasp,sorting]", r"policy.max_action_dim must be at least 20"),
    ("+policy.no_such_field=1", r"policy.no_such_field must be a field of SmolVLAMemoryConfig, got 1"),
    ("policy.num_mem_tokens=1.5", r"policy.num_mem_tokens must be a whole number, got 1.5"),
    ("policy.mem_at_end=1", r"policy.mem_at_end must be true or false, got 1"),
    (
        "policy.resize_imgs_with_padding=[32]",
        r"policy.resize_imgs_with_padding must be a list of whole numbers, got \[32",
    ),
    (
        "memory=frames policy.mem_backprop_depth=0",
        r"policy: mem_frames=8 needs mem_backprop_depth to be at least 1, got",
    ),
    ("memory=frames policy.mem_frame_tokens=2", r"policy: mem_frame_tokens must be at least one for each of the 3 cam"),
    ("memory=both policy.mem_frame_sampling=all", r"policy: mem_frame_sampling must be one of even, recent, got 'all'"),
    ("policy.mem_weight=heavy", r"policy.mem_weight must be a number, got 'heavy'"),
    ("policy.type=smolvlaa", r"policy LeRobot knows, got 'smolvlaa' \(act, .*, smolvla_memory"),
    ("policy.n_action_steps=99", r"policy: .*99.*n_action_steps"),
    ("policy.pretrained_path=/nowhere/at/all", r"policy.pretrained_path must be an existing folder or a hub id"),
    (
        "policy.pretrained_path=nobody/nothing",
        r"a folder, or a hub id that can be had, got nobody/nothing, looked for only in the local cache \(offline\).*"
        r"\n.*copy it here and give the folder: policy.pretrained_path=/path/to/nothing",
    ),
    ("training.freeze_first_stage=[expert,eyes]", r"training.freeze_first_stage must name groups of .*, got 'eyes'"),
    ("training.freeze=[eyes]", r"training.freeze must name groups of vision, .*, got 'eyes'"),  # of later stages alone
    (
        "training.freeze=[vision,connector,vlm_text,expert,state_proj,action_proj,memory]",
        r"training.freeze must leave something to train",
    ),
    ("training.lora={} training.freeze=[expert]", r"an expert to adapt, got a frozen one \(training.freeze\)"),
    ("training.freeze_first_stage=[vision]", r"a frozen VLM must have pretrained weights, got the random ones"),
    ("data.normalization=pretrained", r"data.normalization=pretrained needs observation.state statistics"),
]


@pytest.mark.parametrize(("override", "message"), BAD_STAGES, ids=[item[0] for item in BAD_STAGES])
def test_preflight_refuses_what_would_fail_silently(small_run: Overrides, override: str, message: str) -> None:
    configs = compose_run(small_run(*override.split(" ")))
    with pytest.raises(ConfigError, match=message):
        run(configs, 0)
    assert not stage_folder(configs[0]).path.exists()


def test_a_misspelt_field_of_the_policy_is_refused_before_anything_is_recorded(
    small_run: Overrides, tmp_path: Path
) -> None:
    words = [item for item in small_run() if item != "simulation=null"]
    configs = compose_run([*words, f"data.root={tmp_path / 'data'}", "policy.chunk_sise=3"])
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
    small_run: Overrides, tmp_path: Path, strategy: str, message: str
) -> None:
    words = [item for item in small_run() if item != "simulation=null"]
    configs = compose_run([*words, f"data.root={tmp_path / 'data'}", "strategy_settings={wieght: 1}"])
    with pytest.raises(ConfigError, match=message):
        run([replace(config, strategy=strategy) for config in configs], 0)
    assert not (tmp_path / "data").exists()


def test_a_dataset_of_the_users_own_is_not_taken_for_a_recording(small_run: Overrides) -> None:
    configs = compose_run([item for item in small_run() if item != "simulation=null"] + ["simulation.episodes=3"])
    assert configs[0].simulation is not None
    with pytest.raises(
        ConfigError,
        match=r"moving_grasp.*; to train on a dataset of your own there, set simulation=null rollout.episodes=0",
    ):
        run(configs, 0)


def test_offline_tracking_leaves_a_weights_and_biases_run_in_the_stage_folder(small_run: Overrides) -> None:
    configs = compose_run(small_run("tracking=offline", "training.max_steps=2"))
    assert run(configs, 0) == 0
    assert list((stage_folder(configs[0]).path / "wandb").glob("offline-run-*/*.wandb"))


def test_a_tracked_stage_is_one_run_with_all_curves_that_goes_on(
    small_run: Overrides, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, curves = [], set()

    class Fake:
        def define_metric(self, name: str, *, step_metric: str) -> None:
            assert (name, step_metric) == ("*", "step")

        def log(self, values: dict[str, float]) -> None:
            assert "step" in values
            curves.update(values)

        def finish(self) -> None:
            pass

    def init(**about: Any) -> Fake:
        begun.append(about)
        return Fake()

    monkeypatch.setattr(wandb, "init", init)
    words = ("tracking=offline", "wandb.project=arms", "wandb.entity=team", "training.max_steps=2")
    configs = compose_run(small_run(*words))
    assert run(configs, 0) == 0
    folder = stage_folder(configs[0])
    assert {"loss", "forward_ms", "validation/moving_grasp/loss", "validation/weighing/action_error"} <= curves
    folder.write(status="interrupted")
    assert run(configs, 0, resume=True) == 0
    assert run(configs, 1) == 0
    ids = [about["id"] for about in begun]
    assert ids[0] == ids[1] != ids[2]
    assert {(about["project"], about["entity"], about["resume"]) for about in begun} == {("arms", "team", "allow")}


def test_online_tracking_without_a_key_or_a_network_is_told_in_a_line(
    small_run: Overrides, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    configs = compose_run(small_run("tracking=online", "training.max_steps=2"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"tracking=online must have a key .*, got none .*wandb login"):
        run(configs, 0)

    def init(**_about: Any) -> None:
        raise wandb.errors.CommError("the network is down")

    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(wandb, "init", init)
    with pytest.raises(RunError, match=r"must reach project kuavo_train .*got the network is down; .*off"):
        run(configs, 0)
    assert stage_folder(configs[0]).status == "failed"


def test_missing_datasets_are_all_named_at_once(small_run: Overrides, tmp_path: Path) -> None:
    configs = compose_run(small_run(f"data.root={tmp_path / 'none'}"))
    with pytest.raises(ConfigError) as refused:
        run(configs, 0)
    assert all(f"({config.stage.name}): dataset" in str(refused.value) for config in configs)
