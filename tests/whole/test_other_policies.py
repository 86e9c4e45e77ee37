"""ACT and Diffusion through the same trainer, validation, rollouts and report as SmolVLA; SmolVLA without memory."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lerobot.utils.constants import OBS_STATE
from served import Served
from small_datasets import CAMERAS
from torch import Tensor

from kuavo_client import RobotLoop
from kuavo_train.compose import compose_run
from kuavo_train.config import RunConfig
from kuavo_train.errors import ConfigError
from kuavo_train.evaluation.predictions import OwnAnswers
from kuavo_train.reporting.run_analysis import analyse
from kuavo_train.reporting.write_report import write_report
from kuavo_train.runs.run_folder import StageFolder, stage_folder
from kuavo_train.runs.stored_run import StoredRun
from kuavo_train.stage.description import describe
from kuavo_train.stage.preflight import examine_stage
from kuavo_train.stage.stage import run_stage
from kuavo_train.training.parameter_groups import parameter_groups
from kuavo_train.wrapper.policy.robot_by_robot import RobotByRobot
from kuavo_train.wrapper.policy.smolvla import SmolVLAPolicyWrapper

SMALLEST = {
    "act": ["chunk_size=6", "dim_model=32", "n_heads=2", "dim_feedforward=32", "n_encoder_layers=1"],
    "diffusion": ["horizon=8", "down_dims=[16,32]", "diffusion_step_embed_dim=16", "num_inference_steps=2"],
}
SMOLVLAS_OWN = ("policy.resize_imgs_with_padding", "policy.chunk_size", "tiny_vlm")

Configs = Callable[..., list[RunConfig]]


def overrides_of(policy: str, small_run: list[str]) -> list[str]:
    shared = [item for item in small_run if not item.startswith(SMOLVLAS_OWN)]
    return [f"policy={policy}", *shared, *(f"policy.{item}" for item in SMALLEST[policy])]


@pytest.fixture(scope="module", params=list(SMALLEST))
def run(request: pytest.FixtureRequest, datasets: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """The last stage of a run, of two tasks or of one, played in a world without physics."""
    small = [
        "profile=smoke",
        "simulation=null",
        f"outputs={tmp_path_factory.mktemp(request.param)}",
        f"data.root={datasets}",
        "data.held_out_episodes=1",
        "learn=[moving_grasp,weighing]" if request.param == "act" else "learn=[moving_grasp]",
        "policy.n_action_steps=4",
        "training.max_steps=2",
        "training.batch_size=2",
        "+stage.environment=worlds:Arms-v0",
        "rollout.episodes=2",
    ]
    configs = compose_run(overrides_of(request.param, small))
    for config in configs:
        assert run_stage(config, [each.stage for each in configs]) == 0
    return configs[-1]


def test_stages_end_in_a_report_with_losses_errors_and_success(run: RunConfig) -> None:
    page = write_report(analyse(StoredRun.open(run.run_folder))).read_text()
    matrix = json.loads((run.run_folder / "report" / "matrix.json").read_text())["matrices"]
    for measure in ("loss", "action_error", "success"):
        assert all(value is not None for value in matrix[measure]["rows"][-1]["values"].values()), measure
    assert set(matrix["success"]["rows"][-1]["values"].values()) == {0.5}
    assert run.stage.name in page
    audit = json.loads((stage_folder(run).path / "replay_audit.json").read_text())
    assert audit["total_frames"] == 4


def test_the_same_weights_are_given_the_same_losses_at_the_end_as_during_training(run: RunConfig) -> None:
    lines = stage_folder(run).validations.read()
    best = stage_folder(run).about["best"]["step"]
    during = {line["task"]: line["loss"] for line in lines if line["kind"] == "epoch" and line["step"] == best}
    end = {line["task"]: line["loss"] for line in lines if line["kind"] == "end"}
    assert end == during


def test_a_checkpoint_opens_as_a_robots_policy_without_fetching_anything(run: RunConfig) -> None:
    checkpoint = stage_folder(run).checkpoints.at("best").pretrained_model
    assert json.loads((checkpoint / "config.json").read_text())["pretrained_backbone_weights"] is None
    assert f"A robot policy ({run.policy['type']})" in (checkpoint / "README.md").read_text()
    wrapper = SmolVLAPolicyWrapper.from_pretrained(checkpoint, device="cpu", seed=0)
    random = np.random.default_rng(0)
    observation = {
        **{f"observation.images.{c}": random.integers(0, 256, (2, 32, 32, 3), dtype=np.uint8) for c in CAMERAS},
        "observation.state": random.normal(size=(2, 16)).astype(np.float32),
        "task": ["moving_grasp", "moving_grasp"],
    }
    first = [wrapper.select_action(observation) for _ in range(5)]
    assert np.shape(first) == (5, 2, 16)
    wrapper.reset()
    assert np.array_equal(first, [wrapper.select_action(observation) for _ in range(5)])
    assert not wrapper.has_memory
    with pytest.raises(ValueError, match=f"dtype of policy {run.policy['type']} must be float32, got bfloat16"):
        SmolVLAPolicyWrapper.from_pretrained(checkpoint, device="cpu", dtype="bfloat16")
    with pytest.raises(ValueError, match=f"cuda_graphs of policy {run.policy['type']} must be false, got true"):
        SmolVLAPolicyWrapper.from_pretrained(checkpoint, device="cpu", cuda_graphs=True)
    with pytest.raises(ValueError, match="n_action_steps must be in"):
        wrapper.n_action_steps = 9
    with pytest.raises(ValueError, match=f"sampling_temperature of {run.policy['type']} must be 1, got 0.5"):
        wrapper.sampling_temperature = 0.5


def test_a_robot_that_is_served_acts_as_the_policy_does_in_process(run: RunConfig) -> None:
    """Also where the policy looks at several frames, which the robot's loop then shows."""
    checkpoint = stage_folder(run).checkpoints.at("best").pretrained_model
    alone, served = (SmolVLAPolicyWrapper.from_pretrained(checkpoint, device="cpu", seed=3) for _ in range(2))
    assert served.frames == {"act": 1, "diffusion": 2}[run.policy["type"]]
    alone.reset(seeds=[5])
    expected = [alone.select_action({**seen(step), "task": "moving_grasp"}) for step in range(10)]
    acted: list[np.ndarray] = []
    with Served(served, batch=1) as server:
        loop = RobotLoop(
            lambda: seen(len(acted)),
            acted.append,
            f"ws://127.0.0.1:{server.port}",
            "moving_grasp",
            rate=None,
            handover="wait",
            limits=None,
            seed=5,
        )
        assert loop.run(10)["answers"] == 3
        with server.robot() as robot:
            assert robot.metadata["handover"] == ["wait", "blend"]
            first = {**stacked(served.frames), "task": "moving_grasp"}
            robot.ask(first)
            assert "delay must not be given to a policy that cannot hand over" in robot.ask(first, executed=4, delay=1)
    assert np.array_equal(acted, expected)


def seen(step: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(step)
    pictures = {f"observation.images.{c}": random.integers(0, 256, (32, 32, 3), dtype=np.uint8) for c in CAMERAS}
    return {**pictures, OBS_STATE: random.normal(size=16).astype(np.float32)}


def stacked(frames: int) -> dict[str, np.ndarray]:
    return {key: np.stack([value] * frames) if frames > 1 else value for key, value in seen(0).items()}


def test_preflight_says_what_the_policy_cannot_do(small_run: Callable[..., list[str]]) -> None:
    configs = compose_run(overrides_of("act", small_run("learn=null")))
    findings = examine_stage(configs[0], [config.stage for config in configs])
    assert findings.problems == []
    assert "note: policy act reads no instruction: it can tell 4 tasks apart by pictures and state" in describe(
        findings
    )
    assert "those that moving_grasp, weighing, placement lack count in its loss" in describe(findings)
    assert len(findings.facts["parameters"]) > 1  # groups that can be frozen


def test_a_policy_with_other_units_of_action_is_refused(small_run: Callable[..., list[str]]) -> None:
    overrides = [*overrides_of("diffusion", small_run()), "policy.normalization_mapping.ACTION=MIN_MAX"]
    configs = compose_run(overrides)
    (problem,) = examine_stage(configs[0], [config.stage for config in configs]).problems
    assert problem == "policy.normalization_mapping of ACTION must be MEAN_STD, got MIN_MAX"


def test_weights_of_a_backbone_that_cannot_be_had_are_told(
    small_run: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", lambda *_, **__: (_ for _ in ()).throw(OSError("no network")))
    weights = "ResNet18_Weights.IMAGENET1K_V1"
    configs = compose_run([*overrides_of("act", small_run()), f"policy.pretrained_backbone_weights={weights}"])
    (problem,) = examine_stage(configs[0], [config.stage for config in configs]).problems
    assert "policy.pretrained_backbone_weights must be in torchvision's cache" in problem
    assert weights in problem


class Network(torch.nn.Module):
    """A LeRobot policy in little: its loss is drawn at random, its plan is what it saw, and one plan for all."""

    def __init__(self, frames: int = 1):
        super().__init__()
        self.inner = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
        features = {OBS_STATE: None}
        seen = None if frames == 1 else list(range(1 - frames, 1))
        self.config = SimpleNamespace(
            observation_delta_indices=seen, input_features=features, n_action_steps=2, type="little"
        )

    def reset(self) -> None:
        pass

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, None]:
        return (batch[OBS_STATE] * torch.rand(batch[OBS_STATE].shape)).mean(), None

    def predict_action_chunk(self, batch: dict[str, Tensor]) -> Tensor:
        """Three steps: the frames seen, oldest first, and what is drawn at random."""
        state = batch[OBS_STATE] if batch[OBS_STATE].ndim == 3 else batch[OBS_STATE][:, None]
        return torch.cat([state[:, [0]], state[:, [-1]], torch.rand(len(state), 1, state.shape[-1])], dim=1)


def test_a_policys_own_loss_of_a_row_is_the_same_in_any_company() -> None:
    rows = {OBS_STATE: torch.rand(3, 4, generator=torch.Generator().manual_seed(0)), "task": ["a", "b", "c"]}
    keys = [(1, 0, 0), (1, 0, 8), (1, 2, 0)]
    answers = OwnAnswers(Network(), draws=3)(rows, keys, None)
    assert answers.losses.shape == (3,)
    assert answers.actions.shape == (3, 3, 4)
    alone = OwnAnswers(Network(), draws=3)({OBS_STATE: rows[OBS_STATE][1:2]}, keys[1:2], None)
    assert torch.equal(alone.losses[0], answers.losses[1])
    assert torch.equal(alone.actions[0], answers.actions[1])
    assert len(set(answers.actions[:, 2, 0].tolist())) == 3  # other keys, other draws


def looks(*values: float) -> dict[str, Tensor]:
    return {OBS_STATE: torch.tensor([[value] for value in values]), "task": ["x"] * len(values)}  # type: ignore[dict-item]


def test_every_robot_carries_out_its_own_plan_and_begins_on_its_own() -> None:
    robots = RobotByRobot(Network())
    seen: list[list[float]] = []
    for step in range(4):
        if step == 3:
            robots.reset([1])
            assert robots.due() == [1]
        seen.append(robots.select_action(looks(step, 10 + step), [5, 6]).flatten().tolist())
    assert robots.due() == [0]
    assert seen[:3] == [[0, 10], [0, 10], [2, 12]]
    assert seen[3] == [2, 13]  # the first goes on with its plan, the second makes a new one


def test_frames_before_an_episode_are_its_first_and_then_those_really_seen() -> None:
    robots = RobotByRobot(Network(frames=2))
    robots.config.n_action_steps = 1
    assert robots.select_action(looks(1, 2), [0, 0]).flatten().tolist() == [1, 2]
    assert robots.select_action(looks(3, 4), [0, 0]).flatten().tolist() == [1, 2]  # the older of the two frames
    robots.config.n_action_steps = 2
    robots.select_action(looks(3, 4), [0, 0])
    assert robots.due() == [0, 1]  # with a plan too: what is seen now is looked at later
    robots.reset()
    robots.config.n_action_steps = 1
    robots.select_action(looks(1, 2), [0, 0])
    robots.select_action(looks(3, 4), [0, 0])
    robots.reset([0])
    assert robots.select_action(looks(5, 6), [0, 0]).flatten().tolist() == [5, 4]
    with pytest.raises(ValueError, match="policy little looks at 2 frames in a row"):
        robots.predict_action_chunk(looks(1, 2), [0, 0])


def test_what_a_robot_draws_is_a_function_of_its_seed_alone() -> None:
    robots, before = RobotByRobot(Network()), torch.get_rng_state()
    pair = robots.predict_action_chunk(looks(1, 2), [7, 8])
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(RobotByRobot(Network()).predict_action_chunk(looks(2), [8])[0], pair[1])


def test_groups_of_a_policy_without_its_own_are_the_parts_of_its_network() -> None:
    assert list(parameter_groups(Network())) == ["0", "1"]
    assert list(parameter_groups(Network().inner)) == ["0", "1"]


def test_smolvla_is_the_memory_policy_without_memory(small_configs: Configs) -> None:
    plain, memory = (small_configs(*more)[0] for more in (["policy=smolvla"], []))
    assert plain.policy == {**memory.policy, "num_mem_tokens": 0}
    assert (plain.run, memory.run) == ("smoke-smolvla", "smoke")


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["smolvla", *SMALLEST])
def test_four_stages_of_the_smoke_profile_end_in_a_report(policy: str, tmp_path: Path) -> None:
    configs = compose_run(["profile=smoke", f"policy={policy}", f"outputs={tmp_path}"])
    for config in configs:
        assert run_stage(config, [each.stage for each in configs]) == 0
    assert write_report(analyse(StoredRun.open(configs[0].run_folder))).is_file()
    assert all(StageFolder(configs[0].run_folder / c.stage.folder_name).status == "finished" for c in configs)


def test_memory_of_a_policy_that_has_none_is_refused(small_run: Callable[..., list[str]]) -> None:
    configs = compose_run([*overrides_of("act", small_run()), "memory=light"])
    with pytest.raises(ConfigError, match=r"policy.num_mem_tokens must be a field of ACTConfig, got 2"):
        run_stage(configs[0], [config.stage for config in configs])


def test_a_feature_stride_between_the_frames_that_a_sample_of_diffusion_sees_is_a_problem(
    small_run: Callable[..., list[str]],
) -> None:
    (config,) = compose_run([*overrides_of("diffusion", small_run("learn=[moving_grasp]")), "data.feature_stride=2"])
    (problem,) = examine_stage(config, [config.stage]).problems
    assert problem == (
        "data.feature_stride must divide the offsets of the frames that a sample of policy.type=diffusion sees, "
        "[-1, 0], got 2"
    )
