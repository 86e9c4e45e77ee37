"""The policy as a robot process uses it: robot units in and out, by task, per robot, and clear words on misuse."""

import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from graphs_on_cpu import StandIn
from small_datasets import ARM_NAMES, CAMERAS

from kuavo_train.data.checkpoint_tasks import REMEMBERED, KnownTasks
from kuavo_train.data.images.frames import DecodedFrames
from kuavo_train.runs.trained_run import TrainedRun
from kuavo_train.wrapper.policy import smolvla
from kuavo_train.wrapper.policy.episode import RobotEpisode
from kuavo_train.wrapper.policy.loading import folder_of, open_policy, stored_config
from kuavo_train.wrapper.policy.smolvla import Query, SmolVLAPolicyWrapper
from lerobot_policy_smolvla_memory.graphed_query import use_cuda_graphs

Observation = dict[str, Any]


@pytest.fixture(scope="module")
def checkpoint(small_checkpoint: Path) -> Path:
    return small_checkpoint


@pytest.fixture
def wrapper(checkpoint: Path) -> SmolVLAPolicyWrapper:
    return SmolVLAPolicyWrapper.from_pretrained(checkpoint, device="cpu", seed=3)


def look(number: int = 0, *, task: str = "weighing", robots: int | None = None) -> Observation:
    """What a robot sees at a moment; with `robots`, what each of them sees."""
    random = np.random.default_rng(number)
    shape = () if robots is None else (robots,)
    return {
        **{f"observation.images.{c}": random.integers(0, 256, (*shape, 32, 32, 3), dtype=np.uint8) for c in CAMERAS},
        "observation.state": random.normal(size=(*shape, 16)).astype(np.float32),
        "task": task,
    }


def of_robot(observation: Observation, robot: int) -> Observation:
    return {key: value if isinstance(value, str) else value[robot] for key, value in observation.items()}


def episode(wrapper: SmolVLAPolicyWrapper, *, task: str = "weighing", steps: int = 5) -> np.ndarray:
    return np.stack([wrapper.select_action(look(step, task=task)) for step in range(steps)])


def test_an_action_has_the_dimensions_of_the_task_in_robot_units(wrapper: SmolVLAPolicyWrapper) -> None:
    arms = wrapper.select_action(look())
    assert arms.shape == (16,)
    assert arms.dtype == np.float32
    wrapper.reset()
    assert wrapper.select_action(look(task="sorting")).shape == (20,)
    # The datasets' joints swing within ±1 rad; an untrained policy answers around their mean, not around its code's.
    assert np.abs(arms).max() < 5


def test_opening_a_policy_prints_nothing(checkpoint: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """What a robot's process prints is its own; LeRobot says that it loads."""
    SmolVLAPolicyWrapper.from_pretrained(checkpoint, device="cpu")
    assert capfd.readouterr().out == ""


def test_the_same_seed_and_observations_give_the_same_actions(checkpoint: Path, wrapper: SmolVLAPolicyWrapper) -> None:
    torch.manual_seed(0)
    first = episode(wrapper)
    torch.manual_seed(1)
    wrapper.reset()
    assert np.array_equal(episode(wrapper), first)
    again = SmolVLAPolicyWrapper.from_pretrained(checkpoint / "pretrained_model", device="cpu", seed=3)
    assert np.array_equal(episode(again), first)
    other = SmolVLAPolicyWrapper.from_pretrained(checkpoint, device="cpu", seed=4)
    assert not np.array_equal(episode(other), first)


def test_it_computes_in_bfloat16_what_it_computes_in_float32_but_for_rounding(checkpoint: Path) -> None:
    given, exact, half = (
        SmolVLAPolicyWrapper.from_pretrained(checkpoint, device="cpu", dtype=dtype, seed=3)
        for dtype in (None, "float32", "bfloat16")
    )
    whole, walked = episode(exact), episode(half)
    assert np.array_equal(episode(given), whole)
    assert not np.array_equal(walked, whole)
    np.testing.assert_allclose(walked, whole, atol=0.02)  # rad
    folder = folder_of(checkpoint)
    policy, processors = open_policy(folder, stored_config(folder, "cpu"))
    policy.compute_in(torch.bfloat16)
    assert np.array_equal(episode(SmolVLAPolicyWrapper(policy, processors, KnownTasks.load(folder), seed=3)), walked)
    types = {parameter.dtype for parameter in policy.model.vlm_with_expert.parameters()}
    assert types == {torch.bfloat16}
    assert policy.get_memory().tokens.dtype == torch.float32
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, or None, got 'float16'"):
        SmolVLAPolicyWrapper.from_pretrained(checkpoint, dtype="float16")


@pytest.fixture
def in_graphs(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> SmolVLAPolicyWrapper:
    """In what stands in for graphs, here where there is no GPU."""
    monkeypatch.setattr(smolvla, "use_cuda_graphs", partial(use_cuda_graphs, capture=StandIn))
    return SmolVLAPolicyWrapper.from_pretrained(checkpoint, device="cpu", cuda_graphs=True, seed=3)


def test_in_graphs_it_answers_as_without(wrapper: SmolVLAPolicyWrapper, in_graphs: SmolVLAPolicyWrapper) -> None:
    for task in ("weighing", "sorting"):
        assert np.array_equal(episode(in_graphs, task=task), episode(wrapper, task=task))
    recorded = in_graphs._policy.graphed._recorded._capture.recordings
    wrapper.reset()
    in_graphs.reset()
    assert np.array_equal(episode(in_graphs), episode(wrapper))
    assert in_graphs._policy.graphed._recorded._capture.recordings == recorded
    queries = [Query(wrapper.look(look(robot)), RobotEpisode(robot)) for robot in range(2)]
    for mine, theirs in zip(in_graphs.plan(queries), wrapper.plan(queries), strict=True):
        assert np.array_equal(mine.actions, theirs.actions)
        assert torch.equal(mine.episode.memory.tokens, theirs.episode.memory.tokens)


def test_in_graphs_no_plan_goes_on_from_the_one_before(
    wrapper: SmolVLAPolicyWrapper, in_graphs: SmolVLAPolicyWrapper
) -> None:
    (plan,) = in_graphs.plan([Query(in_graphs.look(look()), RobotEpisode())])
    handed_over = Query(in_graphs.look(look(1)), plan.episode.moved(1), executed=1, delay=1)
    with pytest.raises(ValueError, match="cuda_graphs must be false with real-time chunking, got true"):
        in_graphs.plan([handed_over])
    assert len(wrapper.plan([handed_over])) == 1
    assert (wrapper.hands_over, in_graphs.hands_over) == (True, False)


def test_where_there_are_no_graphs_they_are_refused_by_key_and_with_what_to_do(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=r"cuda_graphs must be false on cpu, got true: .* or leave cuda_graphs out"):
        SmolVLAPolicyWrapper.from_pretrained(checkpoint, device="cpu", cuda_graphs=True)


def test_pictures_may_come_as_bytes_or_as_floats(wrapper: SmolVLAPolicyWrapper) -> None:
    whole = look()
    floats = {
        key: np.moveaxis(value, -1, 0).astype(np.float32) / 255 if "images" in key else value
        for key, value in whole.items()
    }
    expected = wrapper.select_action(whole)
    wrapper.reset()
    np.testing.assert_allclose(wrapper.select_action(floats), expected, atol=1e-5)
    wrapper.reset()
    tensors = {key: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for key, v in whole.items()}
    assert np.array_equal(wrapper.select_action(tensors), expected)


def test_a_picture_as_the_camera_gives_it_is_to_the_policy_what_training_made_of_it(
    wrapper: SmolVLAPolicyWrapper, simulated_run: Path
) -> None:
    """Of a recording with edges in its pictures: those of a flat colour are the same however they are resized."""
    task = TrainedRun.open(simulated_run).tasks[0]
    camera, rows = f"observation.images.{CAMERAS[0]}", np.array([5])
    picture, trained = (
        DecodedFrames(task, image_size=size, video_backend="pyav")(camera, rows)[0].permute(1, 2, 0).numpy()
        for size in (None, [24, 24])
    )
    assert picture.shape == (32, 32, 3)
    of_the_camera = wrapper.select_action(look() | {camera: picture})
    wrapper.reset()
    assert np.array_equal(wrapper.select_action(look() | {camera: trained}), of_the_camera)


def test_every_robot_of_a_batch_has_a_memory_of_its_own(wrapper: SmolVLAPolicyWrapper) -> None:
    steps = [look(step, robots=2) for step in range(5)]
    together = np.stack([wrapper.select_action(step) for step in steps])
    assert together.shape == (5, 2, 16)
    wrapper.reset()
    alone = np.stack([wrapper.select_action(of_robot(step, 0)) for step in steps])
    np.testing.assert_allclose(together[:, 0], alone, atol=1e-5)


def test_robots_of_a_batch_may_do_different_tasks(wrapper: SmolVLAPolicyWrapper) -> None:
    observation = look(robots=2) | {"task": ["sorting", "weighing"]}
    actions = wrapper.select_action(observation)
    assert [action.shape for action in actions] == [(20,), (16,)]


def test_resetting_one_robot_leaves_the_other_alone(wrapper: SmolVLAPolicyWrapper) -> None:
    steps = [look(step, robots=2) for step in range(4)]
    undisturbed = [wrapper.select_action(step) for step in steps]
    wrapper.reset()
    for step in steps[:3]:
        wrapper.select_action(step)
    wrapper.reset([1])
    after = wrapper.select_action(steps[3])
    np.testing.assert_allclose(after[0], undisturbed[3][0], atol=1e-5)
    assert not np.allclose(after[1], undisturbed[3][1], atol=1e-5)
    wrapper.reset()
    fresh = wrapper.select_action(steps[3])
    np.testing.assert_allclose(after[1], fresh[1], atol=1e-5)


def test_a_robot_that_is_not_due_acts_the_same_whatever_it_is_shown(wrapper: SmolVLAPolicyWrapper) -> None:
    def walk(*, blindfolded: bool) -> tuple[np.ndarray, list[list[int]]]:
        wrapper.reset()
        actions, due = [], [[0, 1]]
        for step in range(5):  # two actions a query
            if step == 3:
                wrapper.reset([1])
                due[-1] = wrapper.due()
            shown = look(step, robots=2)
            for robot in {0, 1}.difference(due[-1]) if blindfolded else ():
                for camera in CAMERAS:
                    shown[f"observation.images.{camera}"][robot] = 0
            actions.append(wrapper.select_action(shown))
            due.append(wrapper.due())
        return np.stack(actions), due

    seen, due = walk(blindfolded=False)
    assert due == [[0, 1], [], [0, 1], [1], [0], [1]]
    assert np.array_equal(walk(blindfolded=True)[0], seen)


def test_another_instruction_begins_the_new_task_at_once(wrapper: SmolVLAPolicyWrapper) -> None:
    wrapper.select_action(look(0, task="weighing"))  # plans two actions
    switched = wrapper.select_action(look(1, task="placement"))
    wrapper.reset()
    np.testing.assert_allclose(switched, wrapper.select_action(look(1, task="placement")), atol=1e-5)


def test_an_instruction_may_be_said_in_full_or_a_little_otherwise(wrapper: SmolVLAPolicyWrapper) -> None:
    instruction = next(task.instruction for task in wrapper.known.tasks if task.name == "weighing")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        by_name = wrapper.select_action(look())
        wrapper.reset()
        assert np.array_equal(wrapper.select_action(look(task=f"  {instruction}\n")), by_name)
        wrapper.reset()
        wrapper.select_action(look(task=instruction.replace("electronic ", "")))


def test_an_instruction_is_compared_once_and_few_are_remembered(
    wrapper: SmolVLAPolicyWrapper, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A robot asks at every step; a server that is asked for anything must not keep all of it."""
    known, compared = replace(wrapper.known), []
    compare = KnownTasks._compare
    monkeypatch.setattr(KnownTasks, "_compare", lambda self, text: [compared.append(text), compare(self, text)][1])
    likely = f"please {known.tasks[1].instruction}"
    first = known.closest(likely)
    assert first.task is known.tasks[1]
    assert known.closest(likely) is first
    assert compared == [likely]
    for number in range(3 * REMEMBERED):
        known.closest(f"make coffee {number}")
    assert len(known._compared) <= REMEMBERED
    assert known.closest(likely) == first


def test_an_instruction_unlike_all_learnt_ones_is_warned_of_once(wrapper: SmolVLAPolicyWrapper) -> None:
    with pytest.warns(UserWarning, match="never trained with an instruction like 'make coffee'"):
        assert wrapper.select_action(look(task="make coffee")) is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrapper.select_action(look(task="make coffee"))


def test_a_chunk_begins_with_the_actions_that_would_be_carried_out(wrapper: SmolVLAPolicyWrapper) -> None:
    looks = [look(step, robots=2) for step in range(2)]
    chunks = [wrapper.predict_chunk(each) for each in looks]
    assert [chunk.shape for chunk in chunks] == [(2, 6, 16)] * 2
    alone = wrapper.predict_chunk
    wrapper.reset()
    wrapper.n_action_steps = 1  # every call a look, as every chunk is one
    for chunk, each in zip(chunks, looks, strict=True):
        np.testing.assert_allclose(wrapper.select_action(each), chunk[:, 0], atol=1e-5)
    wrapper.reset()
    assert alone(of_robot(looks[0], 0)).shape == (6, 16)


def test_the_horizon_may_be_shortened_but_not_beyond_the_chunk(wrapper: SmolVLAPolicyWrapper) -> None:
    planned = wrapper.predict_chunk(look())
    wrapper.n_action_steps = 6
    actions = [wrapper.select_action(look(step)) for step in range(6)]
    np.testing.assert_allclose(np.stack(actions), planned, atol=1e-5)
    with pytest.raises(ValueError, match=r"n_action_steps must be in \[1, 6\], got 7"):
        wrapper.n_action_steps = 7


def test_what_is_forgotten_does_not_change_the_plan_but_the_next_one(wrapper: SmolVLAPolicyWrapper) -> None:
    remembering = episode(wrapper, steps=4)
    wrapper.reset()
    wrapper.select_action(look(0))
    wrapper.forget()
    assert np.array_equal(wrapper.select_action(look(1)), remembering[1])
    assert not np.allclose(wrapper.select_action(look(2)), remembering[2], atol=1e-5)


def test_an_instruction_to_read_instead_leaves_the_task_as_it_is(wrapper: SmolVLAPolicyWrapper) -> None:
    known = wrapper.select_action(look(task="sorting"))
    wrapper.reset()
    untold = wrapper.select_action(look(task="sorting") | {"instruction": ""})
    assert untold.shape == known.shape == (20,)
    assert not np.allclose(untold, known, atol=1e-5)


def without(key: str) -> Callable[[Observation], Any]:
    return lambda observation: observation.pop(key)


HEAD = "observation.images.head_cam_h"
MISUSES: list[tuple[str, Callable[[Observation], Any], str]] = [
    ("no camera", without(HEAD), rf"must hold {HEAD}; the policy was trained with"),
    ("no state", without("observation.state"), r"must hold observation\.state"),
    ("no task", without("task"), r"task must be an instruction, or a list of them, got None"),
    ("two tasks", lambda o: o.update(task=["weighing", "sorting"]), r"task must be one instruction, or 1 .*, got 2"),
    (
        "two heads",
        lambda o: o.update({HEAD: np.zeros((2, 32, 32, 3), np.uint8)}),
        r"must be \[H, W, 3\] uint8 .* \[2, 32",
    ),
    ("empty task", lambda o: o.update(task=" "), r"task must be an instruction"),
    ("17 joints", lambda o: o.update({"observation.state": np.zeros(17)}), r"16 dimensions of weighing .* got 17"),
    ("nan", lambda o: o.update({"observation.state": np.full(16, np.nan)}), r"observation.state must be finite"),
    (
        "size",
        lambda o: o.update({HEAD: np.zeros((9, 8, 3), np.uint8)}),
        r"in training, \(24, 24\) .* got \(9, 8\)",
    ),
    ("grey", lambda o: o.update({HEAD: np.zeros((32, 32), np.uint8)}), r"must be \[H, W, 3\] uint8 .* got \[32, 32\]"),
    ("int", lambda o: o.update({HEAD: np.zeros((32, 32, 3), np.int64)}), r"must be \[H, W, 3\] uint8 .* int64"),
    ("bright", lambda o: o.update({HEAD: np.full((3, 32, 32), 9.0)}), r"as float must be in \[0, 1\], got 9 to 9"),
    ("long", lambda o: o.update(task="go " * 300), r"task must fit the policy's 96 tokens"),
]


@pytest.mark.parametrize(("what", "spoil", "message"), MISUSES, ids=[item[0] for item in MISUSES])
@pytest.mark.filterwarnings("ignore:the policy was never trained")
def test_misuse_is_said_clearly(
    wrapper: SmolVLAPolicyWrapper, what: str, spoil: Callable[[Observation], Any], message: str
) -> None:
    observation = look()
    spoil(observation)
    with pytest.raises(ValueError, match=message):
        wrapper.select_action(observation)
    assert wrapper.select_action(look()).shape == (len(ARM_NAMES),)  # the next good one is answered


def test_another_batch_size_needs_a_reset(wrapper: SmolVLAPolicyWrapper) -> None:
    wrapper.select_action(look(robots=2))
    with pytest.raises(ValueError, match=r"must stay at 2 robots until reset\(\), got 3"):
        wrapper.select_action(look(robots=3))
    with pytest.raises(ValueError, match=r"indices must be in \[0, 2\), .* got 2"):
        wrapper.reset([2])
    wrapper.reset()
    assert wrapper.select_action(look(robots=3)).shape == (3, 16)


def test_a_run_stands_for_the_best_of_its_last_stage_that_has_one(tmp_path: Path) -> None:
    for stage in ("stage2_b", "stage10_j"):
        best = tmp_path / stage / "checkpoints" / "best" / "pretrained_model"
        best.mkdir(parents=True)
        (best / "config.json").touch()
    (tmp_path / "stage11_k" / "checkpoints").mkdir(parents=True)  # begun
    assert folder_of(tmp_path) == tmp_path / "stage10_j" / "checkpoints" / "best" / "pretrained_model"
    assert folder_of(tmp_path / "stage2_b") == tmp_path / "stage2_b" / "checkpoints" / "best" / "pretrained_model"


def test_what_is_no_checkpoint_of_ours_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="must be a checkpoint's folder"):
        SmolVLAPolicyWrapper.from_pretrained(tmp_path / "nothing" / "there")
    with pytest.raises(FileNotFoundError, match=r"outputs/misspelt must be a checkpoint's folder, .* of the hub: "):
        SmolVLAPolicyWrapper.from_pretrained("outputs/misspelt")  # might be a repository of a user `outputs`
    shutil.copytree(checkpoint, tmp_path / "best")
    (tmp_path / "best" / "pretrained_model" / "tasks.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"tasks.json must be there"):
        SmolVLAPolicyWrapper.from_pretrained(tmp_path / "best")
