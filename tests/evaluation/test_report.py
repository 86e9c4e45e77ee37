"""A report from a stored run: its numbers are matrix.json's, a partial run is told as one, bad folders are refused."""

import csv
import hashlib
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from reading import analysed, bare_page_of, matrix_of, page_of
from synthetic_run import TASKS, edit, edit_lines, roll_out, write_run

from kuavo_train.errors import RunFolderError
from kuavo_train.metrics.number_format import FORMATS
from kuavo_train.metrics.verdict import RetentionLimits
from kuavo_train.report import main
from kuavo_train.reporting.html_page import look_up
from kuavo_train.reporting.text_report import summary_table
from kuavo_train.runs.stored_run import StoredRun, newest_run


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    folder = write_run(tmp_path_factory.mktemp("runs") / "four")
    return folder, page_of(folder)


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run")


def test_every_number_in_the_page_is_the_one_in_matrix_json(reported):
    folder, page = reported
    matrix = json.loads((folder / "report" / "matrix.json").read_text())
    assert len(page.numbers) > 150
    for pointer, form, text in page.numbers:
        assert text == FORMATS[form](look_up(matrix, pointer)), pointer


def test_the_training_curves_stand_in_a_csv(reported):
    folder, _ = reported
    with (folder / "report" / "training.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    lines = [(stage.index, line) for stage in StoredRun.open(folder).stages for line in stage.metrics]
    assert len(rows) == len(lines) > 20
    for row, (stage, line) in zip(rows, lines, strict=True):
        assert (int(row["stage"]), int(row["step"])) == (stage, line.step)
        assert (float(row["loss"]), float(row["lr"])) == (line.loss, line.lr)


def test_the_matrix_holds_the_means_of_the_held_out_episodes(reported):
    folder, _ = reported
    matrix = json.loads((folder / "report" / "matrix.json").read_text())
    rows = {row["stage"]: row["values"] for row in matrix["matrices"]["loss"]["rows"]}
    assert list(rows) == [0, 1, 2, 3, 4]
    lines = [json.loads(line) for line in (folder / "stage3_placement" / "validation.jsonl").read_text().splitlines()]
    (line,) = [line for line in lines if line["kind"] == "end" and line["task"] == "weighing"]
    mean = sum(episode["loss"] for episode in line["episodes"]) / len(line["episodes"])
    assert rows[3]["weighing"] == pytest.approx(mean)
    bwt = matrix["matrices"]["loss"]["metrics"]["backward transfer"]["value"]
    drops = [rows[own][name] - rows[4][name] for own, name in TASKS.items() if own < 4]
    assert bwt == pytest.approx(sum(drops) / 3)


def test_every_episode_counts_once_even_where_the_line_weights_them_otherwise(run):
    """Else the change in the verdict would not be the mean whose interval is bootstrapped."""
    edit_lines(run / "stage4_sorting" / "validation.jsonl", lambda line: line | {"loss": 77.0})
    verdict = matrix_of(run)["verdicts"][0]
    assert verdict["loss_now"] < 1
    assert verdict["change"]["estimate"] == pytest.approx(verdict["loss_now"] - verdict["loss_when_learnt"])


def test_the_final_limit_of_a_task_is_that_of_its_recipe(reported):
    folder, _ = reported
    verdicts = json.loads((folder / "report" / "matrix.json").read_text())["verdicts"]
    assert [verdict["final_limit"] for verdict in verdicts] == [0.7, 0.8, 0.2, 0.9]
    assert [verdict["within_final_limit"] for verdict in verdicts] == [True, True, False, True]


def test_the_report_says_what_validation_cost(reported):
    folder, page = reported
    matrix = json.loads((folder / "report" / "matrix.json").read_text())
    lines = [line for stage in StoredRun.open(folder).stages for line in stage.validations]
    assert matrix["validation_cost"]["share"] == pytest.approx(1.5 * len(lines) / (4 * 171 + 10))
    assert ("/validation_cost/share", "share", FORMATS["share"](matrix["validation_cost"]["share"])) in page.numbers


def test_the_report_says_which_stages_end_in_their_last_checkpoint(run):
    words = "stage 2 its last one, as configured"
    assert words not in bare_page_of(run).text
    edit(run / "stage2_weighing" / "stage.json", lambda stage: stage.update(result="last"))
    assert words in bare_page_of(run).text


@pytest.mark.parametrize(
    ("form", "value", "text"),
    [
        ("number", 0.2034, "0.203"),
        ("number", -0.04149, "−0.0415"),
        ("number", 4.2e-5, "4.2e−05"),
        ("number", 0.0, "0.000"),
        ("number", None, "–"),
        ("percent", 0.243, "+24.3\u202f%"),
        ("percent", -0.0004, "+0.0\u202f%"),
        ("share", 0.2, "20.0\u202f%"),
        ("whole_percent", 0.95, "95\u202f%"),
        ("integer", 86_433_024, "86\u202f433\u202f024"),
        ("seconds", 172.4, "2 min 52 s"),
        ("seconds", 7505, "2 h 05 min"),
    ],
)
def test_numbers_read_as_a_person_would_write_them(form, value, text):
    assert FORMATS[form](value) == text


def test_the_verdict_comes_first_one_for_each_task(reported):
    _, page = reported
    head = page.text[: page.text.index("The metrics")]
    for task, word in zip(
        TASKS.values(), ("well retained", "slight degradation", "significant forgetting", "learnt last"), strict=True
    ):
        assert re.search(rf"{task}\s+{word}", head)


def test_the_page_stands_alone(reported):
    folder, page = reported
    assert page.loaded
    assert all(source.startswith("data:image/png;base64,") for source in page.loaded)
    html = (folder / "report" / "report.html").read_text()
    assert "http" not in html
    assert "<script" not in html
    assert len(list((folder / "report").glob("*.png"))) == len(page.loaded) == 8


def test_the_rule_signs_and_limits_are_told_in_words(reported):
    folder, page = reported
    matrix = json.loads((folder / "report" / "matrix.json").read_text())
    assert matrix["rule"] in page.text
    assert matrix["sign_convention"] in page.text
    assert "losses and errors are negated" in matrix["sign_convention"]


def test_a_run_that_kept_its_promises_passes_every_check(reported):
    folder, _ = reported
    matrix = json.loads((folder / "report" / "matrix.json").read_text())
    assert [check["passed"] for check in matrix["checks"]] == [True] * 7
    assert not matrix["partial"]
    assert matrix["missing"] == []


@pytest.mark.parametrize(
    ("stages", "finished", "held_out"),
    [((1, 2, 4), None, 12), ((2,), None, 12), ((1, 2, 3, 4), 2, 12), ((1, 2), 0, 12), ((1, 2), None, 1)],
    ids=["skipped task", "one task", "cut short", "nothing finished", "one episode"],
)
def test_runs_of_every_shape_are_reported(tmp_path, stages, finished, held_out):
    folder = write_run(tmp_path / "run", stages=stages, finished=finished, held_out=held_out)
    page = page_of(folder)
    matrix = json.loads((folder / "report" / "matrix.json").read_text())
    for pointer, form, text in page.numbers:
        assert text == FORMATS[form](look_up(matrix, pointer)), pointer
    done = stages if finished is None else stages[:finished]
    assert [row["stage"] for row in matrix["matrices"]["loss"]["rows"]] == [0, *done]
    assert summary_table(analysed(folder)).count("\n") > len(stages)


def test_a_partial_run_says_so_and_what_is_missing(tmp_path):
    folder = write_run(tmp_path / "run", finished=2)
    page = bare_page_of(folder)
    assert "Partial report" in page.text
    assert "stage3_placement is interrupted at step 100" in page.text
    assert "stage 4 (sorting) has not been trained" in page.text
    assert "partial: stage 4 (sorting)" in summary_table(analysed(folder))


def test_the_matrix_is_written_after_each_stage_with_the_rows_so_far(tmp_path):
    folder = write_run(tmp_path / "run", finished=1)
    matrix = matrix_of(folder)
    assert matrix == json.loads((folder / "report" / "matrix.json").read_text())
    assert [row["stage"] for row in matrix["matrices"]["loss"]["rows"]] == [0, 1]


def test_a_stage_that_learnt_all_tasks_jointly_has_no_forgetting(tmp_path):
    matrix = matrix_of(write_run(tmp_path / "joint", strategy="joint"))
    assert not matrix["partial"]
    assert {verdict["state"] for verdict in matrix["verdicts"]} == {"learnt last"}
    assert matrix["matrices"]["loss"]["metrics"]["backward transfer"]["value"] is None


def test_success_rates_bring_their_intervals_and_liberos_metrics(run):
    for stage in StoredRun.open(run).stages:
        edit_lines(
            stage.folder / "validation.jsonl",
            lambda line: line | {"success": {"successes": 10 if line["seen"] else 0, "trials": 20}},
        )
    page = bare_page_of(run)
    matrix = json.loads((run / "report" / "matrix.json").read_text())
    success = matrix["matrices"]["success"]
    assert success["rows"][4]["intervals"]["weighing"]["low"] == pytest.approx(0.2993, abs=1e-4)
    assert success["metrics"]["LIBERO NBT"]["value"] == {"moving_grasp": 0.0, "weighing": 0.0, "placement": 0.0}
    assert success["metrics"]["LIBERO AUC"]["value"]["sorting"] == pytest.approx(0.5)
    assert "LIBERO NBT" in page.text


def test_closed_loop_is_told_stage_by_stage_with_its_funnel_and_branches(run):
    closed_loop = {
        "success": {"successes": 10, "trials": 20},
        "progress": 0.75,
        "funnel": {"picked": 17, "stored": 10},
        "branches": {"right": 9, "acted": 12},
        "n_action_steps": 8,
    }
    for stage in StoredRun.open(run).stages:
        edit_lines(
            stage.folder / "validation.jsonl",
            lambda line: line | (closed_loop if line["seen"] and line["kind"] == "end" else {}),
        )
    page = page_of(run)
    matrix = json.loads((run / "report" / "matrix.json").read_text())
    assert [entry["stage"] for entry in matrix["closed_loop"]] == [1, 2, 2, 3, 3, 3, 4, 4, 4, 4]
    assert matrix["matrices"]["progress"]["rows"][4]["values"]["weighing"] == 0.75
    assert "picked 17 → stored 10" in " ".join(page.text.split())
    assert "9 of 12" in page.text
    lines = summary_table(analysed(run)).splitlines()
    assert "success learnt" in lines[2]
    assert lines[4].count("50") >= 2


def kept(run, task="moving_grasp", *, learnt, now, trials=20):
    """The verdict on a task that succeeds in so many first layouts after its own stage, and in so many in the end."""

    def outcome(name, place, layout):
        return layout < (learnt if place == list(TASKS.values()).index(name) else now) if name == task else True

    roll_out(run, outcome, trials=trials)
    return next(verdict for verdict in matrix_of(run)["verdicts"] if verdict["task"] == task)


def test_the_verdict_speaks_of_success_where_there_are_rollouts_and_of_the_loss_beside_it(run):
    verdict = kept(run, learnt=20, now=2)
    assert (verdict["measure"], verdict["verdict"], verdict["settled"]) == ("success", "significant forgetting", True)
    assert verdict["loss_verdict"]["verdict"] == "well retained"
    found = verdict["success_verdict"]
    assert [found[key] for key in ("layouts", "when_learnt", "now", "lost", "won")] == [20, 20, 2, 18, 0]
    assert found["p_value"] == pytest.approx(2 / 2**18)
    page = " ".join(bare_page_of(run).text.split())
    assert "Success 20 of 20 layouts when learnt, 2 of the same now: −90.0" in page
    assert "By its loss well retained. Held-out loss" in page
    (line,) = [line for line in summary_table(analysed(run)).splitlines() if line.startswith("moving_grasp")]
    assert line.index("significant forgetting") < line.index("well retained")


def test_a_drop_that_few_layouts_do_not_show_is_not_called_forgetting(run):
    verdict = kept(run, learnt=4, now=0)
    assert (verdict["verdict"], verdict["worst"], verdict["settled"]) == (
        "well retained",
        "significant forgetting",
        False,
    )
    assert verdict["success_verdict"]["p_value"] == pytest.approx(0.125)
    assert "which shows no change. The interval reaches into “significant forgetting”" in verdict["evidence"]


def test_a_job_that_was_never_done_has_nothing_to_lose_though_its_loss_rose(run):
    verdict = kept(run, "placement", learnt=0, now=0)
    assert (verdict["state"], verdict["verdict"], verdict["measure"]) == ("nothing to lose", None, "success")
    assert verdict["loss_verdict"]["verdict"] == "significant forgetting"
    assert "nothing could be lost" in verdict["evidence"]


def test_rollouts_whose_episodes_are_not_on_record_leave_the_verdict_to_the_loss(run):
    kept(run, learnt=20, now=2)
    (run / "stage1_moving_grasp" / "rollouts.jsonl").unlink()
    verdict = matrix_of(run)["verdicts"][0]
    assert (verdict["measure"], verdict["verdict"], verdict["success_verdict"]) == ("loss", "well retained", None)


def test_success_is_paired_by_layout(run):
    roll_out(run, lambda task, place, layout: (layout < 10) == (place == 0), trials=20)
    found = matrix_of(run)["verdicts"][0]["success_verdict"]
    assert [found[key] for key in ("when_learnt", "now", "lost", "won", "p_value")] == [10, 10, 10, 10, 1.0]


def test_the_terminal_ends_with_the_success_of_each_job(run, capsys):
    kept(run, learnt=20, now=2)
    assert main([f"run={run}"]) == 0
    *before, head, first, second, third, fourth = capsys.readouterr().out.splitlines()
    assert any(line.startswith("report: ") for line in before)
    assert head.split("  ")[0] == "success in closed loop"
    assert "20/20  100\u202f% [84\u202f%, 100\u202f%]" in first
    assert "2/20  10\u202f% [3\u202f%, 30\u202f%]" in first
    assert first.endswith("lost 18, won 0, p = 7.6e−06")
    assert [line.split()[0] for line in (first, second, third, fourth)] == list(TASKS.values())


def test_a_run_that_was_never_rolled_out_ends_with_its_report(run, capsys):
    assert main([f"run={run}"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("report: ")


def test_a_run_that_was_never_rolled_out_has_no_such_section(reported):
    assert "How far episodes get" not in reported[1].text
    assert "at work" not in reported[1].text


def test_a_joint_run_gives_intransigence_and_one_of_other_data_is_refused(run, tmp_path, capsys):
    joint = write_run(tmp_path / "joint", strategy="joint")
    matrix = matrix_of(run, joint=joint)
    metrics = matrix["matrices"]["loss"]["metrics"]
    gap = metrics["intransigence by task"]["value"]
    assert set(gap) == set(TASKS.values())
    assert metrics["intransigence"]["value"] == pytest.approx(sum(gap.values()) / 4)
    assert main([f"run={run}", f"joint={joint}"]) == 0
    assert f"intransigence {FORMATS['number'](metrics['intransigence']['value'])}" in capsys.readouterr().out
    edit(joint / "run.json", lambda record: record["normalization"].update(hash="another"))
    with pytest.raises(RunFolderError, match=r"joint have different normalization hashes .* do not compare"):
        matrix_of(run, joint=joint)


@pytest.mark.parametrize(
    ("break_it", "name"),
    [
        (lambda run: edit(run / "stage2_weighing/replay_audit.json", lambda r: r.update(held_out_frames_drawn=3)),
         "Held-out episodes were never trained on"),
        (lambda run: edit(run / "stage2_weighing/replay_audit.json",
                          lambda r: r["drawn"]["moving_grasp"].update(frames=900)),
         "Replay shares drawn are those declared"),
        (lambda run: edit(run / "stage3_placement/parameters.json",
                          lambda r: r["groups"][0].update(fingerprint_after="0" * 64)),
         "Frozen parameters did not change"),
        (lambda run: edit(run / "run.json",
                          lambda r: r["tasks"][0]["dataset"]["train_episodes"].append(
                              r["tasks"][0]["dataset"]["held_out_episodes"][0])),
         "Training and held-out episodes are disjoint"),
        (lambda run: edit(run / "run.json",
                          lambda r: r["tasks"][0]["dataset"].update(
                              choosing_episodes=r["tasks"][0]["dataset"]["train_episodes"][:1])),
         "Training and held-out episodes are disjoint"),
        (lambda run: edit_lines(run / "stage4_sorting/validation.jsonl", lambda line: line | {"constant_error": 0.01}),
         "The final policy beats a constant predictor on every task"),
    ],
)  # fmt: skip
def test_a_broken_promise_stands_at_the_top_of_the_report_and_in_the_terminal(run, break_it, name):
    break_it(run)
    matrix = matrix_of(run)
    assert [check["name"] for check in matrix["checks"] if check["passed"] is False] == [name]
    page = bare_page_of(run)
    assert page.text.index("Not everything held") < page.text.index(name) < page.text.index("The metrics")
    assert f"FAILED: {name}" in summary_table(analysed(run))


@pytest.mark.parametrize(("off_by", "passes"), [(3, True), (4, False)])
def test_shares_dealt_in_clips_are_exact_to_the_clip(run, off_by, passes):
    def in_clips(record):
        task = record["drawn"]["moving_grasp"]
        exact = record["declared"]["moving_grasp"] * record["total_frames"]
        task["frames"] = exact + off_by
        record["dealt_together"] = 4

    edit(run / "stage2_weighing/replay_audit.json", in_clips)
    checks = {check["name"]: check["passed"] for check in matrix_of(run)["checks"]}
    assert checks["Replay shares drawn are those declared"] is passes


def test_the_strategy_at_work_and_the_gate_are_told_with_their_numbers(run):
    stage = run / "stage3_placement"
    change = {"estimate": 0.5, "low": 0.3, "high": 0.7, "level": 0.95, "n": 12}
    quiet = {"step": 40, "epoch": 1, "stage": 3, "task": "weighing", "change": change | {"low": 0.1},
             "budget": 0.2, "exceeded": False, "action": None}  # fmt: skip
    shares = {"moving_grasp": 0.1, "weighing": 0.4, "placement": 0.5}
    raised = quiet | {"step": 80, "change": change, "exceeded": True, "action": "raise_replay", "shares": shares}
    (stage / "gate.jsonl").write_text(json.dumps(quiet) + "\n" + json.dumps(raised) + "\n")
    sweep = [{"alpha": alpha, "loss": 0.3 - 0.1 * alpha, "losses": {}} for alpha in (0.5, 1.0)]
    rounds = [{"modules": modules, "chosen": 1.0, "sweep": sweep} for modules in ("all", "memory")]
    (stage / "merge.json").write_text(json.dumps({"chosen": {"expert": 1.0, "memory": 1.0}, "rounds": rounds}))
    edit(run / "run.json", lambda record: record["tasks"][1]["dataset"].update(choosing_episodes=[97, 98]))
    earlier_version = {"chosen": 0.5, "loss": 0.25, "sweep": sweep}
    (run / "stage2_weighing" / "merge.json").write_text(json.dumps(earlier_version))
    edit_lines(
        stage / "metrics.jsonl",
        lambda line: line | {"penalty": 0.01 * line["step"], "distillation": 3.0 / line["step"]},
    )
    edit(stage / "stage.json", lambda record: record.update(stopped="held-out loss since learnt: weighing"))
    page = bare_page_of(run)
    matrix = json.loads((run / "report" / "matrix.json").read_text())
    assert "1 of 2 readings were" in page.text
    assert "raise replay" in page.text
    shown = {pointer: text for pointer, _, text in page.numbers}
    assert shown["/gate/1/shares/weighing"] == FORMATS["share"](0.4)
    assert shown["/gate/1/change/low"] == FORMATS["percent"](0.3)
    assert shown["/strategy_facts/choosing_episodes/weighing"] == "2"
    assert "not on those of the figures above: weighing 2." in page.text
    merges = matrix["strategy_facts"]["merges"]
    assert [(row["stage"], row["modules"], row["chosen"]) for row in merges] == [
        (2, "all", 0.5),
        (3, "all", 1.0),
        (3, "memory", 1.0),
    ]
    assert shown["/strategy_facts/merges/2/sweep/1/loss"] == FORMATS["number"](0.2)
    assert shown["/strategy_facts/penalties/0/last"] == FORMATS["number"](2.0)
    assert shown["/strategy_facts/distances/0/last"] == FORMATS["number"](3.0 / 200)
    assert "held-out loss since learnt: weighing" in page.text
    for pointer, form, text in page.numbers:
        assert text == FORMATS[form](look_up(matrix, pointer)), pointer


def test_a_run_without_gate_or_probes_has_no_such_sections_and_says_how_to_ask(reported):
    _, page = reported
    assert "The strategy at work" not in page.text
    assert "Lost, or only suppressed?" not in page.text
    assert "python -m kuavo_train.probes run=four" in page.text


BAD_FOLDERS = {
    "no folder": (lambda run: shutil.rmtree(run), "does not exist: give the folder of a run"),
    "no run.json": (lambda run: (run / "run.json").unlink(), "has no run.json, so it is not a run"),
    "run.json cut": (lambda run: (run / "run.json").write_text('{"run": '), "run.json is not JSON"),
    "run.json of others": (lambda run: (run / "run.json").write_text('{"name": 1}'), "lacks 'run', 'tasks'"),
    "no stage": (lambda run: [shutil.rmtree(p) for p in run.glob("stage*")], "has no stage in it: train one first"),
    "stage missing": (
        lambda run: shutil.rmtree(run / "stage2_weighing"),
        "stage2_weighing is missing, yet stage4_sorting exists: restore the folder",
    ),
    "two stages 2": (
        lambda run: shutil.copytree(run / "stage2_weighing", run / "stage2_other"),
        "two folders for stage 2: stage2_other and stage2_weighing",
    ),
    "middle unfinished": (
        lambda run: edit(run / "stage2_weighing/stage.json", lambda r: r.update(status="interrupted")),
        "stage2_weighing is interrupted, yet a later stage exists: finish it with resume=true",
    ),
    "no validation": (
        lambda run: (run / "stage2_weighing/validation.jsonl").unlink(),
        "stage2_weighing is finished, yet its validation.jsonl has no line of kind 'end'",
    ),
    "hole in the matrix": (
        lambda run: edit_lines(
            run / "stage3_placement/validation.jsonl",
            lambda line: None if line["kind"] == "end" and line["task"] == "weighing" else line,
        ),
        "stage3_placement/validation.jsonl has no line of kind 'end' for task weighing, which was learnt in stage 2",
    ),
    "broken line": (
        lambda run: (run / "stage1_moving_grasp/metrics.jsonl").write_text('{"step": 1}\n{"step": \n{"step": 3}\n'),
        "metrics.jsonl: line 2 is not JSON .*: repair or delete that line",
    ),
    "line without a task": (
        lambda run: (run / "stage1_moving_grasp/validation.jsonl").write_text('{"kind": "end", "step": 1}\n'),
        "validation.jsonl: line 1 lacks 'task', 'loss'",
    ),
    "another run's stage": (
        lambda run: edit_lines(run / "stage2_weighing/validation.jsonl", lambda line: line | {"task": "welding"}),
        "validates task welding, which is not in run.json",
    ),
    "loss not a number": (
        lambda run: edit_lines(
            run / "stage4_sorting/validation.jsonl",
            lambda line: line | {"episodes": [], "loss": math.nan} if line["task"] == "sorting" else line,
        ),
        "loss of task sorting after stage 4 is nan",
    ),
    "other episodes": (
        lambda run: edit_lines(
            run / "stage4_sorting/validation.jsonl",
            lambda line: line | {"episodes": [e | {"episode": e["episode"] + 100} for e in line["episodes"]]},
        ),
        "task moving_grasp after stage 1 and after stage 4 cannot be compared: the same episodes",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_a_folder_that_cannot_be_reported_is_an_error_naming_it_and_the_fix(run, case):
    break_it, message = BAD_FOLDERS[case]
    break_it(run)
    with pytest.raises(RunFolderError, match=message) as error:
        matrix_of(run)
    assert str(run) in str(error.value)


def write_checkpoint(folder: Path, **changes) -> None:
    """The manifest of stage 2's checkpoint, and its hash in stage.json."""
    record = json.loads((folder / "run.json").read_text())
    manifest = {"run": "run", "seed": 0, "normalization": record["normalization"]["hash"], "files": {}, **changes}
    stage = folder / "stage2_weighing"
    checkpoint = stage / json.loads((stage / "stage.json").read_text())["checkpoint"]
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    edit(stage / "stage.json", lambda stage: stage.update(checkpoint_hash=digest))


def test_a_stages_own_checkpoint_is_accepted(run):
    write_checkpoint(run)
    assert len(StoredRun.open(run).stages) == 4


@pytest.mark.parametrize(("key", "value"), [("run", "other"), ("seed", 5), ("normalization", "other")])
def test_a_checkpoint_of_another_run_is_refused(run, key, value):
    write_checkpoint(run, **{key: value})
    with pytest.raises(RunFolderError, match=f"is a checkpoint of another run: its {key} is {value}, .*move it back"):
        StoredRun.open(run)


def test_a_checkpoint_that_was_replaced_is_refused(run):
    write_checkpoint(run)
    edit(run / "stage2_weighing" / "stage.json", lambda stage: stage.update(checkpoint_hash="f" * 64))
    with pytest.raises(RunFolderError, match=r"is not the checkpoint that stage2_weighing reports on: .* restore it"):
        StoredRun.open(run)


def test_a_last_line_cut_off_by_a_kill_is_left_out(run):
    path = run / "stage4_sorting" / "metrics.jsonl"
    whole = len(StoredRun.open(run).stages[-1].metrics)
    path.write_text(path.read_text() + '{"step": 205, "lo')
    assert len(StoredRun.open(run).stages[-1].metrics) == whole


def test_steps_logged_again_after_a_resume_count_once_and_as_logged_last(run):
    path = run / "stage4_sorting" / "metrics.jsonl"
    again = json.loads(path.read_text().splitlines()[-1]) | {"loss": 9.0}
    path.write_text(path.read_text() + json.dumps(again) + "\n")
    metrics = StoredRun.open(run).stages[-1].metrics
    assert [line.step for line in metrics] == list(range(5, 201, 5))
    assert metrics[-1].loss == 9.0


def test_limits_of_the_last_verdict_hold_until_others_are_given(run):
    matrix_of(run, limits=RetentionLimits(slight_change=0.9, resamples=500))
    assert matrix_of(run, limits=None)["limits"]["slight_change"] == 0.9
    assert matrix_of(run, limits=None)["verdicts"][2]["verdict"] == "slight degradation"
    assert matrix_of(run)["verdicts"][2]["verdict"] == "significant forgetting"


def test_the_command_line_takes_the_newest_run_and_says_so(tmp_path, monkeypatch, capsys):
    write_run(tmp_path / "outputs" / "old")
    write_run(tmp_path / "outputs" / "new")
    (tmp_path / "outputs" / "cache").mkdir()
    monkeypatch.chdir(tmp_path)
    assert newest_run(Path("outputs")) == Path("outputs/new")
    assert main(["resamples=200"]) == 0
    printed = capsys.readouterr().out
    assert "no run given: taking the one modified last, outputs/new" in printed
    assert "report: outputs/new/report/report.html" in printed


def test_page_and_terminal_tell_of_one_reading_of_the_run(run, monkeypatch, capsys):
    read, opened = [], StoredRun.open
    monkeypatch.setattr(StoredRun, "open", lambda folder: read.append(folder) or opened(folder))
    assert main([f"run={run}", "resamples=200"]) == 0
    assert read == [run]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run=outputs/none"], "error: outputs/none does not exist"),
        ([f"run={__file__}"], "test_report.py is no folder: give the folder of a run"),
        (["outputs/none"], "arguments must be key=value with a key of run, joint"),
        (["run=a", "run=b"], "run must be given once"),
        (["run=outputs/one", "slight_change=much"], "slight_change must be a number, got 'much'"),
        (["run=outputs/one", "slight_change=0.01"], "well_retained_change must be in"),
        ([], "no run under outputs/: train one first"),
    ],
)
def test_bad_arguments_end_in_one_line_that_says_what_is_wrong(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_the_report_starts_without_torch():
    code = "import sys, kuavo_train.report; print({'torch', 'matplotlib', 'lerobot'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
