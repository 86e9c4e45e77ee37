"""What inspect_data says of a dataset is what is in it."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from commands import Here, outputs_of
from PIL import Image

from kuavo_train.config import RunConfig
from kuavo_train.data.inspection import duplicate_episodes, idle_frames, joint_statistics, overview
from kuavo_train.data.task import Task, open_task


@pytest.fixture
def task(configs: list[RunConfig]) -> Task:
    return open_task(configs[0].stage, configs[0].data)


def test_statistics_are_per_named_joint(task: Task) -> None:
    rows = joint_statistics(task, task.action_names, task.action)
    assert [row.name for row in rows] == list(task.action_names)
    assert rows[2].mean == pytest.approx(task.action[:, 2].mean(), abs=1e-5)
    assert (rows[2].min, rows[2].max) == (task.action[:, 2].min(), task.action[:, 2].max())
    assert [row.name for row in rows if row.jumps is None] == ["left_claw", "right_claw"]


def test_a_jump_is_counted_within_an_episode_and_not_between_two(task: Task) -> None:
    jumping = task.action.copy()
    jumping[task.bounds[1, 0] + 3 :, 4] += 50  # the rest of the recording is elsewhere: one step of 50 in episode 1
    rows = joint_statistics(replace(task, action=jumping), task.action_names, jumping)
    assert rows[4].jumps == [(1, 3)]
    assert rows[4].largest_step == pytest.approx(50, abs=1)
    jumping = task.action.copy()
    jumping[task.bounds[1, 0] :, 4] += 50
    assert joint_statistics(replace(task, action=jumping), task.action_names, jumping)[4].jumps == []


def test_the_overview_says_where_a_jump_is(task: Task) -> None:
    assert "5 rad/s: none" in overview(task)
    jumping = task.action.copy()
    jumping[task.bounds[1, 0] + 3, 2:5] += 50  # there and back again, in three joints
    text = overview(replace(task, action=jumping))
    assert "5 rad/s: action zarm_l3_link in episode 1, frame 3; action zarm_l3_link in episode 1, frame 4;" in text
    assert "; and 1 more" in text


def test_a_joint_that_hardly_moves_does_not_jump(task: Task) -> None:
    trembling = task.action.copy()
    trembling[:, 4] = np.resize([0.0, 0.01], len(trembling))
    assert joint_statistics(task, task.action_names, trembling)[4].jumps == []


def test_idle_frames_are_counted_and_placed(task: Task) -> None:
    assert idle_frames(task).total == 0
    state, action = task.state.copy(), task.action.copy()
    for first, end in task.bounds:
        for values in (state, action):
            values[first : first + 4] = values[first]
            values[end - 3 : end] = values[end - 1]
    idle = idle_frames(replace(task, state=state, action=action))
    assert (idle.total, idle.frames) == (5 * 5, 70)
    assert (idle.leading, idle.trailing) == (3, 2)


def test_an_episode_recorded_twice_is_found(task: Task) -> None:
    assert duplicate_episodes(task) == []
    state, action = task.state.copy(), task.action.copy()
    for values in (state, action):
        values[slice(*task.bounds[4])] = values[slice(*task.bounds[1])]
    assert duplicate_episodes(replace(task, state=state, action=action)) == [[1, 4]]
    state[task.bounds[4, 0], 0] = np.nextafter(state[task.bounds[4, 0], 0], 9)
    assert duplicate_episodes(replace(task, state=state, action=action)) == []


def test_the_command_prints_the_numbers_and_saves_a_sheet(small_run: Callable[..., list[str]], here: Here) -> None:
    overrides = small_run("learn=null")
    done = here("kuavo_train.inspect_data", "task=tasks/task4_sorting", *overrides, "--episode=3")
    assert done.returncode == 0, done.stderr
    assert "sorting: 5 episodes of 1.4 to 1.4 s, median 1.4 s, 10 Hz" in done.stdout
    assert "cmd_pos_yaw" in done.stdout
    assert "episodes recorded twice: none" in done.stdout
    with Image.open(outputs_of(overrides) / "inspect" / "sorting_episode3.png") as sheet:
        assert min(sheet.size) > 500
