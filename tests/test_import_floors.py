"""Imports go one way: runnable → stage → evaluation, learning → data → config."""

import ast
from collections.abc import Mapping
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
MAY_IMPORT = {  # floor → project packages and modules it may import
    "kuavo_train/config.py": set(),
    # kuavo_sim.cpus, kuavo_sim.children: what both ask of the machine
    "kuavo_train/runs/lease.py": {"kuavo_train.config"},
    "kuavo_train/data": {"kuavo_train.config", "kuavo_train.data", "kuavo_sim.cpus", "kuavo_sim.children"},
    "kuavo_train/learning": {
        "kuavo_train.config",
        "kuavo_train.data",
        "kuavo_train.learning",
        "lerobot_policy_smolvla_memory",
    },
    # kuavo_sim: what a recording's cues are, only the simulation can say
    # kuavo_train.runs.lease: whether a stage that says it is running still is
    "kuavo_train/evaluation": {
        "kuavo_train.config",
        "kuavo_train.runs.lease",
        "kuavo_train.data",
        "kuavo_train.evaluation",
        "kuavo_sim",
    },
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


SIMULATION = [  # from the ground up; those of one storey do not import each other
    {"arguments", "children", "cpus", "robot"},
    {"render", "scene"},
    {"motions"},
    {"tasks.task"},
    {"tasks.moving_grasp", "tasks.placement", "tasks.sorting", "tasks.weighing"},
    {"tasks"},
    {"env"},
    {"kuavo_sim"},
    {"expert", "lerobot.environment"},
    {"lerobot.robot", "sheet"},
    {"lerobot", "record"},
]


def test_the_simulation_has_no_circle() -> None:
    storeys = {name: number for number, storey in enumerate(SIMULATION) for name in storey}
    modules = {_module(file): file for file in (REPOSITORY / "kuavo_sim").rglob("*.py")}
    assert modules.keys() == storeys.keys()
    for module, file in modules.items():
        for name in imported(file):
            below = _of_simulation(name, storeys)
            assert storeys[below] < storeys[module], f"{module} must not import {below}"


def _module(file: Path) -> str:
    parts = file.relative_to(REPOSITORY / "kuavo_sim").with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__") or "kuavo_sim"


def _of_simulation(name: str, storeys: Mapping[str, int]) -> str:
    """The module of kuavo_sim that an imported name is, or is in."""
    module = name.removeprefix("kuavo_sim.") if name != "kuavo_sim" else name
    while module not in storeys:
        module = module.rpartition(".")[0] or "kuavo_sim"
    return module
