"""Imports go downward only, from the commands to the errors, and no circle ties modules together."""

import ast
import graphlib
import re
from collections.abc import Mapping
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
OURS = ("kuavo_train", "kuavo_sim", "kuavo_client", "lerobot_policy_smolvla_memory")
FLOORS = [  # of kuavo_train, from the ground up; those of one floor do not import each other
    {"errors", "metrics"},
    {"interruption", "reading"},
    {"config"},
    {"config_folders", "data"},
    {"keys"},
    {"compose"},
    {"command_line", "training", "wrapper"},
    {"launcher", "runs", "serving"},
    {"engine", "strategies"},
    {"reporting"},
    {"evaluation"},
    {"stage"},
    {"probing"},
    {"__main__", "cache", "evaluate", "export_replay", "inspect_data", "memory_report", "preflight", "report", "serve"},
    {"curriculum", "probes"},
    {"base", "study"},
]
NEIGHBOURS = {  # package beside kuavo_train → rooms that may import it
    # those that carry its memory from query to query, and those that build or open a policy
    "lerobot_policy_smolvla_memory": {"evaluation", "probing", "runs", "training", "wrapper"},
    # what both ask of the machine; recordings made on the spot; environments; what a recording's cues are
    "kuavo_client": {"evaluation"},  # the hand-over that is measured is the one that robots run
    "kuavo_sim": {"data", "engine", "evaluation", "interruption", "launcher", "probing", "stage"},
}


def imported(file: Path) -> set[str]:
    """Dotted names of this project that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 or file.parts[-2] == "lerobot_policy_smolvla_memory", f"relative import in {file}"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} if node.level == 0 else set()
    return {name for name in names if name.split(".")[0] in OURS}


def rooms() -> dict[str, list[Path]]:
    """Folder or module of kuavo_train → its files."""
    top = REPOSITORY / "kuavo_train"
    files = {path.stem: [path] for path in top.glob("*.py") if path.name != "__init__.py"}
    return files | {path.parent.name: sorted(path.parent.rglob("*.py")) for path in top.glob("*/__init__.py")}


@pytest.mark.parametrize("room", sorted(rooms()))
def test_a_room_imports_only_what_lies_below_it(room: str) -> None:
    height = {name: number for number, floor in enumerate(FLOORS) for name in floor}
    for file in rooms()[room]:
        for name in imported(file):
            package, _, inside = name.partition(".")
            below = inside.split(".")[0]
            where = f"{file.relative_to(REPOSITORY)} must not import {name}"
            if package == "kuavo_train":
                assert below == room or height[below] < height[room], where
            else:
                assert room in NEIGHBOURS[package], where


def test_no_room_is_missing_in_the_table_of_floors() -> None:
    assert sorted(rooms()) == sorted(name for floor in FLOORS for name in floor)


def test_the_architecture_lists_the_floors_in_their_order() -> None:
    page = (REPOSITORY / "docs" / "explanation" / "architecture.md").read_text()
    (drawn,) = re.findall(r"Imports go downward only: commands → ([^.]*)\.", page)
    height = {name: number for number, floor in enumerate(FLOORS) for name in floor}
    heights = [height[room] for room in re.split(r"\s*→\s*", drawn)]
    assert heights == sorted(set(heights), reverse=True)


def test_the_packages_beside_know_nothing_of_the_training_nor_of_each_other() -> None:
    for package in NEIGHBOURS:
        for file in (REPOSITORY / package).rglob("*.py"):
            assert {name.partition(".")[0] for name in imported(file)} <= {package}, file


def test_no_circle_ties_modules_of_the_training_together() -> None:
    modules = {
        ".".join(file.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__"): file
        for file in (REPOSITORY / "kuavo_train").rglob("*.py")
    }
    graph = {
        module: {_module_of(name, modules) for name in imported(file) if name.startswith("kuavo_train")} - {module}
        for module, file in modules.items()
    }
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError with the circle


def _module_of(name: str, modules: Mapping[str, Path]) -> str:
    return name if name in modules else name.rpartition(".")[0]


SIMULATION = [  # from the ground up; those of one storey do not import each other
    {"kuavo_sim"},  # which Python imports before any of them
    {"arguments", "children", "cpus", "picture_size", "robot"},
    {"render", "scene"},
    {"motions"},
    {"tasks.task"},
    {"tasks.moving_grasp", "tasks.placement", "tasks.sorting", "tasks.weighing"},
    {"skills.words", "tasks"},
    {"skills.things"},
    {"skills.skill"},
    {"skills.drive", "skills.hand_over", "skills.put", "skills.shown"},
    {"skills"},
    {"repertoire"},
    {"env"},
    {"expert", "lerobot.environment"},
    {"lerobot.robot", "sheet"},
    {"lerobot", "record"},
]
POLICY = [
    {"adapters", "configuration_smolvla_memory", "frames", "parameter_groups", "precision", "prefix", "query_schedule"},
    {"tiny_vlm_words", "vision", "vlm_description"},
    {"flow", "memory", "pretrained_weights", "processor_smolvla_memory"},
    {"backbone", "lerobot_forward", "tiny_vlm"},
    {"flow_model"},
    {"modeling_smolvla_memory"},
    {"graphed_query"},
    {"lerobot_policy_smolvla_memory"},  # which registers them
]


@pytest.mark.parametrize(("package", "storeys"), [("kuavo_sim", SIMULATION), ("lerobot_policy_smolvla_memory", POLICY)])
def test_a_package_beside_has_no_circle(package: str, storeys: list[set[str]]) -> None:
    height = {name: number for number, storey in enumerate(storeys) for name in storey}
    modules = {_within(package, file): file for file in (REPOSITORY / package).rglob("*.py")}
    assert modules.keys() == height.keys()
    for module, file in modules.items():
        for name in imported(file):
            below = _module_of_package(package, name, modules)
            assert height[below] < height[module], f"{module} must not import {below}"


def _within(package: str, file: Path) -> str:
    """The dotted name of a module inside its package; of the package itself its own."""
    parts = file.relative_to(REPOSITORY / package).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__") or package


def _module_of_package(package: str, name: str, modules: Mapping[str, Path]) -> str:
    """The module of a package that an imported name is, or is in."""
    module = name.removeprefix(f"{package}.")
    while module not in modules:
        module = module.rpartition(".")[0] or package
    return module
