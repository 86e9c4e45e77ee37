"""What is kept of earlier tasks for replay: how much, which part, and that nothing else is replayed."""

import json
import shutil
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import interrupted_in_step
from stages import changed, run

from kuavo_train.compose import compose_run
from kuavo_train.config import ReplayConfig, RunConfig
from kuavo_train.data.batch import Origin
from kuavo_train.data.clip_sampler import ClipOrder
from kuavo_train.data.normalization import fit_normalization
from kuavo_train.data.replay.buffer import Kept, choose, kept_count
from kuavo_train.data.replay.phases import phases_of
from kuavo_train.data.sampler import Order, SampleOrder
from kuavo_train.data.task import Task, open_task
from kuavo_train.errors import ConfigError
from kuavo_train.reporting.run_checks import run_checks
from kuavo_train.runs.run_folder import StageFolder, stage_folder
from kuavo_train.runs.stored_run import StoredRun
from kuavo_train.stage.description import describe
from kuavo_train.stage.preflight import examine_stage
from kuavo_train.study import compose_cells

Configs = Callable[..., list[RunConfig]]
SHARES = {"moving_grasp": 0.25, "weighing": 0.75}


@pytest.fixture(scope="module")
def tasks(configs: list[RunConfig]) -> list[Task]:
    """Two tasks, of three training episodes and two held-out ones each."""
    return [open_task(config.stage, config.data) for config in configs[:2]]


def many(task: Task, episodes: int) -> Task:
    """The task as if it had so many training episodes; their rows are not looked at."""
    return replace(task, train_episodes=tuple(range(episodes)), bounds=np.tile([[0, 10]], (episodes, 1)))


def orders(tasks: list[Task], kept: Mapping[str, Kept]) -> list[Order]:
    about: dict[str, Any] = {"seed": 0, "stage": 2, "tasks": tasks, "shares": SHARES, "batch_size": 8, "kept": kept}
    return [SampleOrder(**about), ClipOrder(**about, depth=2, stride=3)]


@pytest.mark.parametrize(
    ("share", "total", "count"),
    [(0.02, 56, 1), (0.02, 200, 4), (0.02, 4, 1), (0.25, 10, 3), (0.5, 3, 2), (0.29, 100, 29), (1, 7, 7), (None, 7, 7)],
)
def test_the_share_is_rounded_and_one_episode_is_always_kept(share: float | None, total: int, count: int) -> None:
    assert kept_count(share, total) == count


def test_the_choice_is_a_function_of_seed_and_task_and_a_smaller_buffer_lies_within_a_larger(tasks: list[Task]) -> None:
    task = many(tasks[0], 50)
    small, large = (choose(task, ReplayConfig(share), 0).episodes for share in (0.1, 0.4))
    assert (len(small), len(large)) == (5, 20)
    assert set(small) < set(large)
    assert choose(task, ReplayConfig(0.1), 0).episodes == small
    assert choose(task, ReplayConfig(0.1), 1).episodes != small
    assert choose(replace(task, name="other"), ReplayConfig(0.1), 0).episodes != small


def test_what_is_kept_what_is_not_and_what_is_held_out_are_disjoint_and_all_there_is(tasks: list[Task]) -> None:
    for task in tasks:
        kept = choose(task, ReplayConfig(0.3), 0)
        left = set(task.train_episodes) - set(kept.episodes)
        parts = [set(kept.episodes), left, set(task.held_out_episodes)]
        assert all(parts)
        assert sum(map(len, parts)) == len(set.union(*parts)) == len(task.bounds)
        assert (kept.frames, kept.of_frames, kept.of_episodes) == (14, 42, 3)


def test_only_what_is_kept_is_drawn_as_often_as_the_share_says_and_all_of_it_alike(tasks: list[Task]) -> None:
    kept = choose(tasks[0], ReplayConfig(0.3), 0)
    for order in orders(tasks, {"moving_grasp": kept}):
        draws = [draw for number in range(84) for draw in order.batch(number)]
        replayed = [draw.row for draw in draws if draw.task == 0]
        assert len(replayed) == 0.25 * len(draws)
        assert set(tasks[0].episode[replayed]) == set(kept.episodes)
        times = np.unique(replayed, return_counts=True)[1]
        assert len(times) == kept.frames == 14
        assert times.max() - times.min() <= 2  # 168 samples, twelve passes; streams are not all at the end of one
        assert set(tasks[1].train_episodes) == {int(tasks[1].episode[draw.row]) for draw in draws if draw.task == 1}


def test_an_epoch_of_the_new_task_is_as_long_whatever_is_kept_of_the_others(tasks: list[Task]) -> None:
    kept = {"moving_grasp": choose(tasks[0], ReplayConfig(0.3), 0)}
    for few, all_ in zip(orders(tasks, kept), orders(tasks, {}), strict=True):
        assert few.steps_per_epoch("weighing", 1) == all_.steps_per_epoch("weighing", 1)


def test_the_audit_refuses_an_episode_that_was_not_kept(tasks: list[Task]) -> None:
    kept = choose(tasks[0], ReplayConfig(0.3), 0)
    (other, *_) = set(tasks[0].train_episodes) - set(kept.episodes)
    order, _ = orders(tasks, {"moving_grasp": kept})
    counts = [[{0: 25, 1: 75}]]
    audit = order.audit(counts, [{0: list(kept.episodes), 1: list(tasks[1].train_episodes)}])
    assert audit["kept"] == {
        "moving_grasp": {"episodes": list(kept.episodes), "frames": 14, "of_frames": 42, "of_episodes": 3}
    }
    assert audit["frames_drawn_not_kept"] == 0
    assert audit["passes"] == {"moving_grasp": 25 / 14, "weighing": 75 / 42}
    with pytest.raises(RuntimeError, match=rf"only what is kept of moving_grasp must be replayed, got .*\[{other}\]"):
        order.audit(counts, [{0: [*kept.episodes, other]}])


def of_lengths(task: Task, lengths: list[int], root: Path, action: np.ndarray | None = None) -> Task:
    """The task with training episodes of so many frames, and another dataset's folder."""
    ends = np.cumsum(lengths)
    return replace(
        task,
        recording=replace(task.recording, root=root),
        bounds=np.stack([ends - lengths, ends], axis=1),
        episode=np.repeat(np.arange(len(lengths)), lengths),
        train_episodes=tuple(range(len(lengths))),
        held_out_episodes=(),
        action=np.zeros((ends[-1], len(task.action_names)), dtype=np.float32) if action is None else action,
    )


def write_subgoals(root: Path, frames: list[dict[str, int]]) -> None:
    lines = [json.dumps({"episode_index": episode, "subgoal_frames": each}) for episode, each in enumerate(frames)]
    (root / "kuavo_sim_episodes.jsonl").write_text("\n".join(lines) + "\n")


def test_phases_are_those_between_the_recordings_sub_goals(tasks: list[Task], tmp_path: Path) -> None:
    task = of_lengths(tasks[0], [6, 4], tmp_path)
    write_subgoals(tmp_path, [{"picked": 2, "placed": 6}, {"picked": 1, "placed": 3}])
    phases = phases_of(task)
    assert (phases.source, phases.of_row.tolist()) == ("sub-goals", [0, 0, 1, 1, 1, 1, 0, 1, 1, 2])
    write_subgoals(tmp_path, [{"picked": 2, "placed": 6}])  # not of all: then none are gone by
    assert phases_of(task).source == "actions"
    (tmp_path / "kuavo_sim_episodes.jsonl").write_text('{"episode_index": 0, "subgoal_frames": {"picked": "soon"}}\n')
    with pytest.raises(ConfigError, match=r"kuavo_sim_episodes.jsonl must hold .* subgoal_frames .* ValueError"):
        phases_of(task)


def test_without_sub_goals_phases_change_where_a_claw_or_the_arms_speed_does(tasks: list[Task], tmp_path: Path) -> None:
    names = tasks[0].action_names
    action = np.zeros((40, len(names)), dtype=np.float32)
    claw, joint = names.index("left_claw"), names.index("zarm_l1_link")
    for first in (0, 20):
        action[first + 8 : first + 15, claw] = 1  # closes, opens again
        action[[first + 3, first + 12], claw] = 0.5  # is no switch, from either side
        action[first + 10 : first + 20, joint] = 0.1 * np.arange(10)  # moves in the second half
    phases = phases_of(of_lengths(tasks[0], [20, 20], tmp_path, action))
    assert phases.source == "actions"
    of_episode = phases.of_row.reshape(2, 20)
    assert of_episode[0].tolist() == of_episode[1].tolist()
    assert of_episode[0, :8].tolist() == [0] * 8  # open, slow
    assert len(set(of_episode[0])) == phases.count == 4  # closed and slow, closed and fast, open again and fast
    assert {int(of_episode[0, 8]), int(of_episode[0, 13]), int(of_episode[0, 17])} == {1, 2, 3}


def test_episodes_are_chosen_so_that_together_they_are_in_all_phases_alike(tasks: list[Task], tmp_path: Path) -> None:
    """Most episodes are nearly all approach; those few that are all placing make up for it."""
    frames = [{"picked": 9}] * 12 + [{"picked": 1}] * 4
    task = of_lengths(tasks[0], [10] * 16, tmp_path)
    write_subgoals(tmp_path, frames)
    for share in (0.125, 0.25):
        kept = choose(task, ReplayConfig(share, select="phase"), 0)
        first, second = kept.found["frames_of_phases"]
        assert first == second == kept.frames / 2
        assert kept.found["phases"] == "sub-goals"
    small, large = (choose(task, ReplayConfig(share, select="phase"), 0).episodes for share in (0.125, 0.25))
    assert set(small) < set(large)
    uneven = [sum(frames[e]["picked"] for e in choose(task, ReplayConfig(0.25), seed).episodes) for seed in range(4)]
    assert {total / 40 for total in uneven} != {0.5}


def test_the_episodes_that_are_known_least_are_kept(tasks: list[Task]) -> None:
    task, config = tasks[0], ReplayConfig(0.6, select="loss")
    low, high, middle = task.train_episodes
    kept = choose(task, config, 0, {low: 0.1, high: 0.9, middle: 0.5})
    assert kept.episodes == tuple(sorted([high, middle]))
    read = Kept.from_json(json.loads(json.dumps(kept.to_json())))
    assert read == kept
    read.check(task, config, 0, "here")
    for other in ({str(low): 1.0}, {str(high): 0.0}):
        edited = replace(read, found={"losses": {**read.found["losses"], **other}})
        with pytest.raises(ConfigError, match="here must be the choice for the data of moving_grasp as they are now"):
            edited.check(task, config, 0, "here")
    with pytest.raises(ConfigError, match="here must be the choice"):
        replace(read, found={}).check(task, config, 0, "here")


def origin_of(task: Task, rows: Sequence[int], place: int) -> Origin:
    episode, frame = (torch.from_numpy(column[list(rows)]) for column in (task.episode, task.frame))
    return Origin(torch.full_like(episode, place), episode, frame, torch.zeros_like(episode))


def test_single_frames_may_be_kept_and_they_alone_are_drawn(tasks: list[Task]) -> None:
    task = tasks[0]
    kept, larger = (choose(task, ReplayConfig(share, unit="frame"), 0) for share in (0.1, 0.5))
    rows = kept.rows(task)
    assert (len(rows), kept.frames, kept.of_frames) == (4, 4, 42)
    assert set(rows) < set(larger.rows(task)) < set(task.train_rows)
    assert set(task.episode[larger.rows(task)]) == set(larger.episodes) == set(task.train_episodes)
    assert Kept.from_json(json.loads(json.dumps(larger.to_json()))) == larger
    order, _ = orders(tasks, {task.name: kept})
    draws = [draw for number in range(20) for draw in order.batch(number)]
    drawn, times = np.unique([draw.row for draw in draws if draw.task == 0], return_counts=True)
    assert (drawn.tolist(), times.tolist()) == (rows.tolist(), [10] * 4)  # a quarter of 160


def test_frames_that_are_not_kept_are_counted_and_refused(tasks: list[Task]) -> None:
    task = tasks[0]
    kept = choose(task, ReplayConfig(0.3, unit="frame"), 0)
    order, _ = orders(tasks, {task.name: kept})
    others = sorted(set(task.train_rows) - set(kept.rows(task)))
    assert order.not_kept(origin_of(task, kept.rows(task), 0)) == {}
    assert order.not_kept(origin_of(task, [*kept.rows(task), *others[:3]], 0)) == {0: 3}
    assert (
        order.not_kept(origin_of(tasks[1], tasks[1].train_rows, 1)) == {}
    )  # the new task, of which nothing is left out
    with pytest.raises(RuntimeError, match="only what is kept of moving_grasp must be replayed, got 5 other frames"):
        order.audit([[{0: 25, 1: 75}]], [{}], not_kept=[{0: 3}, {0: 2}])


def test_frames_are_balanced_over_phases_as_far_as_these_go(tasks: list[Task], tmp_path: Path) -> None:
    task = of_lengths(tasks[0], [10] * 4, tmp_path)
    task = replace(task, frame=np.tile(np.arange(10), 4))
    write_subgoals(tmp_path, [{"picked": 7, "placed": 9}] * 4)
    frames = {
        share: choose(task, ReplayConfig(share, "frame", "phase"), 0).found["frames_of_phases"] for share in (0.3, 0.6)
    }
    assert frames == {0.3: [4, 4, 4], 0.6: [12, 8, 4]}
    assert choose(task, ReplayConfig(0.3, "frame"), 0).found == {}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["replay.buffer=0"], r"replay.buffer must be a share in \(0, 1\], or null, got 0"),
        (["replay.buffer=1.5"], r"replay.buffer must be a share in \(0, 1\], or null, got 1.5"),
        (["replay.unit=second"], "replay.unit must be one of episode, frame, got 'second'"),
        (["replay.select=best"], "replay.select must be one of random, phase, loss, got 'best'"),
        (
            ["replay.unit=frame", "replay.select=loss"],
            "replay.select must be random or phase with replay.unit=frame.*loss",
        ),
        (["replay.buffer=0.5", "strategy=sequential"], r"replay.buffer must be null or 1 .*sequential.*, got 0.5"),
        (["replay.buffer=0.5", "strategy=joint"], r"replay.buffer must be null or 1 where nothing is .*joint"),
        (["replay.bufer=0.5"], "replay.bufer .*replay.buffer"),
    ],
)
def test_a_buffer_that_cannot_be_is_refused_by_name(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose_run(["learn=[moving_grasp]", *words])


def test_all_may_be_kept_under_every_strategy_and_a_part_where_ewc_replays() -> None:
    for words in (["replay.buffer=1", "strategy=joint"], ["replay.buffer=0.1", "strategy=ewc", "mixture=replay"]):
        (config,) = compose_run(["learn=[moving_grasp]", *words])
        assert config.replay.keeps_part == ("mixture=replay" in words)


def test_in_a_study_the_buffer_is_the_replaying_strategys_alone() -> None:
    words = ["learn=[moving_grasp]", "strategy=replay,sequential,joint", "seed=0", "replay.buffer=0.1"]
    _, _, cells = compose_cells(words)
    assert [cell.configs[0].replay.buffer for cell in cells] == [0.1, None, None]
    with pytest.raises(ConfigError, match=r"replay.buffer must be null or 1 where nothing is replayed"):
        compose_cells([*words, "mixture=own_task", "strategy=ewc"])


@pytest.fixture(scope="module")
def with_buffer(small_configs_in: Configs, tmp_path_factory: pytest.TempPathFactory) -> list[RunConfig]:
    """A run of three stages, of which the first is finished: one of three episodes is kept of each task."""
    words = "learn=[moving_grasp,weighing,placement]"
    outputs = tmp_path_factory.mktemp("buffer") / "outputs"
    configs = small_configs_in(outputs, words, replay={"buffer": 0.3}, policy={"mem_backprop_depth": 2})
    assert run(configs) == 0
    return configs


def copied(configs: list[RunConfig], folder: Path) -> list[RunConfig]:
    shutil.copytree(configs[0].outputs, folder / "outputs", symlinks=True)
    return [changed(config, outputs=str(folder / "outputs")) for config in configs]


def recorded(config: RunConfig) -> dict[str, Any]:
    return json.loads(stage_folder(config).buffer.read_text())


def audited(folder: StageFolder) -> dict[str, Any]:
    return json.loads((folder.path / "replay_audit.json").read_text())


def test_later_stages_replay_the_choice_on_record_and_a_resumed_one_too(
    with_buffer: list[RunConfig], tmp_path: Path
) -> None:
    configs = copied(with_buffer, tmp_path)
    first = open_task(configs[0].stage, configs[0].data)
    record = recorded(configs[0])
    assert record == choose(first, configs[0].replay, configs[0].seed).to_json()
    settings = {"replay.buffer": 0.3, "replay.unit": "episode", "replay.select": "random", "seed": 0}
    assert record["chosen_by"] == settings
    assert "kept" not in audited(stage_folder(configs[0]))
    of_record = {key: record[key] for key in ("episodes", "frames", "of_frames", "of_episodes")}
    with interrupted_in_step(2):
        assert run(configs, 1) == 128 + signal.SIGTERM
    other = [max(set(first.train_episodes) - set(record["episodes"]))]
    stage_folder(configs[0]).buffer.write_text(json.dumps({**record, "episodes": other}))
    with pytest.raises(ConfigError, match="must be the choice for the data of moving_grasp as they are now"):
        run(configs, 1, resume=True)
    stage_folder(configs[0]).buffer.write_text(json.dumps(record))
    assert run(configs, 1, resume=True) == 0
    audit = audited(stage_folder(configs[1]))
    assert audit["kept"] == {"moving_grasp": of_record}
    assert audit["passes"]["moving_grasp"] == audit["drawn"]["moving_grasp"]["frames"] / 14
    assert run(configs, 2) == 0
    assert set(audited(stage_folder(configs[2]))["kept"]) == {"moving_grasp", "weighing"}
    stored = StoredRun.open(configs[0].run_folder)
    kept = {"buffer": 0.3, "unit": "episode", "select": "random"}  # and no share, where none is set
    assert stored.record.strategy_settings["replay"] == kept
    (check,) = (check for check in run_checks(stored) if check["name"].startswith("Only what was kept"))
    assert (check["passed"], check["detail"]) == (True, "frames kept: moving_grasp 14 of 42, weighing 14 of 42")
    folder = stage_folder(configs[2]).path
    for guilty, passed in ((3, False), (None, False)):
        (folder / "replay_audit.json").write_text(
            json.dumps({**audited(stage_folder(configs[2])), "frames_drawn_not_kept": guilty})
        )
        checks = run_checks(StoredRun.open(configs[0].run_folder))
        assert [check["passed"] for check in checks if check["name"].startswith("Only what was kept")] == [passed]


def test_the_statistics_are_those_of_all_training_episodes(with_buffer: list[RunConfig]) -> None:
    fitted = fit_normalization([open_task(config.stage, config.data) for config in with_buffer], "joint")
    assert json.loads((with_buffer[0].run_folder / "normalization.json").read_text())["hash"] == fitted.hash


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"replay": {"buffer": 0.6}}, r"run smoke must keep .*: replay.buffer \(was 0.3, is 0.6\)"),
        ({"replay": {"buffer": None}}, r"run smoke must keep .*: replay.buffer \(was 0.3, is null\)"),
    ],
)
def test_a_run_keeps_its_buffer(
    with_buffer: list[RunConfig], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    configs = copied(with_buffer, tmp_path)
    with pytest.raises(ConfigError, match=message):
        run(configs, 1, **change)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda r: r["chosen_by"].update({"replay.buffer": 0.6}), r"replay.buffer must be 0.6, by which .* got 0.3"),
        (lambda r: r["chosen_by"].update(seed=4), r"seed must be 4, by which .*replay_buffer.json was chosen, got 0"),
        (
            lambda r: r.update(episodes=[max(set(range(5)) - set(r["episodes"]))]),
            r"replay_buffer.json must be the choice for the data of moving_grasp as they are now, got",
        ),
        (lambda r: r.pop("frames"), r"replay_buffer.json lacks 'frames'"),
    ],
)
def test_a_recorded_choice_that_disagrees_is_refused_by_name(
    with_buffer: list[RunConfig], tmp_path: Path, edit: Callable[[dict[str, Any]], Any], message: str
) -> None:
    configs = copied(with_buffer, tmp_path)
    record = recorded(configs[0])
    edit(record)
    stage_folder(configs[0]).buffer.write_text(json.dumps(record))
    with pytest.raises(ConfigError, match=message):
        run(configs, 1)
    assert stage_folder(configs[1]).status == "absent"


def test_a_choice_that_is_gone_is_refused_not_made_anew(with_buffer: list[RunConfig], tmp_path: Path) -> None:
    configs = copied(with_buffer, tmp_path)
    stage_folder(configs[0]).buffer.unlink()
    message = r"replay_buffer.json must be there for replay.buffer=0.3; delete .*stage1_moving_grasp to run that stage"
    with pytest.raises(ConfigError, match=message):
        run(configs, 1)


def test_preflight_shows_what_is_kept_of_how_much(with_buffer: list[RunConfig]) -> None:
    findings = examine_stage(with_buffer[1], [config.stage for config in with_buffer])
    assert findings.problems == []
    line = "  replay   1 of 3 training episodes are kept, 14 of 42 frames (random)"
    assert line in describe(findings).splitlines()
    kept = {"episodes": 1, "of_episodes": 3, "frames": 14, "of_frames": 42, "unit": "episode", "chosen": "random"}
    assert [task["kept"] for task in findings.facts["tasks"]] == [kept] * 3
    early = examine_stage(changed(with_buffer[1], run="early"), [config.stage for config in with_buffer])
    assert line in describe(early).splitlines()
    assert not [problem for problem in early.problems if "replay" in problem]  # though nothing is on record yet
    all_kept = [changed(config, run="all", replay={"buffer": 1.0}) for config in with_buffer]
    assert "are kept" not in describe(examine_stage(all_kept[0], [config.stage for config in all_kept]))


def test_pictures_are_decoded_of_kept_and_held_out_episodes_alone(with_buffer: list[RunConfig], tmp_path: Path) -> None:
    configs = [changed(c, data={"cache_root": str(tmp_path / "cache")}) for c in copied(with_buffer, tmp_path)]
    assert run(configs, 1, training={"max_steps": 1}) == 0
    task = open_task(configs[0].stage, configs[0].data)
    needed = sorted([*recorded(configs[0])["episodes"], *task.held_out_episodes])
    filled = [
        np.flatnonzero(np.frombuffer(path.read_bytes(), dtype=np.uint8)).tolist()
        for path in (tmp_path / "cache").rglob("moving_grasp-*/filled")
    ]
    assert filled == [needed]


def test_what_a_stage_knows_least_of_its_own_task_is_measured_when_it_ends(
    small_configs_in: Configs, tmp_path: Path
) -> None:
    configs = small_configs_in(tmp_path / "outputs", replay={"buffer": 0.3, "select": "loss"})
    early = describe(examine_stage(configs[0], [config.stage for config in configs]))
    assert "  replay   1 of 3 training episodes are kept, chosen by loss when the task has been learnt" in early
    assert run(configs) == 0
    record = recorded(configs[0])
    losses = {int(episode): loss for episode, loss in record["found"]["losses"].items()}
    task = open_task(configs[0].stage, configs[0].data)
    assert sorted(losses) == sorted(task.train_episodes)
    assert len(set(losses.values())) == 3
    assert record["episodes"] == [max(losses, key=lambda episode: losses[episode])]
    assert run(configs, 1, training={"max_steps": 1}) == 0
    assert audited(stage_folder(configs[1]))["kept"]["moving_grasp"]["episodes"] == record["episodes"]


def test_a_stage_that_drew_what_is_not_kept_fails(
    small_configs_in: Configs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"replay": {"buffer": 0.1, "unit": "frame"}, "policy": {"mem_backprop_depth": 0}}
    configs = small_configs_in(tmp_path / "outputs", **settings, training={"max_steps": 2, "batch_size": 8})
    assert run(configs) == 0
    assert sum(map(len, recorded(configs[0])["frame_numbers"].values())) == 4
    findings = examine_stage(configs[1], [config.stage for config in configs])
    assert "4 of 42 frames are kept (random), of " in describe(findings)
    monkeypatch.setattr(SampleOrder, "_shuffled", lambda order, place, _: order.tasks[place].train_rows)
    with pytest.raises(RuntimeError, match=r"only what is kept of moving_grasp must be replayed, got"):
        run(configs, 1)
    assert stage_folder(configs[1]).status == "failed"
    assert "only what is kept" in stage_folder(configs[1]).about["reason"]
    monkeypatch.undo()
    shutil.rmtree(stage_folder(configs[1]).path)
    assert run(configs, 1) == 0
    assert audited(stage_folder(configs[1]))["frames_drawn_not_kept"] == 0


def test_single_frames_are_refused_where_a_memory_is_trained_through_time(with_buffer: list[RunConfig]) -> None:
    config = changed(with_buffer[0], run="frames", replay={"unit": "frame"})
    problems = examine_stage(config, [each.stage for each in with_buffer]).problems
    assert [problem for problem in problems if "replay.unit must be episode where a memory is trained" in problem]
    assert any("(policy.mem_backprop_depth=2)" in problem and problem.endswith("got 'frame'") for problem in problems)
