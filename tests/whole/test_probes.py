"""The probes on a run of two stages: their yardsticks are the run's own validations, and nothing of the run changes."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from reading import bare_page_of

from kuavo_train.compose import compose_run
from kuavo_train.errors import ConfigError, RunFolderError
from kuavo_train.metrics.number_format import FORMATS
from kuavo_train.probes import main
from kuavo_train.probing.instruction_swap import swap_instructions
from kuavo_train.probing.memory_interventions import donors_among
from kuavo_train.probing.memory_walk import MemoryProbe
from kuavo_train.probing.recovery import alone, recovery
from kuavo_train.probing.run_probes import run_probe
from kuavo_train.probing.validated_run import NothingToProbe
from kuavo_train.reporting.html_page import look_up
from kuavo_train.reporting.run_analysis import analyse
from kuavo_train.reporting.write_report import write_report
from kuavo_train.runs.stored_run import StoredRun
from kuavo_train.runs.trained_run import TrainedRun
from kuavo_train.strategies.chosen import chosen_strategy
from kuavo_train.training.optimizer import build_optimizer


@pytest.fixture(scope="module")
def run(simulated_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weighing, whose cue must be remembered, then placement, which has none; probed once."""
    folder = tmp_path_factory.mktemp("probes") / "smoke"
    shutil.copytree(simulated_run, folder, symlinks=True)
    assert main([f"run={folder}", "probe=recovery", "steps=2"]) == 0
    for probe in ("instruction_swap", "memory"):  # without the page, which the command writes anew after each
        run_probe(probe, folder)
    return folder


def found(run: Path, probe: str) -> dict[str, Any]:
    return json.loads((run / "report" / "probes" / f"{probe}.json").read_text())


def validated(run: Path, stage: str, kind: str, task: str) -> dict[str, Any]:
    lines = map(json.loads, (run / stage / "validation.jsonl").read_text().splitlines())
    return next(line for line in lines if (line["kind"], line["task"]) == (kind, task))


def test_recovery_starts_from_the_final_policy_and_from_the_weights_before_the_task_was_learnt(run: Path) -> None:
    (task,) = found(run, "recovery")["tasks"]
    assert task["task"] == "weighing"
    assert task["steps"] == [0, 1, 2]
    assert task["final"][0] == pytest.approx(validated(run, "stage3_placement", "end", "weighing")["loss"], rel=1e-5)
    assert task["before"][0] == pytest.approx(validated(run, "stage2_weighing", "start", "weighing")["loss"], rel=1e-5)
    assert task["loss_when_learnt"] == validated(run, "stage2_weighing", "end", "weighing")["loss"]
    assert task["final"][2] != task["final"][0]


@pytest.mark.parametrize(
    "override",
    ["forgetting.budget=0.1 forgetting.on_exceed=raise_replay", "strategy=ewc", "strategy_settings={weight:1}"],
)
def test_what_a_strategy_or_a_gate_did_is_left_out_of_recovery(override: str) -> None:
    recipe = alone(compose_run(override.split(" "))[1])
    assert chosen_strategy(recipe).shares(recipe, {"weighing": 9}) == {"weighing": 1.0}


def test_the_learning_rate_of_recovery_goes_through_its_whole_schedule(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = TrainedRun.open(run)
    recipe = trained.config(trained.stages[0]).training
    schedulers = []

    def build(*arguments: Any, **settings: Any) -> Any:
        optimizer, scheduler = build_optimizer(*arguments, **settings)
        schedulers.append(scheduler)
        return optimizer, scheduler

    monkeypatch.setattr("kuavo_train.training.learner.build_optimizer", build)
    recovery(trained, steps=1)  # half of what the stage took
    for scheduler in schedulers:
        assert scheduler.base_lrs == [recipe.lr]
        assert scheduler.get_last_lr() == [pytest.approx(recipe.decay_lr)]
    assert len(schedulers) == 2


def test_the_action_error_with_the_own_instruction_is_the_validations(run: Path) -> None:
    record = found(run, "instruction_swap")
    assert [task["task"] for task in record["tasks"]] == ["weighing", "placement"]
    for task, other in zip(record["tasks"], ("placement", "weighing"), strict=True):
        line = validated(run, "stage3_placement", "end", task["task"])
        assert task["error"] == pytest.approx(line["action_error"], rel=1e-4)
        (swap,) = task["swaps"]
        assert swap["instruction_of"] == other
        assert swap["change"]["estimate"] == pytest.approx(task["change"]["estimate"])
        assert swap["change"]["estimate"] > 0


def test_the_same_words_move_no_action(run: Path) -> None:
    trained = TrainedRun.open(run)
    policy, preprocessor = trained.policy(trained.checkpoint(trained.stages[-1]))
    probe = MemoryProbe(policy, trained.dataset(trained.tasks, policy.config), preprocessor)
    weighing, placement = trained.tasks
    object.__setattr__(placement, "instructions", weighing.instructions)
    moved = swap_instructions(probe, ["weighing", "placement"], advance=lambda: None)[0]
    assert moved["change"]["estimate"] == 0.0
    assert moved["noise"]["estimate"] > 0


def test_memory_on_is_the_validation_after_every_stage_and_another_memory_is_not(run: Path) -> None:
    record = found(run, "memory")
    assert [stage["name"] for stage in record["stages"]] == ["weighing", "placement"]
    for stage in record["stages"]:
        for task in stage["tasks"]:
            line = validated(run, f"stage{stage['stage']}_{stage['name']}", "end", task["task"])
            for measure in ("loss", "action_error"):
                assert task[measure]["on"] == pytest.approx(line[measure], rel=1e-5)
                assert task[measure]["reset"] != task[measure]["on"] != task[measure]["swapped"]
    weighing, placement = record["stages"][-1]["tasks"]
    assert list(weighing["decision"]["interventions"]) == ["on", "reset", "frozen", "swapped"]
    assert weighing["decision"]["n"] == 2
    assert placement["decision"] is None


def test_a_probe_gives_the_same_numbers_again_and_leaves_the_run_as_it_was(run: Path) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and "report" not in path.parts}
    numbers = found(run, "recovery")
    run_probe("recovery", run, steps=2)
    assert found(run, "recovery") == numbers
    after = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and "report" not in path.parts}
    assert after == before


class Numbers(HTMLParser):
    def __init__(self, html: str):
        super().__init__()
        self.found: list[tuple[str, str, str]] = []
        self._open: tuple[str, str] | None = None
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        pointer, form = attributes.get("data-pointer"), attributes.get("data-form")
        self._open = (pointer, form) if pointer and form else None

    def handle_data(self, data: str) -> None:
        if self._open:
            self.found.append((*self._open, data))
            self._open = None


def test_the_report_has_a_section_for_each_probe_whose_numbers_are_those_stored(run: Path) -> None:
    html = write_report(analyse(StoredRun.open(run))).read_text(encoding="utf-8")
    matrix = json.loads((run / "report" / "matrix.json").read_text())
    shown = Numbers(html).found
    for pointer, form, text in shown:
        assert text == FORMATS[form](look_up(matrix, pointer)), pointer
    for probe in ("recovery", "instruction_swap", "memory"):
        assert sum(pointer.startswith(f"/probes/{probe}/") for pointer, _, _ in shown) > 8
        assert {key: matrix["probes"][probe][key] for key in found(run, probe)} == found(run, probe)
    for title in ("Lost, or only suppressed?", "Does it listen to language?", "What the memory is worth"):
        assert f"<h2>{title}</h2>" in html
    assert "Of an earlier state of this run" not in html


def test_a_probe_of_another_checkpoint_is_marked_as_such(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "smoke"
    shutil.copytree(run, copy)
    path = copy / "report" / "probes" / "memory.json"
    path.write_text(json.dumps({**found(run, "memory"), "checkpoint_hash": "0" * 64}))
    assert bare_page_of(copy).text.count("Of an earlier state of this run") == 1


def test_donors_have_another_cue_where_there_is_one() -> None:
    assert donors_among([0, 0, 1, 0]) == [2, 2, 3, 2]
    assert donors_among([None, None, None]) == [1, 2, 0]
    assert donors_among([5]) == [0]


def test_a_run_whose_data_were_changed_is_refused(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "smoke"
    shutil.copytree(run, copy)
    facts = json.loads((copy / "run.json").read_text())
    facts["tasks"][0]["dataset"]["hash"] = "0" * 64
    (copy / "run.json").write_text(json.dumps(facts))
    with pytest.raises(ConfigError, match=r"content hash of .*weighing must be what .*smoke was trained with, 000"):
        run_probe("instruction_swap", copy)


def test_a_damaged_checkpoint_and_one_of_another_run_are_refused(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "smoke"
    shutil.copytree(run, copy, symlinks=True)
    best = (copy / "stage3_placement" / "checkpoints" / "best").resolve()
    weights = best / "pretrained_model" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1])
    with pytest.raises(ConfigError, match=r"checkpoint file .*model.safetensors must have sha256"):
        run_probe("instruction_swap", copy)
    weights.write_bytes(content)
    manifest = json.loads((best / "manifest.json").read_text())
    (best / "manifest.json").write_text(json.dumps({**manifest, "run": "another"}))
    with pytest.raises(RunFolderError, match="is a checkpoint of another run: its run is another"):
        run_probe("instruction_swap", copy)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no run under outputs/: train one first"),
        (["run=RUN", "probe=taste"], "probe must be one of recovery, instruction_swap, memory, got 'taste'"),
        (["run=nowhere"], "nowhere does not exist"),
        (["run=RUN", "probe=recovery", "steps=many"], "steps must be a whole number, got 'many'"),
        (["run=RUN", "probe=recovery", "steps=0"], "steps must be at least 1, got 0"),
        (["run=RUN", "probe=memory", "steps=5"], "steps must go with probe=recovery"),
        (["colour=red"], "arguments must be key=value with a key of run, probe, steps, got 'colour=red'"),
    ],
)
def test_bad_input_is_named(
    run: Path, words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([word.replace("RUN", str(run)) for word in words]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert message in error


def test_what_a_run_has_nothing_for_is_left_out_and_named_when_asked_for(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    copy = tmp_path / "smoke"
    shutil.copytree(run, copy, symlinks=True)
    shutil.rmtree(copy / "stage3_placement")
    with pytest.raises(NothingToProbe, match="recovery needs a task learnt before the last stage, got none in"):
        run_probe("recovery", copy)
    config = copy / "stage2_weighing" / "config.yaml"
    config.write_text(re.sub(r"num_mem_tokens: \d+", "num_mem_tokens: 0", config.read_text()))
    with pytest.raises(NothingToProbe, match=r"memory needs policy.num_mem_tokens or mem_frames of at least 1, got 0"):
        run_probe("memory", copy)
    assert main([f"run={copy}"]) == 0
    shown = capsys.readouterr().out
    assert "recovery: left out" in shown
    assert "memory: left out" in shown
