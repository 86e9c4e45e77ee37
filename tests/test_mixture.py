"""Which frames are drawn, in which order: a pure function of (seed, stage, position), with exact shares."""

import numpy as np
import pytest
import torch
from small_datasets import TASK_NAMES

from kuavo_train.compose import compose_run, stages_to_run
from kuavo_train.config import RunConfig
from kuavo_train.data.dataset import MixedDataset
from kuavo_train.data.images.frames import DecodedFrames
from kuavo_train.data.mixture import Mixture, dealt_out, mixture_of
from kuavo_train.data.normalization import Normalization, fit_normalization
from kuavo_train.data.replay.quota import Quota
from kuavo_train.data.sampler import Draw, SampleOrder, StepSampler
from kuavo_train.data.task import Task, open_task

STAGE_SHARES = [mixture_of(config).shares({config.stage.name: 1}) for config in compose_run()]
SKIPPED = {"moving_grasp": 0.1, "weighing": 0.1, "sorting": 0.8}


def test_a_share_of_nothing_is_none_that_others_could_get() -> None:
    assert dealt_out({"moving_grasp": 0.0, "weighing": 1.0}, {"moving_grasp"})[1] == {}
    assert dealt_out({"moving_grasp": 0.5, "weighing": 0.5}, {"moving_grasp"}) == (
        {"weighing": 1},
        {"moving_grasp": 0.5},
    )


@pytest.fixture(scope="module")
def tasks(configs: list[RunConfig]) -> list[Task]:
    return [open_task(config.stage, config.data) for config in configs]


@pytest.fixture(scope="module")
def normalization(tasks: list[Task]) -> Normalization:
    return fit_normalization(tasks, "joint")


def order_of(
    tasks: list[Task],
    shares: dict[str, float],
    *,
    seed: int = 0,
    stage: int = 4,
    batch_size: int = 8,
    processes: int = 1,
) -> SampleOrder:
    chosen = [task for task in tasks if task.name in shares]
    about = {"tasks": chosen, "shares": shares, "batch_size": batch_size, "processes": processes}
    return SampleOrder(seed=seed, stage=stage, **about)


@pytest.mark.parametrize("shares", [*STAGE_SHARES, SKIPPED, {"a": 1 / 3, "b": 2 / 3}, {"a": 0.137, "b": 0.863}])
def test_after_any_number_of_samples_no_task_is_a_whole_sample_off_its_share(shares: dict[str, float]) -> None:
    quota = Quota(list(shares.values()))
    drawn, _ = quota.deal(np.arange(5000))
    n = np.arange(1, 5001)
    for task, share in enumerate(quota.shares):
        counts = np.cumsum(drawn == task)
        assert np.all(np.abs(counts - float(share) * n) < 1 - 1e-9)
        assert float(share) == pytest.approx(list(shares.values())[task], abs=1e-4)


def test_what_is_not_replayed_is_the_new_tasks_by_passes_times_frames() -> None:
    frames = {"old": 70, "one": 100, "other": 50}
    assert Mixture({"one": 4, "other": 2}).shares(frames) == {"one": 0.8, "other": 0.2}
    assert Mixture({"one": 4, "other": 2}, {"old": 0.3}).shares(frames) == {"old": 0.3, "one": 0.56, "other": 0.14}
    assert Mixture({"one": 4}, {"old": 0.1, "other": 0.2}).shares(frames) == {"old": 0.1, "other": 0.2, "one": 0.7}


def test_joint_is_a_mixture_in_which_every_task_is_new() -> None:
    apart, (together,) = compose_run(), stages_to_run(compose_run(["strategy=joint"]))
    assert [mixture_of(config).learns for config in apart] == [(name,) for name in TASK_NAMES]
    assert mixture_of(together).learns == TASK_NAMES
    assert mixture_of(together).passes == {
        name: mixture_of(own).passes[name] for own in apart for name in mixture_of(own).learns
    }
    assert (mixture_of(together).leading, mixture_of(together).replayed) == (TASK_NAMES[0], {})


def test_frames_of_a_task_come_without_replacement_pass_by_pass(tasks: list[Task]) -> None:
    order = order_of(tasks, STAGE_SHARES[3])
    draws = order(0, 2000)
    for place, task in enumerate(order.tasks):
        rows = draws[draws[:, 0] == place, 1]
        size = len(task.train_rows)
        passes = [rows[first : first + size] for first in range(0, len(rows) - size + 1, size)]
        assert len(passes) >= 4
        for rows_of_pass in passes:
            assert sorted(rows_of_pass) == list(task.train_rows)
        assert list(passes[0]) != list(passes[1])


def test_the_order_is_a_function_of_seed_stage_and_position(tasks: list[Task]) -> None:
    shares = STAGE_SHARES[2]
    whole = order_of(tasks, shares)(0, 300)
    pieces = np.concatenate([order_of(tasks, shares)(first, first + 60) for first in range(0, 300, 60)])
    assert np.array_equal(whole, pieces)
    np.random.seed(1)  # the global random state has no say
    torch.manual_seed(1)
    assert np.array_equal(whole, order_of(tasks, shares)(0, 300))
    assert not np.array_equal(whole, order_of(tasks, shares, seed=1)(0, 300))
    assert not np.array_equal(whole, order_of(tasks, shares, stage=3)(0, 300))


def test_held_out_episodes_are_never_drawn(tasks: list[Task]) -> None:
    order = order_of(tasks, STAGE_SHARES[3])
    for place, row in order(0, 3000):
        task = order.tasks[place]
        assert task.episode[row] in task.train_episodes
        assert task.episode[row] not in task.held_out_episodes


def test_an_epoch_passes_once_over_the_current_task_whatever_is_replayed(tasks: list[Task]) -> None:
    for shares in STAGE_SHARES:
        current = list(shares)[-1]
        order = order_of(tasks, shares)
        steps = order.steps_per_epoch(current, 1)
        draws = order(0, steps * 8)
        place = [task.name for task in order.tasks].index(current)
        rows = draws[draws[:, 0] == place, 1]
        assert set(rows) == set(order.tasks[place].train_rows)
        assert len(rows) - len(set(rows)) < 8


def test_several_processes_share_the_order_of_one(tasks: list[Task]) -> None:
    alone = StepSampler(order_of(tasks, STAGE_SHARES[1]), start=3, stop=6)
    halves = order_of(tasks, STAGE_SHARES[1], batch_size=4, processes=2)
    pair = [StepSampler(halves, start=3, stop=6, process=rank) for rank in range(2)]
    together = [first + second for first, second in zip(*pair, strict=True)]
    assert together == list(alone)


def test_the_number_of_workers_does_not_change_the_batches(tasks: list[Task], normalization: Normalization) -> None:
    order = order_of(tasks, STAGE_SHARES[3], batch_size=4)
    frames = [DecodedFrames(task, image_size=None, video_backend="pyav") for task in order.tasks]
    dataset = MixedDataset(order.tasks, frames, normalization, actions=range(4))
    batches = []
    for workers in (0, 2):
        sampler = StepSampler(order, start=0, stop=3)
        batches.append(list(dataset.batches(sampler, num_workers=workers, pin_memory=False)))
    for alone, parallel in zip(*batches, strict=True):
        assert torch.equal(alone.origin.frame, parallel.origin.frame)
        assert torch.equal(alone.inputs["action"], parallel.inputs["action"])
        assert alone.clip == parallel.clip == 1
        pictures = [each.inputs["observation.images.head_cam_h"] for each in (alone, parallel)]
        assert torch.equal(*pictures)


@pytest.mark.parametrize(("actions", "observations"), [(range(6), (0,)), (range(-1, 5), (-1, 0))])
def test_a_batch_holds_what_the_dataset_holds(
    tasks: list[Task], normalization: Normalization, actions: range, observations: tuple[int, ...]
) -> None:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    task = tasks[3]
    seen = dict.fromkeys(["observation.state", *task.cameras], observations) if len(observations) > 1 else {}
    steps = {"action": actions, **seen}
    reference = LeRobotDataset(
        "local/x",
        root=task.root,
        video_backend="pyav",
        return_uint8=True,
        delta_timestamps={key: [step / task.recording.fps for step in offsets] for key, offsets in steps.items()},
    )
    frames = [DecodedFrames(each, image_size=None, video_backend="pyav") for each in tasks]
    dataset = MixedDataset(tasks, frames, normalization, actions=actions, observations=observations)
    rows = [0, 5, 12, 13, 14, 30]
    batch = dataset.fetch([Draw(3, row) for row in rows]).inputs
    for place, row in enumerate(rows):
        item = reference[row]
        assert torch.allclose(batch["observation.state"][place], item["observation.state"])
        assert torch.equal(batch["action_is_pad"][place], item["action_is_pad"])
        assert torch.allclose(batch["action"][place], item["action"])
        for camera in task.cameras:
            assert torch.equal(batch[camera][place], item[camera])


def test_an_action_chunk_costs_no_image_but_its_first(tasks: list[Task], normalization: Normalization) -> None:
    asked = []

    def pictures(camera: str, rows: np.ndarray) -> torch.Tensor:
        asked.append((camera, rows.tolist()))
        return torch.zeros((len(rows), 3, 8, 8), dtype=torch.uint8)

    dataset = MixedDataset(tasks[:2], [pictures] * 2, normalization, actions=range(6))
    batch = dataset.fetch([Draw(0, 3), Draw(1, 20), Draw(0, 9)]).inputs
    assert batch["action"].shape[1] == 6
    assert asked == [(camera, rows) for rows in ([3, 9], [20]) for camera in tasks[0].cameras]


def test_a_task_without_base_motion_masks_those_dimensions(tasks: list[Task], normalization: Normalization) -> None:
    frames = [DecodedFrames(task, image_size=None, video_backend="pyav") for task in tasks]
    dataset = MixedDataset(tasks, frames, normalization, actions=range(4))
    batch = dataset.fetch([Draw(0, 3), Draw(3, 3)]).inputs
    assert batch["action"].shape == (2, 4, 20)
    assert batch["action_dim_is_pad"].tolist() == [[False] * 16 + [True] * 4, [False] * 20]
    names = normalization.space.action_names
    assert names[16:] == ("cmd_pos_x", "cmd_pos_y", "cmd_pos_yaw", "ctrl_change_cmd")


def test_the_audit_refuses_shares_that_were_not_drawn(tasks: list[Task]) -> None:
    order = order_of(tasks, {"moving_grasp": 0.2, "weighing": 0.8})
    audit = order.audit([[{0: 20, 1: 80}]], [{0: [1], 1: [2]}])
    assert audit["drawn"]["weighing"] == {"frames": 80, "share": 0.8}
    with pytest.raises(RuntimeError, match=r"replay share of moving_grasp must be 0.2, drawn 21 of 100"):
        order.audit([[{0: 21, 1: 79}]], [{}])
    held_out = tasks[0].held_out_episodes[0]
    with pytest.raises(RuntimeError, match="held-out episodes of moving_grasp must never be drawn"):
        order.audit([[{0: 20, 1: 80}]], [{0: [held_out]}])


def test_the_audit_refuses_episodes_that_are_set_apart_to_choose_by(tasks: list[Task]) -> None:
    apart = [task.with_choosing_episodes(1, 0) for task in tasks]
    order = order_of(apart, {"moving_grasp": 0.2, "weighing": 0.8})
    drawn = {int(apart[draw.task].episode[draw.row]) for draw in order.batch(0) if draw.task == 0}
    assert not drawn & set(apart[0].choosing_episodes)
    with pytest.raises(RuntimeError, match="held-out episodes of moving_grasp must never be drawn"):
        order.audit([[{0: 20, 1: 80}]], [{0: list(apart[0].choosing_episodes)}])


def test_the_fixture_has_all_tasks(tasks: list[Task]) -> None:
    assert tuple(task.name for task in tasks) == TASK_NAMES


def test_a_change_of_shares_holds_from_its_batch_on_and_every_task_goes_on_in_its_pass(tasks: list[Task]) -> None:
    shares, later = {"moving_grasp": 0.2, "weighing": 0.8}, {"moving_grasp": 0.4, "weighing": 0.6}
    order, unchanged = order_of(tasks, shares), order_of(tasks, shares)
    order.change_shares(later, batch=7)
    drawn, before = order(0, 400), unchanged(0, 400)
    start = 7 * order.batch_size
    assert np.array_equal(drawn[:start], before[:start])
    assert not np.array_equal(drawn[start:], before[start:])
    n = np.arange(1, 400 - start + 1)
    for place, share in enumerate(later.values()):
        assert np.all(np.abs(np.cumsum(drawn[start:, 0] == place) - share * n) < 1)
        rows = drawn[drawn[:, 0] == place, 1]
        size = len(order.tasks[place].train_rows)
        for first in range(0, len(rows) - size + 1, size):
            assert sorted(rows[first : first + size]) == list(order.tasks[place].train_rows)
    with pytest.raises(ValueError, match="shares must change after batch 7, got 7"):
        order.change_shares(shares, batch=7)


def test_the_sequence_is_the_same_whatever_the_number_of_processes_becomes(tasks: list[Task]) -> None:
    shares, later = {"moving_grasp": 0.2, "weighing": 0.8}, {"moving_grasp": 0.4, "weighing": 0.6}
    order = order_of(tasks, shares, batch_size=4, processes=2)  # now; the stage began with one process
    order.change_samples(4, batch=0)
    order.change_samples(8, batch=3)
    order.change_shares(later, batch=5)
    parts = [order.batch(number, process=rank) for number in (3, 4, 5, 6) for rank in range(2)]
    drawn = [(draw.task, draw.row) for part in parts for draw in part]
    assert [len(part) for part in parts] == [4] * 8
    assert drawn == [tuple(row) for row in order(12, 44)]
    assert drawn[:16] == [tuple(row) for row in order_of(tasks, shares)(12, 28)]  # 3 batches of 4 are done by then
    assert order.steps_per_epoch("weighing", 1) == -(-len(tasks[1].train_rows) // (0.6 * 8))
    counts = [[{0: 6, 1: 22}, {0: 6, 1: 10}]]
    audit = order.audit(counts, [{}])
    assert [(each["from_step"], each["declared"]) for each in audit["segments"]] == [(0, shares), (5, later)]
    order.audit([[{0: 4, 1: 8}, {0: 0, 1: 2}], [{0: 2, 1: 14}, {0: 6, 1: 8}]], [{}, {}])  # as two counted it
    with pytest.raises(RuntimeError, match=r"replay share of moving_grasp must be 0.2, drawn 7 of 28"):
        order.audit([[{0: 7, 1: 21}, {0: 6, 1: 10}]], [{}])
