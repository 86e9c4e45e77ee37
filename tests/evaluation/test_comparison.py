"""Strategies × seeds side by side: the numbers are those of the runs, and what does not compare is refused."""

import csv
import dataclasses
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from reading import QUICK, Page, analysed, bare_page_of, compared_runs, matrix_of
from synthetic_run import TASKS, edit, edit_lines, roll_out, write_run

from kuavo_train.errors import RunFolderError
from kuavo_train.metrics.number_format import FORMATS
from kuavo_train.report import main
from kuavo_train.reporting.html_page import look_up
from kuavo_train.reporting.text_report import comparison_table, summary_table
from kuavo_train.reporting.write_report import comparison_content, write_comparison

STRATEGIES = ("replay", "sequential", "joint")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(strategy, seed) → folder of a run of four tasks."""
    folder = tmp_path_factory.mktemp("runs")
    return {
        (strategy, seed): write_run(folder / f"{strategy}{seed}", strategy=strategy, seed=seed)
        for strategy in STRATEGIES
        for seed in (0, 1)
    }


@pytest.fixture(scope="module")
def compared(runs, tmp_path_factory):
    page = write_comparison(compared_runs(list(runs.values())), tmp_path_factory.mktemp("comparison"))
    return json.loads((page.parent / "comparison.json").read_text()), page


@pytest.fixture
def pair(tmp_path):
    return [write_run(tmp_path / strategy, strategy=strategy) for strategy in ("replay", "sequential")]


def strategy(comparison, name):
    return next(entry for entry in comparison["strategies"] if entry["strategy"] == name)


def test_every_number_in_the_page_is_the_one_in_comparison_json(compared):
    comparison, path = compared
    page = Page(path.read_text(encoding="utf-8"))
    assert len(page.numbers) > 300
    for pointer, form, text in page.numbers:
        assert text == FORMATS[form](look_up(comparison, pointer)), pointer
    assert page.loaded
    assert all(source.startswith("data:image/png;base64,") for source in page.loaded)


def test_a_strategys_number_is_the_mean_of_its_seeds_own_reports(runs, compared):
    comparison, _ = compared
    for name in STRATEGIES:
        own = [matrix_of(runs[name, seed])["matrices"]["loss"]["metrics"] for seed in (0, 1)]
        for metric in ("average", "backward transfer", "forgetting", "forward transfer", "plasticity"):
            found = strategy(comparison, name)["metrics"]["loss"][metric]["value"]
            values = [metrics[metric]["value"] for metrics in own]
            if values == [None, None]:
                assert found is None
                continue
            assert found["by_seed"] == pytest.approx({"0": values[0], "1": values[1]})
            assert found["estimate"] == pytest.approx(np.mean(values))
            assert found["low"] <= found["estimate"] <= found["high"]


def test_a_difference_is_paired_by_seed_and_tells_the_strategies_apart(compared):
    comparison, _ = compared
    replay, sequential = (strategy(comparison, name)["metrics"]["loss"]["forgetting"] for name in STRATEGIES[:2])
    difference = sequential["difference"]
    for seed in ("0", "1"):
        own = sequential["value"]["by_seed"][seed] - replay["value"]["by_seed"][seed]
        assert difference["by_seed"][seed] == pytest.approx(own)
    assert 0 < difference["low"] < difference["high"]
    assert replay["difference"] is None
    assert comparison["reference"] == "replay"


def test_success_in_closed_loop_is_compared_on_the_layouts_that_all_runs_played(tmp_path):
    keeps = {"replay": 18, "sequential": 4}  # of 20 layouts, the earlier tasks once another was learnt; 18 at first
    folders, order = [], list(TASKS.values())
    for name, kept in keeps.items():
        for seed in (0, 1):
            folders.append(write_run(tmp_path / f"{name}{seed}", strategy=name, seed=seed))
            roll_out(folders[-1], lambda task, place, n, kept=kept: n < (18 if order[place] == task else kept))
    edit_lines(
        folders[0] / "stage4_sorting" / "rollouts.jsonl",
        lambda line: (
            line | {"episodes": [e | {"error": "fell" if e["seed"] == 10**9 else None} for e in line["episodes"]]}
        ),
    )
    page = write_comparison(compared_runs(folders), tmp_path / "comparison")
    comparison = json.loads((page.parent / "comparison.json").read_text())
    assert comparison["layouts"] == dict.fromkeys(TASKS.values(), 19)  # one failed in one of the runs
    found = {name: strategy(comparison, name)["closed_loop"][0] for name in keeps}
    assert found["replay"]["now"]["estimate"] == pytest.approx(17 / 19)
    assert found["sequential"]["now"]["estimate"] == pytest.approx(3 / 19)
    assert found["sequential"]["when_learnt"]["by_seed"] == pytest.approx({"0": 17 / 19, "1": 17 / 19})
    lost = strategy(comparison, "sequential")["metrics"]["success"]["backward transfer"]
    assert lost["value"]["estimate"] == pytest.approx(-14 / 19)
    assert lost["difference"]["high"] < 0
    html = Page(page.read_text(encoding="utf-8"))
    for pointer, form, text in html.numbers:
        assert text == FORMATS[form](look_up(comparison, pointer)), pointer
    assert "Success in closed loop" in html.text
    assert "success in closed loop" in comparison_table(compared_runs(folders))


def test_runs_that_were_never_rolled_out_have_no_closed_loop_to_compare(compared):
    comparison, page = compared
    assert comparison["layouts"] == {}
    assert "Closed loop" not in Page(page.read_text(encoding="utf-8")).text


def test_intransigence_is_against_the_joint_run_of_the_same_seed(runs, compared):
    comparison, _ = compared
    found = strategy(comparison, "replay")["metrics"]["loss"]["intransigence"]["value"]["by_seed"]
    for seed in (0, 1):
        matrix = matrix_of(runs["replay", seed], joint=runs["joint", seed])
        gaps = matrix["matrices"]["loss"]["metrics"]["intransigence by task"]["value"]
        assert found[str(seed)] == pytest.approx(sum(gaps.values()) / 4)
    assert "intransigence" not in strategy(comparison, "joint")["metrics"]["loss"]


def test_without_a_joint_run_there_is_no_intransigence_and_the_page_says_why(pair, tmp_path):
    comparison = comparison_content(compared_runs(pair))
    entry = strategy(comparison, "replay")["metrics"]["loss"]["intransigence"]
    assert (entry["value"], entry["reason"]) == (None, "no finished joint run was given")
    assert (
        "no finished joint run was given"
        in Page(write_comparison(compared_runs(pair), tmp_path / "c").read_text()).text
    )


def test_the_verdicts_over_seeds_follow_what_the_strategies_forget(compared):
    comparison, _ = compared
    words = {
        name: [task["verdict"] or task["state"] for task in strategy(comparison, name)["tasks"]] for name in STRATEGIES
    }
    assert words["replay"] == ["well retained", "slight degradation", "significant forgetting", "learnt last"]
    assert words["sequential"][1:3] == ["significant forgetting"] * 2
    assert set(words["joint"]) == {"learnt with all others"}


def test_a_verdict_that_is_not_settled_is_told_with_both_words_and_counted_apart(pair, tmp_path):
    change = strategy(comparison_content(compared_runs(pair)), "replay")["tasks"][1]["relative_change"]
    assert change["low"] < change["estimate"] < change["high"] < QUICK.slight_change
    between = dataclasses.replace(QUICK, well_retained_change=change["estimate"])
    text = Page(write_comparison(compared_runs(pair, between), tmp_path / "c").read_text(encoding="utf-8")).text
    assert "1 well retained, 1 significant forgetting, 1 not settled" in " ".join(text.split())
    assert "at best well retained at worst slight degradation" in " ".join(text.split())
    text = bare_page_of(pair[0], limits=between).text
    assert "at best well retained at worst slight degradation: not settled" in " ".join(text.split())
    assert "at best well retained, at worst slight degradation" in summary_table(analysed(pair[0], limits=None))


def test_a_single_seed_has_the_verdicts_of_its_own_report(pair):
    comparison = comparison_content(compared_runs(pair))
    for run in pair:
        own = [verdict["relative_change"] for verdict in matrix_of(run)["verdicts"]]
        for task, change in zip(strategy(comparison, run.name)["tasks"], own, strict=True):
            found = task["relative_change"]
            assert (found and [found["low"], found["high"]]) == (change and [change["low"], change["high"]])


def test_the_number_of_seeds_and_episodes_is_told(compared):
    comparison, page = compared
    assert "(2 seeds, 12 held-out episodes a task)" in strategy(comparison, "replay")["evidence"]
    assert "seeds 0, 1" in Page(page.read_text()).text
    assert "2 seeds" in comparison["intervals"]


def test_the_csv_holds_every_cell_of_every_run_and_every_combined_number(compared):
    comparison, page = compared
    lines = list(csv.DictReader((page.parent / "comparison.csv").open()))
    found = {(x["what"], x["strategy"], x["seed"], x["measure"], x["task"]): x for x in lines}
    assert len(found) == len(lines)
    cells = sum(len(row["values"]) for run in comparison["runs"] for row in run["matrices"]["loss"]["rows"])
    assert sum(x["what"].startswith("R after") and x["measure"] == "loss" for x in lines) == cells
    line = found["backward transfer", "sequential", "", "loss", ""]
    value = strategy(comparison, "sequential")["metrics"]["loss"]["backward transfer"]["value"]
    assert [float(line[key]) for key in ("estimate", "low", "high")] == [
        value[key] for key in ("estimate", "low", "high")
    ]


def test_a_partial_run_is_told_and_left_out_of_its_strategys_numbers(runs, tmp_path):
    short = write_run(tmp_path / "short", strategy="sequential", seed=2, finished=2)
    folders = [*runs.values(), short]
    comparison = comparison_content(compared_runs(folders))
    assert comparison["partial"]
    entry = strategy(comparison, "sequential")
    assert entry["seeds"] == [0, 1]
    assert not entry["partial"]
    assert len(entry["left_out"]) == 1
    page = Page(write_comparison(compared_runs(folders), tmp_path / "comparison").read_text()).text
    assert "Partial comparison" in page
    assert "short: stage 4 (sorting) has not been trained" in page
    assert "left out of the numbers of sequential" in page
    assert "partial: short: stage3_placement is interrupted" in comparison_table(compared_runs(folders))


def test_a_strategy_of_which_every_run_is_partial_reports_its_part_and_no_difference(tmp_path):
    whole = write_run(tmp_path / "whole")
    short = write_run(tmp_path / "short", strategy="sequential", finished=2)
    entry = strategy(comparison_content(compared_runs([whole, short])), "sequential")
    assert entry["partial"]
    assert entry["evidence"].startswith("Partial: 2 stages finished.")
    assert entry["metrics"]["loss"]["average"]["value"] is not None
    assert entry["metrics"]["loss"]["average"]["difference"] is None
    assert [task["state"] for task in entry["tasks"]] == ["judged", "learnt last", "not learnt", "not learnt"]


def test_an_unfinished_joint_run_is_told_and_gives_no_intransigence(pair, tmp_path):
    joint = write_run(tmp_path / "joint", strategy="joint", finished=0)
    comparison = comparison_content(compared_runs([*pair, joint]))
    assert [text for text in comparison["missing"] if text.startswith("joint: ")] == [
        "joint: stage1_joint is interrupted at step 100"
    ]
    assert strategy(comparison, "joint")["evidence"].startswith("Partial: 0 stages finished.")
    assert strategy(comparison, "replay")["metrics"]["loss"]["intransigence"]["value"] is None
    write_comparison(compared_runs([*pair, joint]), tmp_path / "comparison")


NOT_COMPARABLE = {
    "normalization": (
        lambda run: edit(run / "run.json", lambda r: r["normalization"].update(hash="another")),
        "have different normalization hashes",
    ),
    "data": (
        lambda run: edit(run / "run.json", lambda r: r["tasks"][2]["dataset"].update(hash="another")),
        "have different data hashes",
    ),
    "split": (
        lambda run: edit(run / "run.json", lambda r: r["tasks"][2]["dataset"]["held_out_episodes"].append(99)),
        "have different held-out episodes",
    ),
    "tasks": (
        lambda run: edit(run / "run.json", lambda r: r["tasks"].append({"name": "welding", "index": 9})),
        "have different tasks",
    ),
    "policy": (
        lambda run: edit(run / "run.json", lambda r: r.update(config_hash="another")),
        "have different hashes of the policy's configuration",
    ),
    "draws": (
        lambda run: [edit_lines(p, lambda line: line | {"draws": 2}) for p in run.glob("stage*/validation.jsonl")],
        "have different numbers of draws in validation",
    ),
}


def test_merging_after_replay_is_another_strategy_than_merging_alone(tmp_path):
    settings = ({"mixture": "own_task"}, {"mixture": "replay"}, {"mixture": "replay", "replay": BUFFER})
    folders = [write_run(tmp_path / f"run{place}", strategy="sequential") for place in range(3)]
    for folder, mine in zip(folders, settings, strict=True):
        edit(folder / "run.json", lambda run, mine=mine: run.update(strategy="merge", strategy_settings=mine))
    comparison = comparison_content(compared_runs(folders))
    names = ["merge", "merge + replay", "merge + replay 0.02"]
    assert [entry["strategy"] for entry in comparison["strategies"]] == names


BUFFER = {"buffer": 0.02, "unit": "episode", "select": "random"}


def test_runs_with_another_replay_buffer_are_another_strategy(tmp_path):
    buffers = (
        None,
        {"buffer": 0.02, "unit": "episode", "select": "random"},
        {"buffer": 0.2, "unit": "frame", "select": "phase"},
    )
    folders = [write_run(tmp_path / f"run{place}", strategy="replay") for place in range(3)]
    for folder, buffer in zip(folders, buffers, strict=True):
        edit(folder / "run.json", lambda run, buffer=buffer: run.update(strategy_settings={"replay": buffer}))
    comparison = comparison_content(compared_runs(folders))
    names = ["replay", "replay 0.02", "replay 0.2 frame phase"]
    assert [entry["strategy"] for entry in comparison["strategies"]] == names
    assert [run["strategy"] for run in comparison["runs"]] == names


def cells(folder, *, chunk_sizes=(6, 6)):
    """Runs of replay and of joint training with two memories, of which each has a policy of its own."""
    found = {}
    for place, memory in enumerate(("standard", "strong")):
        for kind in ("joint", "replay"):
            run = found[kind, memory] = write_run(folder / f"{kind}-{memory}", strategy=kind, seed=0)
            edit(run / "run.json", lambda r, m=memory: r.update(axes={"memory": m}, config_hash=m))
            first = next(iter(sorted(run.glob("stage1_*"))))
            (first / "config.yaml").write_text(f"policy: {{type: smolvla_memory, chunk_size: {chunk_sizes[place]}}}\n")
    return found


def test_what_a_study_varied_makes_strategies_of_their_own_each_with_its_joint_run(tmp_path):
    found = cells(tmp_path)
    end = found["joint", "strong"] / "stage1_joint" / "validation.jsonl"
    edit_lines(end, lambda line: line | {"episodes": [e | {"loss": e["loss"] + 1} for e in line["episodes"]]})
    comparison = comparison_content(compared_runs(list(found.values())))
    names = [f"{kind} memory={memory}" for kind in ("replay", "joint") for memory in ("standard", "strong")]
    assert [entry["strategy"] for entry in comparison["strategies"]] == names
    assert comparison["reference"] == names[0]
    first, second = (strategy(comparison, name)["metrics"]["loss"]["intransigence"]["value"] for name in names[:2])
    assert second["estimate"] == pytest.approx(first["estimate"] - 1)
    assert "all tasks at once" in [entry["outcome"] for entry in comparison["strategies"]][2:]


def test_policies_that_a_study_varied_compare_only_where_they_predict_the_same(tmp_path):
    with pytest.raises(RunFolderError, match=r"have different lengths of chunks \(6 and 8\): .* do not compare"):
        compared_runs(list(cells(tmp_path / "chunks", chunk_sizes=(6, 8)).values()))
    found = cells(tmp_path / "queries")
    path = next(iter(found["replay", "strong"].glob("stage1_*"))) / "validation.jsonl"
    edit_lines(path, lambda line: line | {"episodes": [e | {"frames": 3} for e in line["episodes"]]})
    with pytest.raises(RunFolderError, match="have different numbers of queries in validation"):
        compared_runs([found["joint", "standard"], found["replay", "strong"]])


@pytest.mark.parametrize("case", NOT_COMPARABLE)
def test_runs_that_were_not_asked_the_same_questions_are_refused_with_both_folders_and_the_fix(pair, case):
    change, message = NOT_COMPARABLE[case]
    change(pair[1])
    with pytest.raises(RunFolderError, match=rf"{pair[0]} and {pair[1]} {message}.*do not compare; train both"):
        comparison_content(compared_runs(pair))


def test_two_runs_of_one_strategy_and_seed_are_refused(pair, tmp_path):
    again = write_run(tmp_path / "again")
    with pytest.raises(RunFolderError, match=r"replay and .*again are both replay with seed 0: .* leave one"):
        comparison_content(compared_runs([*pair, again]))


def test_a_single_run_is_no_comparison(pair):
    with pytest.raises(RunFolderError, match="needs at least two runs"):
        comparison_content(compared_runs(pair[:1]))


def test_a_validation_of_other_episodes_is_refused(pair):
    edit_lines(
        pair[1] / "stage2_weighing" / "validation.jsonl",
        lambda line: line | {"episodes": line["episodes"][1:]} if line["kind"] == "end" else line,
    )
    with pytest.raises(RunFolderError, match=r"sequential: the validation of .* in stage 2 must score its held-out"):
        comparison_content(compared_runs(pair))


def test_runs_with_a_hole_or_a_missing_stage_name_the_folder(pair):
    edit_lines(
        pair[1] / "stage3_placement" / "validation.jsonl",
        lambda line: None if line["kind"] == "end" and line["task"] == "weighing" else line,
    )
    with pytest.raises(RunFolderError, match=r"sequential/stage3_placement/validation.jsonl has no line of kind 'end'"):
        comparison_content(compared_runs(pair))
    shutil.rmtree(pair[0] / "stage2_weighing")
    with pytest.raises(RunFolderError, match="replay/stage2_weighing is missing"):
        comparison_content(compared_runs(pair))


def test_the_command_line_takes_runs_a_study_or_a_folder_of_runs(runs, tmp_path, capsys):
    first, second = runs["replay", 0], runs["sequential", 0]
    into = f"output={tmp_path / 'out'}"
    assert main([f"runs={first},{second}", into, "resamples=200"]) == 0
    study = tmp_path / "run-study"
    study.mkdir()
    cells = [{"folder": str(run), "status": "finished"} for run in (first, second)]
    cells.append({"folder": str(tmp_path / "not there"), "status": "failed"})
    (study / "study.json").write_text(json.dumps({"cells": cells}))
    assert main([f"runs={study}", "resamples=200"]) == 0
    assert (study / "report" / "comparison.html").is_file()
    assert main([f"runs={first.parent}", into, "resamples=200"]) == 0
    shown = capsys.readouterr().out
    assert f"comparison: {tmp_path / 'out' / 'comparison.html'}" in shown
    assert json.loads((tmp_path / "out" / "comparison.json").read_text())["seeds"] == [0, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["runs="], "runs must name at least two run folders"),
        (["runs=nowhere"], "nowhere is no run, no study and holds no runs"),
        (["runs=a,b", "run=c"], "run must not be given with runs="),
        (["output=a"], "output must not be given with run="),
    ],
)
def test_bad_arguments_of_a_comparison_end_in_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_no_number_of_a_comparison_is_infinite(compared):
    def numbers(value):
        if isinstance(value, dict):
            value = list(value.values())
        if isinstance(value, list):
            return [number for item in value for number in numbers(item)]
        return [value] if isinstance(value, float) else []

    assert all(map(math.isfinite, numbers(compared[0])))


def test_the_pictures_are_not_empty(compared):
    from PIL import Image

    _, page = compared
    names = {path.stem for path in Path(page.parent).glob("*.png")}
    assert names == {"stability_plasticity", "forgetting", *(f"matrix_{place}" for place in range(6))}
    for name in names:
        assert np.asarray(Image.open(page.parent / f"{name}.png").convert("L")).std() > 10
    assert set(TASKS.values()) == {task["name"] for task in compared[0]["tasks"]}
