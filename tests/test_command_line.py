"""The commands of the README, as a user types them."""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
from commands import Here, command, outputs_of
from forked import Forked, send, when

from kuavo_train.command_line import check_sweep, errors_in_one_line
from kuavo_train.errors import ConfigError
from kuavo_train.keys import parsed
from kuavo_train.training.learner import Learner

Overrides = Callable[..., list[str]]


def call(module: str, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(module, *arguments), cwd=cwd, capture_output=True, text=True, timeout=300, check=False
    )


def test_modules_of_ones_own_are_found_in_the_folder_of_the_command_and_nowhere_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "one_of_my_own.py").write_text("STATUS = 5")
    monkeypatch.chdir(tmp_path)
    before = sys.path[:]
    assert errors_in_one_line(lambda: importlib.import_module("one_of_my_own").STATUS) == 5
    assert sys.path == before


def test_all_stages_run_and_the_report_shows_the_numbers_of_the_matrix(
    small_run: Overrides, tmp_path: Path, here: Here, forked: Callable[..., Forked]
) -> None:
    overrides = small_run("learn=null")
    done = forked("kuavo_train.curriculum", *overrides, before=lambda: os.chdir(tmp_path)).wait()
    assert done.returncode == 0, done.stderr[-3000:]
    run = outputs_of(overrides) / "smoke"
    stages = ["stage1_moving_grasp", "stage2_weighing", "stage3_placement", "stage4_sorting"]
    assert [json.loads((run / stage / "stage.json").read_text())["status"] for stage in stages] == ["finished"] * 4
    matrix = json.loads((run / "report" / "matrix.json").read_text())
    ends = [json.loads(line) for line in (run / stages[3] / "validation.jsonl").read_text().splitlines()]
    losses = {record["task"]: record["loss"] for record in ends if record["kind"] == "end"}
    last_row = matrix["matrices"]["loss"]["rows"][-1]["values"]
    page = (run / "report" / "report.html").read_text()
    for task, loss in losses.items():
        assert last_row[task] == pytest.approx(loss), task
        assert re.search(rf"\b{loss:.3f}\b", page), task
    verdicts = {line.split()[0]: line for line in done.stdout.splitlines() if line.split()}
    for verdict in matrix["verdicts"]:
        assert (verdict["verdict"] or verdict["state"]) in verdicts[verdict["task"]]

    again = here("kuavo_train.curriculum", *overrides)
    assert again.returncode == 0, again.stderr[-3000:]
    assert again.stdout.count("is finished in") == 4

    refused = here("kuavo_train", "task=tasks/task2_weighing", *overrides)
    assert refused.returncode == 2
    assert "stage 2 (weighing) is finished" in refused.stderr


def test_ctrl_c_in_a_pipeline_ends_with_a_checkpoint_and_the_same_command_continues_with_resume(
    small_run: Overrides, here: Here, forked: Callable[..., Forked], monkeypatch: pytest.MonkeyPatch
) -> None:
    def press_ctrl_c_when_training() -> None:
        read, write = os.pipe()  # to a `tee`, which Ctrl-C ends before us
        os.dup2(write, 1)
        os.dup2(write, 2)
        os.close(write)
        interrupt = send(signal.SIGINT)
        when(Learner, "learn", lambda: (os.close(read), interrupt()), call=3)

    overrides = small_run("training.max_steps=5", "training.log_every=1", "training.save_every=1000")
    done = forked("kuavo_train", *overrides, before=press_ctrl_c_when_training).wait()
    assert done.returncode == 130
    stage = outputs_of(overrides) / "smoke" / "stage1_moving_grasp"
    assert (stage / "checkpoints" / "last").resolve().name == "000003"
    refused = here("kuavo_train", *overrides)
    assert refused.returncode == 2
    assert "continue with resume=true" in refused.stderr
    learn, steps = Learner.learn, []
    monkeypatch.setattr(
        Learner, "learn", lambda *words, step, **named: steps.append(step) or learn(*words, step=step, **named)
    )
    again = here("kuavo_train", *overrides, "resume=true")
    assert again.returncode == 0, again.stderr[-3000:]
    assert steps == [3, 4]
    assert (stage / "checkpoints" / "last").resolve().name == "000005"
    metrics = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in metrics] == [1, 2, 3, 4, 5]


def test_help_and_cfg_are_useful_to_read(here: Here) -> None:
    shown = here("kuavo_train", "--help")
    assert shown.returncode == 0
    for word in (
        "task/tasks: task1_moving_grasp, task2",
        "profile: base, embedded, robot, smoke, study",
        "strategy: adapters, distill, ewc, joint, merge, merge_replay, replay, sequential",
        "replay",
    ):
        assert word in shown.stdout, word
    job = here("kuavo_train", "task=tasks/task3_placement", "--cfg", "job", "--resolve")
    assert job.returncode == 0
    assert "name: placement" in job.stdout
    assert "lr: 0.001" in job.stdout


WRONG_COMMANDS = [
    (["=3"], "arguments must be key=value, got '=3'"),
    ([f"data.root={__file__}/data"], f"data.root must be a folder, or a place for one ({__file__} is a file)"),
    (["-m", "seed=0,1"], "-m must give each job a run of its own, got seed varied in one run; add 'run=NAME-${seed}'"),
    (["seed=0", "-m", "training.lr=1e-3,1e-4"], "options such as -m go first"),
    (["training.lr=-1"], "error: training.lr must be positive, got -1.0"),
    (["task=tasks/task7_juggling"], "task7_juggling"),
    (["training.lerning_rate=1"], "lerning_rate"),
    (["task=tasks/task2_weighing"], "must follow a finished stage 1 (moving_grasp)"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG_COMMANDS)
def test_a_wrong_command_says_what_is_wrong_and_writes_nothing(
    tmp_path: Path, here: Here, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert_refused(here("kuavo_train", *arguments, f"outputs={tmp_path / 'outputs'}"), message)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_command_ends_in_a_line_in_a_process_of_its_own(tmp_path: Path) -> None:
    arguments, message = WRONG_COMMANDS[0]
    refused = call("kuavo_train", *arguments, f"outputs={tmp_path / 'outputs'}", cwd=tmp_path)
    assert_refused(refused, message)
    assert refused.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "meet"),
    [
        (["seed=0,1"], True),
        (["seed=0"], False),
        (["seed=0,1", "run=mine"], True),
        (["seed=0,1", "run=mine-${seed}"], False),
        (["profile=smoke,embedded", "seed=0,1"], False),
        (["run=one,other"], False),
    ],
)
def test_a_sweep_is_refused_where_its_jobs_meet_in_one_folder(words: list[str], *, meet: bool) -> None:
    with pytest.raises(ConfigError, match="-m must give each job a run") if meet else nullcontext():
        check_sweep([parsed(word) for word in words])


def assert_refused(done: subprocess.CompletedProcess[str], message: str) -> None:
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_the_curriculum_refuses_what_holds_for_one_stage_only(here: Here) -> None:
    refused = here("kuavo_train.curriculum", "stage.epochs=3")
    assert refused.returncode == 2
    assert "must hold for every stage, got stage.epochs=3" in refused.stderr


@pytest.mark.slow
def test_two_processes_train_one_policy_and_share_the_quota(small_run: Overrides, tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    done = subprocess.run(
        [*launch, "kuavo_train", *small_run()], cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    stage = outputs_of(small_run()) / "smoke" / "stage1_moving_grasp"
    audit = json.loads((stage / "replay_audit.json").read_text())
    assert audit["total_frames"] == 4 * 4 * 2
    assert json.loads((stage / "stage.json").read_text())["status"] == "finished"
