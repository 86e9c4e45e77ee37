"""Closed loop: every seed is played once, in processes that may fail alone, and told as it went."""

import io
import json
import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forked import PATIENCE, fork
from PIL import Image
from safetensors.torch import load_file

from kuavo_sim import EVALUATION_SEED_START
from kuavo_train.compose import compose_run
from kuavo_train.config import RolloutConfig, RunConfig, SimulationConfig
from kuavo_train.errors import ConfigError
from kuavo_train.evaluation.environment import environment_of, evaluation_seeds
from kuavo_train.evaluation.environment_pool import Seen, carry_out_orders, seen_in
from kuavo_train.evaluation.episodes import Rollouts
from kuavo_train.evaluation.replays import read_kept
from kuavo_train.evaluation.rollout import Environment, observation_of, roll_out
from kuavo_train.runs.run_folder import StageFolder, stage_folder
from kuavo_train.stage.stage import run_stage
from kuavo_train.stage.stage_validation import StageValidation

COUNTING = Environment("worlds:Counting-v0", "count to the goal")

Configs = Callable[..., list[RunConfig]]


class Echo:
    """Acts as the state's first entry says, from the second look on as at the first: so it depends on resets."""

    n_action_steps = 1

    def __init__(self, offset: float = 0.0):
        self.offset = offset
        self.remembered: list[float | None] = []
        self.begun: list[int] = []
        self.batches: list[int] = []

    def reset(self, indices: Sequence[int] | None = None, *, seeds: Sequence[int] | None = None) -> None:
        if indices is None:
            self.remembered = [None for _ in seeds or ()]
            return
        for index, seed in zip(indices, seeds or (), strict=True):
            self.remembered[index] = None
            self.begun.append(seed)

    def select_action(self, observation: Mapping[str, Any]) -> np.ndarray:
        state, picture = observation["observation.state"], observation["observation.images.head"]
        assert picture.shape == (len(state), 4, 4, 3)
        assert observation["task"] == "count to the goal"
        self.batches.append(len(state))
        self.remembered = [
            float(row[0]) if known is None else known for row, known in zip(state, self.remembered, strict=True)
        ]
        return np.array([[value + self.offset] * 2 for value in self.remembered], np.float32)

    def due(self) -> Sequence[int]:
        return range(len(self.remembered))

    def memory_norms(self) -> np.ndarray | None:
        return np.array([[value, 0.0] for value in self.remembered])


def play(seeds: Sequence[int], *, policy: Echo | None = None, environment: Environment = COUNTING, **how: Any):
    how = {"parallel": 3, "workers": 2, "progress": False} | how
    return roll_out(policy or Echo(), environment, seeds, **how)


@pytest.fixture(scope="module")
def rollouts() -> Rollouts:
    return play(range(8), traces=True)


def test_every_seed_is_played_once_and_told_in_order(rollouts: Rollouts) -> None:
    assert [episode.seed for episode in rollouts.episodes] == list(range(8))
    assert [episode.steps for episode in rollouts.episodes] == [3 + seed % 5 for seed in range(8)]
    assert rollouts.successes == rollouts.trials == 8


def test_memory_and_noise_begin_with_each_episode() -> None:
    policy = Echo()
    assert play(range(8), policy=policy).successes == 8  # what is remembered of an earlier episode would be wrong
    assert sorted(policy.begun) == list(range(8))
    assert set(policy.batches) == {3}


def test_the_outcome_does_not_depend_on_the_number_of_robots_at_a_time(rollouts: Rollouts) -> None:
    assert play(range(8), parallel=1, workers=1).episodes == rollouts.episodes


def test_an_episode_is_told_with_its_subgoals_return_and_branch(rollouts: Rollouts) -> None:
    episode = rollouts.episodes[1]
    assert episode.subgoals == {"under_way": 2, "there": 4}
    assert episode.progress == 1.0
    assert episode.reward == pytest.approx(2.0)
    assert (episode.cue, episode.choice, episode.right_branch, episode.chosen_at) == (1, 0, False, 2)
    assert rollouts.branches == (4, 8)
    assert rollouts.funnel == {"under_way": 8, "there": 8}
    assert episode.roughness == 0.0


def test_a_trace_holds_what_was_seen_before_every_action(rollouts: Rollouts) -> None:
    trace = rollouts.episodes[3].trace
    assert trace is not None
    shown = [np.asarray(Image.open(io.BytesIO(pictures["head"]))) for pictures in trace.pictures]
    assert [int(picture[0, 0, 0]) for picture in shown] == list(range(6))
    assert [norms.tolist() for norms in trace.memory_norms] == [[3.0, 0.0]] * 6


class Glances(Echo):
    """Looks at every second step alone, and keeps what it was shown at each."""

    def reset(self, indices: Sequence[int] | None = None, *, seeds: Sequence[int] | None = None) -> None:
        super().reset(indices, seeds=seeds)
        if indices:
            self.shown: list[int] = []

    def select_action(self, observation: Mapping[str, Any]) -> np.ndarray:
        self.shown.append(int(observation["observation.images.head"][0, 0, 0, 0]))
        return super().select_action(observation)

    def due(self) -> Sequence[int]:
        return () if len(self.shown) % 2 else (0,)


def test_an_environment_draws_nothing_for_steps_that_the_policy_does_not_look_at(rollouts: Rollouts) -> None:
    policy = Glances()
    glanced = play([3], policy=policy)
    assert policy.shown == [0, 0, 2, 2, 4, 4]
    assert glanced.episodes == (rollouts.episodes[3],)
    play([3], policy=policy, traces=True)  # what is to be seen later is drawn
    assert policy.shown == [0, 1, 2, 3, 4, 5]


def test_an_environment_with_words_of_its_own_for_an_episode_has_them_told_to_its_robot() -> None:
    def seen(**info: str) -> Seen:
        return Seen({"head": np.zeros((4, 4, 3), np.uint8)}, np.zeros(2, np.float32), info)

    assert observation_of([seen(), seen()], "count")["task"] == "count"
    assert observation_of([seen(instruction="count to three"), seen()], "count")["task"] == ["count to three", "count"]


def test_a_policy_that_acts_wrongly_fails_at_the_environments_or_at_our_limit() -> None:
    wrong = play(range(4), policy=Echo(offset=1.0))
    assert wrong.successes == 0
    assert [episode.steps for episode in wrong.episodes] == [6, 8, 10, 12]
    limited = Environment(COUNTING.id, COUNTING.task, max_steps=5)
    assert [e.steps for e in play(range(4), policy=Echo(offset=1.0), environment=limited).episodes] == [5] * 4


def test_an_environment_that_raises_is_reported_and_the_others_go_on() -> None:
    broken = Environment(COUNTING.id, COUNTING.task, {"fails": {1: "raise", 4: "raise"}})
    rollouts = play(range(6), environment=broken)
    assert [e.seed for e in rollouts.failures] == [1, 4]
    assert rollouts.failures[0].error == "RuntimeError: the arm fell off"
    assert (rollouts.successes, rollouts.trials) == (4, 4)
    assert "2 environments failed: RuntimeError: the arm fell off" in rollouts.summary


def test_a_process_that_dies_or_hangs_takes_only_its_own_episodes_with_it() -> None:
    broken = Environment(COUNTING.id, COUNTING.task, {"fails": {0: "die", 5: "hang"}})
    rollouts = play(range(8), environment=broken, parallel=2, timeout=10.0)
    errors = {episode.seed: episode.error for episode in rollouts.failures}
    assert errors == {0: "the environment's process died", 5: "the environment did not answer within 10 s"}
    assert rollouts.successes == rollouts.trials == 6


def test_a_process_whose_parent_is_killed_before_it_reads_the_answer_ends_without_a_traceback(tmp_path: Path) -> None:
    ours, theirs = multiprocessing.Pipe()

    def host() -> int:
        ours.close()
        carry_out_orders(theirs, COUNTING)
        return 0

    running = fork(host, tmp_path)
    theirs.close()
    ours.send({})
    assert ours.poll(PATIENCE), running.printed("stderr")
    ours.close()  # with the answer unread, which resets the connection
    done = running.wait()
    assert (done.returncode, done.stderr) == (0, "")


def test_an_environment_that_is_not_there_is_told_for_every_episode() -> None:
    rollouts = play(range(3), environment=Environment("worlds:Missing-v0", "count"))
    assert rollouts.trials == 0
    assert "Missing" in str(rollouts.failures[0].error)
    assert rollouts.closed_loop() is None


def test_evaluation_seeds_are_disjoint_from_demonstrations_and_from_other_evaluations() -> None:
    first, second = evaluation_seeds(50), evaluation_seeds(50, seed=1)
    assert min(first) >= EVALUATION_SEED_START
    assert not set(first) & set(second)
    with pytest.raises(ValueError, match=r"episodes must be in \[1, 10000\], got 0"):
        evaluation_seeds(0)


def run(overrides: list[str]) -> RunConfig:
    configs = compose_run(overrides)
    for config in configs:
        assert run_stage(config, [each.stage for each in configs]) == 0
    return configs[0]


IN_THE_ARMS_WORLD = ("stage.environment=worlds:Arms-v0", "rollout.episodes=5", "rollout.parallel=2")


def test_a_stage_rolls_out_all_tasks_seen_and_success_enters_the_matrix(small_run: Callable[..., list[str]]) -> None:
    config = run(small_run("learn=[moving_grasp,weighing]", *IN_THE_ARMS_WORLD))
    matrix = json.loads((config.run_folder / "report" / "matrix.json").read_text())
    rows = {row["stage"]: row for row in matrix["matrices"]["success"]["rows"]}
    assert rows[1]["values"] == {"moving_grasp": 0.6, "weighing": None}
    assert rows[2]["values"] == {"moving_grasp": 0.6, "weighing": 0.6}
    assert rows[2]["intervals"]["weighing"]["n"] == 5
    assert matrix["matrices"]["success"]["metrics"]["LIBERO NBT"]["value"] == {"moving_grasp": 0.0}
    assert matrix["matrices"]["progress"]["rows"][2]["values"] == {"moving_grasp": 0.6, "weighing": 0.6}
    stage = StageFolder(config.run_folder / "stage2_weighing")
    assert [line["task"] for line in stage.rollouts.read()] == ["moving_grasp", "weighing"]
    card = (stage.checkpoints.at("best").pretrained_model / "README.md").read_text()
    assert card.count(" | 3 of 5 |\n") == 2
    line = stage.rollouts.read()[1]
    assert [episode["seed"] for episode in line["episodes"]] == evaluation_seeds(5)
    assert line["n_action_steps"] == 4
    kept = read_kept(stage.recordings("weighing"))
    assert kept is not None
    assert [
        (each.rank, line["episodes"][each.seed - evaluation_seeds(1)[0]]["success"]) for each in kept.recordings
    ] == [
        ("best", True),
        ("typical", True),
    ]
    assert {each.actions.shape for each in kept.recordings} == {(3, 16)}


def test_rolling_out_changes_nothing_in_training(
    small_run: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    modes = []
    monkeypatch.setattr(StageValidation, "roll_out", _noting_modes(StageValidation.roll_out, modes))
    weights = []
    for name, more in {"with": (*IN_THE_ARMS_WORLD, "rollout.every_epochs=1"), "without": ()}.items():
        config = run(small_run("learn=[moving_grasp]", "validation.every_epochs=1", f"run={name}", *more))
        folder = stage_folder(config)
        kinds = [line["kind"] for line in folder.rollouts.read()]
        assert bool(kinds) == (name == "with")
        assert set(kinds) <= {"epoch", "end"}
        weights.append(load_file(folder.path / "checkpoints" / "last" / "pretrained_model" / "model.safetensors"))
    assert (True, True) in modes
    assert all(before == after for before, after in modes)
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])


def _noting_modes(roll_out: Callable[..., Any], modes: list[tuple[bool, bool]]) -> Callable[..., Any]:
    """Whether the policy was in training mode before, and after."""

    def noting(validation: StageValidation, *arguments: Any) -> Any:
        before = validation.policy.training
        found = roll_out(validation, *arguments)
        modes.append((before, validation.policy.training))
        return found

    return noting


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ("worlds:Missing-v0", r"environment worlds:Missing-v0 must begin an episode, got NameNotFound"),
        ("no_such_module:Arms-v0", r"must begin an episode, got ModuleNotFoundError"),
        (
            "worlds:Counting-v0",
            r"must show head_cam_h, wrist_cam_l, wrist_cam_r, got head\n(.|\n)*"
            r"must have a state of 16 dimensions \(zarm_l1_link, .*\), got \[2\]\n(.|\n)*"
            r"must take actions of 16 dimensions \(.*\), got ValueError: actions must be of shape \(2,\), got \(16,\)",
        ),
    ],
)
def test_an_environment_that_would_fail_after_training_is_refused_before(
    small_run: Callable[..., list[str]], environment: str, message: str
) -> None:
    words = [f"stage.environment={environment}", "rollout.episodes=1"]
    (config, *others) = compose_run([*small_run(), *words])
    with pytest.raises(ConfigError, match=message):
        run_stage(config, [config.stage, *(other.stage for other in others)])
    assert not config.run_folder.exists()


def test_a_task_without_an_environment_cannot_be_rolled_out(small_configs: Configs) -> None:
    configs = small_configs("learn=[moving_grasp]", rollout={"episodes": 3})
    with pytest.raises(
        ConfigError,
        match=r"stage 1 \(moving_grasp\): environment must name one .*, got None with simulation=null",
    ):
        run_stage(configs[0], [configs[0].stage])
    stage = compose_run()[1].stage
    environment = environment_of(stage, stage.instruction, SimulationConfig(image_size=48), RolloutConfig(max_steps=9))
    assert environment.id == "kuavo_sim:kuavo_sim/Weighing-v0"
    assert environment.settings == {"image_size": 48, "renderer": "rays", "phase_visible": True}
    assert environment.max_steps == 9


def test_an_environment_that_observes_numbers_alone_is_told_what_it_must_observe() -> None:
    with pytest.raises(
        ValueError, match=r'observations must be {"pixels": .*, "agent_pos": state}, got no mapping, ndarray'
    ):
        seen_in(np.zeros(4), {})
