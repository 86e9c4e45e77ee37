"""What each episode is told: the file's sentence, one of several, or the dataset's own; everywhere the same."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from small_datasets import write_dataset

from kuavo_train.compose import compose_run
from kuavo_train.config import RunConfig
from kuavo_train.data.checkpoint_tasks import KnownTasks
from kuavo_train.data.normalization import fit_normalization
from kuavo_train.data.sampler import Draw
from kuavo_train.data.task import Task, open_task
from kuavo_train.errors import ConfigError
from kuavo_train.runs.run_facts import write_run_facts
from kuavo_train.runs.run_folder import stage_folder
from kuavo_train.runs.trained_run import TrainedRun
from kuavo_train.stage.findings import Findings
from kuavo_train.stage.stage import run_stage
from kuavo_train.wrapper.policy.smolvla import SmolVLAPolicyWrapper

RED, BLUE = "pick the red one", "pick the blue one"
SENTENCES = ["Place the bottle", "Put the bottle down", "Set it down there"]
Alternating = Callable[..., Task]


def write_alternating(root: Path) -> None:
    """Six episodes, in turn of red and of blue, as the dataset says with a line break and spaces."""
    write_dataset(root, episodes=6, length=14, tasks=[f"{RED}\n", f" {BLUE}  "])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("told")
    write_alternating(folder / "moving_grasp")
    return folder


@pytest.fixture
def alternating(configs: list[RunConfig], folder: Path) -> Alternating:
    def opened(seed: int = 0, **stage: Any) -> Task:
        about = replace(configs[0].stage, root=str(folder / "moving_grasp"), **stage)
        return open_task(about, replace(configs[0].data, split_seed=seed))

    return opened


def sentences_in(task: Task) -> list[str]:
    """What each episode is told at its first frame."""
    return [task.instruction_at(row) for row in task.bounds[:, 0]]


def test_the_datasets_own_sentences_are_told_where_the_file_says_dataset(alternating: Alternating) -> None:
    task = alternating(instruction="dataset")
    assert sentences_in(task) == [RED, BLUE] * 3
    assert task.instructions.texts == (RED, BLUE)
    assert alternating(instruction="dataset", episodes=[1, 3]).instructions.recorded == {RED: 1, BLUE: 2}


def test_preflight_quotes_a_dataset_that_says_something_else(alternating: Alternating) -> None:
    def notes(**stage: Any) -> str:
        findings = Findings()
        findings.look_at_tasks([alternating(**stage)], {}, None)
        return "\n".join(findings.notes)

    quoted = f'moving_grasp: the dataset says "{RED}" (3 episodes), "{BLUE}" (3 episodes), its task\'s file another'
    assert quoted in notes()
    assert quoted in notes(instruction=[BLUE, RED])  # drawn, so that a red one may be told of as blue
    assert "the dataset says" not in notes(instruction="dataset")


def test_of_several_sentences_each_episode_is_told_one_and_always_the_same(alternating: Alternating) -> None:
    task = alternating(instruction=SENTENCES)
    assert set(sentences_in(task)) <= set(SENTENCES)
    assert len(set(sentences_in(task))) > 1
    assert sentences_in(alternating(instruction=SENTENCES)) == sentences_in(task)
    assert sentences_in(alternating(instruction=SENTENCES, episodes=[2, 5])) == sentences_in(task)
    assert sentences_in(alternating(seed=1, instruction=SENTENCES)) != sentences_in(task)
    for first, end in task.bounds:
        assert len({task.instruction_at(row) for row in range(first, end)}) == 1


def test_a_sentence_that_changes_within_an_episode_is_followed(configs: list[RunConfig], tmp_path: Path) -> None:
    root = tmp_path / "moving_grasp"
    write_alternating(root)
    path = root / "data" / "chunk-000" / "file-000.parquet"
    table = pd.read_parquet(path)
    table.loc[10:13, "task_index"] = 1
    table.to_parquet(path)
    stage = replace(configs[0].stage, root=str(root), instruction="dataset")
    task = open_task(stage, configs[0].data)
    assert [task.instruction_at(row) for row in range(8, 12)] == [RED, RED, BLUE, BLUE]
    table.loc[30:34, "task_index"] = 7
    table.to_parquet(path)
    with pytest.raises(
        ConfigError, match=r"rows of episode 2 have the task_index 7, which meta/tasks.parquet does not have"
    ):
        open_task(stage, configs[0].data)
    assert open_task(replace(stage, episodes=[3, 5]), configs[0].data)
    assert open_task(replace(stage, instruction="Do it"), configs[0].data).instruction == "Do it"


@pytest.mark.parametrize(
    ("instruction", "rule"),
    [
        ([], "instruction must not be empty"),
        (["a", " "], "instruction must not be empty"),
        (["a b", "a  b\n"], "instruction must not say one sentence twice"),
        (["dataset", "a"], "instruction must be dataset alone, or sentences"),
    ],
)
def test_instructions_that_cannot_be_meant_are_refused(
    configs: list[RunConfig], instruction: list[str], rule: str
) -> None:
    with pytest.raises(ConfigError, match=rf"stage 1 \(moving_grasp\): {rule}, got"):
        replace(configs[0].stage, instruction=instruction)


def test_one_sentence_in_two_tasks_is_refused(alternating: Alternating) -> None:
    first, second = (
        alternating(instruction=[*SENTENCES, RED]),
        replace(alternating(instruction="dataset"), name="other"),
    )
    findings = Findings()
    findings.look_at_tasks([first, second], {}, None)
    assert [problem for problem in findings.problems if "instruction" in problem] == [
        f'instruction of {name} must differ from all others, or the policy cannot tell the tasks apart, got "{RED}"'
        for name in ("moving_grasp", "other")
    ]


@pytest.fixture(scope="module")
def run(datasets: Path, small_run_in: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two stages: the dataset's own sentences, then, with that replayed, a task that is told one of three."""
    outputs = tmp_path_factory.mktemp("run")
    write_alternating(outputs / "data" / "moving_grasp")
    (outputs / "data" / "weighing").symlink_to(datasets / "weighing")
    configs = compose_run(
        small_run_in(
            outputs,
            f"data.root={outputs / 'data'}",
            "run=told",
            "learn=[moving_grasp,weighing]",
            "training.max_steps=2",
            "policy.num_mem_tokens=0",
        )
    )
    stages = [
        replace(configs[0].stage, instruction="dataset"),
        replace(configs[1].stage, instruction=SENTENCES),
    ]
    for config, stage in zip(configs, stages, strict=True):
        assert run_stage(replace(config, stage=stage), stages) == 0
    return outputs / "told"


def test_every_part_of_a_run_tells_an_episode_the_same(run: Path) -> None:
    trained = TrainedRun.open(run)
    first, second = trained.tasks
    assert (first.instructions.texts, second.instructions.texts) == ((RED, BLUE), tuple(SENTENCES))
    assert sentences_in(first) == [RED, BLUE] * 3
    settings = trained.settings
    replayed = trained.dataset(trained.tasks, trained.policy(trained.checkpoint(trained.stages[-1]))[0].config)
    batch = replayed.fetch([Draw(0, 0), Draw(1, 0), Draw(0, 14), Draw(0, 13)])
    assert batch.instructions == [RED, second.instruction_at(0), BLUE, RED]
    facts = json.loads((run / "run.json").read_text())["tasks"]
    assert [task["instructions"] for task in facts] == [[RED, BLUE], SENTENCES]
    assert settings.stage.instruction == SENTENCES

    result = stage_folder(trained.config(trained.stages[-1])).checkpoints.at("best").pretrained_model
    card = (result / "README.md").read_text()
    assert f"- **moving_grasp**, one of:\n  - {RED}\n  - {BLUE}\n- **weighing**, one of:\n  - {SENTENCES[0]}\n" in card
    tokenizer = json.loads((result / "vlm" / "tokenizer.json").read_text())
    assert {"Ġred", "Ġblue", "Ġbottle"} <= set(tokenizer["model"]["vocab"])  # the words of all sentences


def test_a_task_that_was_learnt_keeps_its_words(run: Path) -> None:
    trained = TrainedRun.open(run)
    config, curriculum = trained.config(trained.stages[-1]), trained.curriculum
    first, second = trained.tasks
    write_run_facts(
        config, curriculum, [first, replace(second, instructions=first.instructions)], trained.normalization
    )
    write_run_facts(config, curriculum, trained.tasks, trained.normalization)
    for words in (replace(first.instructions, texts=(RED, "pick blue")), replace(first.instructions, own=False)):
        with pytest.raises(
            ConfigError, match=r"the instructions.* of moving_grasp must stay what it was learnt with in"
        ):
            write_run_facts(config, curriculum, [replace(first, instructions=words), second], trained.normalization)


def test_the_longest_sentence_of_a_task_has_to_fit(alternating: Alternating, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "kuavo_train.stage.findings.token_counts", lambda _, texts: [len(text.split()) for text in texts]
    )
    task, findings = alternating(instruction=[RED, "pick the blue one, which is not the red one", BLUE]), Findings()
    findings.look_at_tasks([task], {}, None)
    policy = SimpleNamespace(tokenizer_max_length=8, type="smolvla_memory")
    findings.look_at_policy_config(policy, [task], fit_normalization([task], "joint"))  # type: ignore[arg-type]
    assert findings.facts["tasks"][0]["tokens"] == 10
    assert findings.problems[0].startswith(
        'instruction of moving_grasp ("pick the blue one, which is not the red one") must fit policy.tokenizer_max'
    )


def test_a_robot_may_be_told_any_of_a_tasks_sentences(run: Path, recwarn: pytest.WarningsRecorder) -> None:
    trained = TrainedRun.open(run)
    wrapper = SmolVLAPolicyWrapper.from_pretrained(trained.checkpoint(trained.stages[-1]).folder, device="cpu", seed=0)
    random = np.random.default_rng(0)
    look = {camera: random.integers(0, 256, (32, 32, 3), dtype=np.uint8) for camera in wrapper.cameras}
    look["observation.state"] = np.zeros(16, np.float32)

    def action(task: str) -> np.ndarray:
        wrapper.reset()
        return np.asarray(wrapper.select_action({**look, "task": task}))

    assert np.array_equal(action("moving_grasp"), action(RED))
    assert not np.array_equal(action(BLUE), action(RED))
    assert [wrapper.known.closest(text).task.name for text in (RED, BLUE, *SENTENCES)] == ["moving_grasp"] * 2 + [
        "weighing"
    ] * 3
    action("put a bottle down")
    assert not [str(warning.message) for warning in recwarn if "never trained" in str(warning.message)]


def test_a_checkpoint_of_before_knows_one_sentence_of_each_task(run: Path, tmp_path: Path) -> None:
    trained = TrainedRun.open(run)
    known = KnownTasks.load(trained.checkpoint(trained.stages[-1]).pretrained_model)
    older = asdict(known)
    for task in older["tasks"]:
        task["instruction"] = task.pop("instructions")[1]
    (tmp_path / "tasks.json").write_text(json.dumps(older))
    assert [task.instructions for task in KnownTasks.load(tmp_path).tasks] == [(BLUE,), (SENTENCES[1],)]
