"""Imports go one way: runnable → stage → evaluation, learning → data → config."""

import ast
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
MAY_IMPORT = {  # floor → project packages and modules it may import
    "kuavo_train/config.py": set(),
    # kuavo_sim.cpus, kuavo_sim.children: what both ask of the machine
    "kuavo_train/data": {"kuavo_train.config", "kuavo_train.data", "kuavo_sim.cpus", "kuavo_sim.children"},
    "kuavo_train/learning": {
        "kuavo_train.config",
        "kuavo_train.data",
        "kuavo_train.learning",
        "lerobot_policy_smolvla_memory",
    },
    # kuavo_sim: what a recording's cues are, only the simulation can say
    "kuavo_train/evaluation": {"kuavo_train.config", "kuavo_train.data", "kuavo_train.evaluation", "kuavo_sim"},
    "kuavo_train/wrapper": {"kuavo_train.data", "kuavo_train.wrapper", "lerobot_policy_smolvla_memory"},
    "kuavo_sim": {"kuavo_sim"},
    # kuavo_sim.lerobot: LeRobot's commands import this package alone, so it has to bring the environment along
    "lerobot_policy_smolvla_memory": {"lerobot_policy_smolvla_memory", "kuavo_sim.lerobot"},
}
OURS = ("kuavo_train", "kuavo_sim", "lerobot_policy_smolvla_memory")


def imported(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 or file.parts[-2] == "lerobot_policy_smolvla_memory", f"relative import in {file}"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} if node.level == 0 else set()
    return {name for name in names if name.split(".")[0] in OURS}


@pytest.mark.parametrize("floor", MAY_IMPORT)
def test_a_floor_imports_only_what_is_below_it(floor: str) -> None:
    path = REPOSITORY / floor
    files = [path] if path.is_file() else sorted(path.rglob("*.py"))
    assert files
    for file in files:
        for name in imported(file):
            allowed = any(name == below or name.startswith(below + ".") for below in MAY_IMPORT[floor])
            assert allowed, f"{file.relative_to(REPOSITORY)} must not import {name}"


def test_only_the_stage_and_the_runnables_know_both_learning_and_evaluation() -> None:
    for file in sorted((REPOSITORY / "kuavo_train").glob("*.py")):
        wings = {name.split(".")[1] for name in imported(file) if name.count(".") >= 1}
        if {"learning", "evaluation"} <= wings:
            assert file.name in ("stage.py", "opened_stage.py", "probes.py", "trained_run.py"), (
                f"{file.name} knows the whole"
            )
