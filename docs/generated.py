"""Parts of the documentation that are read from the code: `make docs` puts them where a page has their marker.

A page holds `<!-- generated: configuration -->`; the functions of `PARTS` return Markdown.
"""

import ast
import dataclasses
import inspect
import io
import re
import tokenize
import tomllib
import typing
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

from kuavo_train import config
from kuavo_train.command_line import usage
from kuavo_train.config import CONFIG_FOLDER, RunConfig
from kuavo_train.runs.settings import MEASURED, is_free

REPOSITORY = Path(__file__).resolve().parents[1]
MARKER = re.compile(r"^<!-- generated: (\w+) -->$", re.MULTILINE)
COMMANDS = (
    "kuavo_train/__main__.py",
    "kuavo_train/curriculum.py",
    "kuavo_train/study.py",
    "kuavo_train/base.py",
    "kuavo_train/preflight.py",
    "kuavo_train/export_replay.py",
    "kuavo_train/inspect_data.py",
    "kuavo_train/cache.py",
    "kuavo_train/report.py",
    "kuavo_train/evaluate.py",
    "kuavo_train/serve.py",
    "kuavo_train/probes.py",
    "kuavo_train/memory_report.py",
    "kuavo_sim/record.py",
    "kuavo_sim/expert.py",
    "benchmarks/__main__.py",
)
OPTIONS = {  # module with the dataclass of the command's own key=value words
    "kuavo_train.report": "kuavo_train.report",
    "kuavo_train.evaluate": "kuavo_train.evaluation.options",
    "kuavo_train.serve": "kuavo_train.serve",
    "kuavo_train.probes": "kuavo_train.probes",
    "kuavo_train.memory_report": "kuavo_train.probing.memory_report",
}
GROUPS = ("profile", "base", "policy", "strategy", "engine", "memory", "finetune", "recipe", "tasks")
POLICY = REPOSITORY / "lerobot_policy_smolvla_memory" / "configuration_smolvla_memory.py"


@dataclasses.dataclass(frozen=True)
class Key:
    name: str
    kind: str
    default: str
    help: str

    @property
    def may_differ(self) -> str:
        """Whether a run that is called again may have another value."""
        if is_free(self.name):
            return "yes"
        return "until finished" if self.name in MEASURED else "no"


@dataclasses.dataclass(frozen=True)
class Section:
    name: str
    help: str
    keys: list[Key]


def on_page_markdown(markdown: str, **_: Any) -> str:
    """MkDocs' hook: the page with its markers replaced."""
    return MARKER.sub(lambda match: PARTS[match[1]](), markdown)


def configuration() -> str:
    parts = []
    for section in sections():
        title = f"`{section.name}`" if section.name else "The run itself"
        rows = [(f"`{key.name}`", f"`{key.kind}`", key.default, key.may_differ, key.help) for key in section.keys]
        parts += [f"## {title}", section.help, _table(("key", "type", "default", "may differ later", "meaning"), rows)]
    return "\n\n".join(parts)


def policy_fields() -> str:
    """Fields that the memory adds to LeRobot's SmolVLA config, with their docstring."""
    module = ast.parse(POLICY.read_text())
    (found,) = [each for each in module.body if isinstance(each, ast.ClassDef) and each.name == "SmolVLAMemoryConfig"]
    arguments = (ast.get_docstring(found) or "").split("Args:\n")[1]
    helps = {
        name.strip(): " ".join(text.split())
        for names, text in re.findall(r"^ {4}([\w, ]+): (.*(?:\n {5,}.*)*)", arguments, re.MULTILINE)
        for name in names.split(",")
    }
    rows = [
        (f"`policy.{each.target.id}`", _cell(f"`{ast.unparse(each.annotation)}`"),
         f"`{ast.literal_eval(each.value)!r}`", _cell(helps[each.target.id]))
        for each in found.body
        if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name) and each.value is not None
    ]  # fmt: skip
    return _table(("key", "type", "default of the class", "meaning"), rows)


def groups() -> str:
    """Every file of configs/ that a word on the command line chooses, with what it says of itself."""
    rows = []
    for group in GROUPS:
        for path in sorted((CONFIG_FOLDER / group).glob("*.yaml")):
            word = f"task=tasks/{path.stem}" if group == "tasks" else f"{group}={path.stem}"
            comment = [line[1:].strip() for line in path.read_text().splitlines() if line.startswith("# ")]
            rows.append((f"`{word}`", _cell(" ".join(line for line in comment if not line.startswith("@package")))))
    return _table(("word", "what it is for"), rows)


def commands() -> str:
    parts = []
    for name in COMMANDS:
        module = name.removesuffix(".py").removesuffix("/__main__").replace("/", ".")
        docstring = ast.get_docstring(ast.parse((REPOSITORY / name).read_text())) or ""
        text = usage(import_module(OPTIONS[module]).Options, docstring) if module in OPTIONS else docstring
        parts.append(f"## python -m {module}\n\n```text\n{text}\n```")
    return "\n\n".join(parts)


def make_targets() -> str:
    found = re.findall(r"^([a-z-]+):.*## (.*)$", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    return _table(("target", "what it does"), [(f"`make {name}`", _cell(text)) for name, text in found])


def scripts() -> str:
    found = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["scripts"]
    rows = [
        (f"`{name}`", f"`python -m {target.split(':')[0].removesuffix('.__main__')}`") for name, target in found.items()
    ]
    return _table(("installed command", "the same as"), rows)


PARTS: dict[str, Callable[[], str]] = {
    "configuration": configuration,
    "policy_fields": policy_fields,
    "groups": groups,
    "commands": commands,
    "make_targets": make_targets,
    "scripts": scripts,
}


def sections() -> list[Section]:
    """RunConfig and every dataclass in it, in the order of its fields."""
    root = yaml.safe_load((CONFIG_FOLDER / "train.yaml").read_text())
    return list(_sections(RunConfig, "", root, _yaml_comments(CONFIG_FOLDER / "train.yaml")))


def _sections(schema: type, where: str, values: Any, yaml_helps: dict[str, str]) -> Iterator[Section]:
    hints, helps, keys, inner = typing.get_type_hints(schema), _comments(schema), [], []
    for field in dataclasses.fields(schema):
        name = f"{where}{field.name}"
        below = [each for each in (hints[field.name], *typing.get_args(hints[field.name])) if _is_section(each)]
        value = values.get(field.name, dataclasses.MISSING) if isinstance(values, dict) else dataclasses.MISSING
        inner += [(each, f"{name}.", value) for each in below]
        if not below or type(None) in typing.get_args(hints[field.name]):
            text = helps.get(field.name) or yaml_helps.get(name, "")
            keys.append(Key(name, _kind(schema, field), _default(field, value), _cell(text)))
    # A dataclass that says nothing of itself has its signature for a docstring.
    text = inspect.getdoc(schema) or ""
    yield Section(where.rstrip("."), "" if text.startswith(f"{schema.__name__}(") else text, keys)
    for each, name, value in inner:
        yield from _sections(each, name, value, yaml_helps)


def _is_section(kind: Any) -> bool:
    return dataclasses.is_dataclass(kind) and kind.__module__.startswith(f"{config.__name__}.")


def _kind(schema: type, field: dataclasses.Field) -> str:
    """The annotation as it is written."""
    kind = next(base.__annotations__[field.name] for base in schema.__mro__ if field.name in base.__annotations__)
    written = kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind)
    return re.sub(rf"{re.escape(config.__name__)}\.\w+\.|typing\.", "", written)


def _default(field: dataclasses.Field, value: Any) -> str:
    """What train.yaml says, or the dataclass; a task's file or a profile may say another."""
    if value is dataclasses.MISSING and field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    if value is dataclasses.MISSING:
        value = field.default
    if value is dataclasses.MISSING:
        return "must be given"
    return f"`{yaml.safe_dump(value, default_flow_style=True, width=1000).split(chr(10))[0]}`"


def _comments(schema: type) -> dict[str, str]:
    """Field → the comment behind it."""
    comments, name = {}, ""
    source = "".join(inspect.getsource(each) for each in schema.__mro__ if dataclasses.is_dataclass(each))
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NAME and re.match(rf"\s+{token.string}: ", token.line):
            name = token.string
        elif token.type == tokenize.COMMENT and re.match(rf"\s+{name}: ", token.line):
            comments[name] = token.string.lstrip("# ")
    return comments


def _yaml_comments(path: Path) -> dict[str, str]:
    """Key → the comment behind it."""
    comments, above = {}, ""
    for line in path.read_text().splitlines():
        match = re.match(r"( *)(\w+):[^#]*(?:# (.*))?$", line)
        if match is None:
            continue
        indent, key, comment = match.groups()
        above = "" if not indent else above
        comments[f"{above}{key}" if indent else key] = comment or ""
        if not indent:
            above = f"{key}."
    return comments


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|").replace("<", "&lt;").strip()


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows))
