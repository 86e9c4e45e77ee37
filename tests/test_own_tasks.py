"""A user's own tasks and groups, in folders of their own."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from kuavo_train.compose import compose_run
from kuavo_train.errors import ConfigError
from kuavo_train.stage.lineage import result_before
from kuavo_train.study import compose_cells

THE_FOUR = ["moving_grasp", "weighing", "placement", "sorting"]


def task(name: str, index: int, replay: str) -> str:
    """The text of a task's file."""
    return f"""\
stage:
  name: {name}
  index: {index}
  instruction: Take the bottle and lay it down in the yellow area.
  epochs: 4
  lr: 5.0e-5
  warmup_steps: 0
  decay_steps: 100
  replay: {{{replay}}}
  root: ${{data.root}}/{name}
  simulation_task: placement
"""


PICK = task("pick", 1, "pick: 1.0")
STACK = task("stack", 5, "sorting: 0.5, stack: 0.5")


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`my tasks` with two tasks and `more` with one and a group's choice, where commands are called."""
    monkeypatch.chdir(tmp_path)
    for path, text in {
        "my tasks/a_pick.yaml": PICK,
        "my tasks/b_weigh.yaml": task("weigh", 2, "pick: 0.25, weigh: 0.75"),
        "more/tasks/task5_stack.yaml": STACK,
        "more/memory/vast.yaml": "# @package policy\nnum_mem_tokens: 32\n",
    }.items():
        write(path, text)


def write(path: str, text: str) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text)


def test_tasks_dir_takes_the_place_of_the_four() -> None:
    configs = compose_run(["tasks_dir=my tasks"])
    assert [config.stage.folder_name for config in configs] == ["stage1_pick", "stage2_weigh"]
    assert configs[1].stage.replay == {"pick": 0.25, "weigh": 0.75}
    assert configs[0].stage.root == "outputs/data/pick"  # of the working directory


def test_config_dir_adds_tasks_and_groups_to_those_that_are_there() -> None:
    configs = compose_run(["config_dir=more", "memory=vast"])
    assert [config.stage.name for config in configs] == [*THE_FOUR, "stack"]
    assert {config.policy["num_mem_tokens"] for config in configs} == {32}


def test_learn_chooses_among_own_tasks_and_the_four() -> None:
    configs = compose_run(["config_dir=more", "learn=[sorting,stack]"])
    assert [config.stage.folder_name for config in configs] == ["stage1_sorting", "stage2_stack"]
    with pytest.raises(ConfigError, match=r"learn must name tasks of my tasks and more/tasks \(pick, weigh, stack\)"):
        compose_run(["config_dir=more", "tasks_dir=my tasks", "learn=[sorting]"])


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["tasks_dir=my tasks"], "pick"),  # the first, where none is chosen
        (["tasks_dir=my tasks", "task=tasks/b_weigh"], "weigh"),
        (["--config-dir", "more", "task=tasks/task5_stack"], "stack"),
        (["-cd=more", "task=tasks/task5_stack", "memory=vast"], "stack"),
    ],
)
def test_a_command_line_finds_own_tasks(
    here: Callable[..., subprocess.CompletedProcess[str]], words: list[str], name: str
) -> None:
    shown = here("kuavo_train", *words, "--cfg", "job")
    assert shown.returncode == 0, shown.stderr
    assert f"  name: {name}\n" in shown.stdout


def test_a_study_takes_own_tasks_too() -> None:
    _, shared, (cell,) = compose_cells(["--config-dir", "more", "strategy=replay", "seed=0", "learn=[sorting,stack]"])
    assert [config.stage.name for config in cell.configs] == ["sorting", "stack"]
    assert shared == ["config_dir='more'", "learn=[sorting,stack]"]


def test_the_command_for_the_stage_before_names_the_own_folder_and_file() -> None:
    configs = compose_run(["tasks_dir=my tasks", "config_dir=more", "learn=[pick,weigh]"])
    message = "task=tasks/a_pick run=embedded 'tasks_dir=my tasks' config_dir=more profile=embedded 'learn="
    with pytest.raises(ConfigError, match=message):
        result_before(configs[1], [config.stage for config in configs])


REFUSED = [  # file that is added, its text, words, what is told
    ("", "", "tasks_dir=nowhere", r"tasks_dir must be a folder, relative to the one that .*, got 'nowhere'"),
    ("", "", "tasks_dir=more", r"tasks_dir must hold at least one task file \(\*.yaml\), got 'more'"),
    ("", "", "tasks_dir=a,b", r"tasks_dir must be one folder, got 'tasks_dir=a,b'"),
    ("", "", "config_dir=nowhere", r"config_dir must be a folder, .*, got 'nowhere'"),
    ("", "", "config_dir=my tasks", r"config_dir must hold folders of YAML files .* tasks_dir=…\), got 'my tasks'"),
    ("more/policy/act.yaml", "a: 1", "config_dir=more", r"config_dir must give its files other .*'policy/act.yaml'"),
    ("my tasks/c.yaml", PICK, "tasks_dir=my tasks", r"a_pick.yaml and my tasks/c.yaml: stage.name must be .*'pick'"),
    (
        "my tasks/c.yaml",
        task("other", 1, "other: 1.0"),
        "tasks_dir=my tasks",
        r"my tasks/a_pick.yaml and my tasks/c.yaml: stage.index must be unique, got 1",
    ),
    (
        "more/tasks/task4_sorting.yaml",
        STACK,
        "config_dir=more",
        r"task4_sorting.yaml and more/tasks/task4_sorting.yaml: the file's name must be unique, got 'task4_sorting'",
    ),
    ("my tasks/a task.yaml", PICK, "tasks_dir=my tasks", r"my tasks/a task.yaml must be named by letters, digits"),
]


@pytest.mark.parametrize(("path", "text", "word", "message"), REFUSED, ids=[item[3] for item in REFUSED])
def test_folders_that_cannot_be_meant_are_refused(path: str, text: str, word: str, message: str) -> None:
    if path:
        write(path, text)
    with pytest.raises(ConfigError, match=message):
        compose_run([word])
