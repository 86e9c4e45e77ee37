"""README and docs/: what can be checked of them without building the site (`make docs` does, strictly)."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from kuavo_train.probing.memory_interventions import HeldOutEffect
from kuavo_train.probing.memory_record import MemoryReport
from kuavo_train.runs import records

REPOSITORY = Path(__file__).resolve().parents[1]
DOCS = REPOSITORY / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
DOCUMENTS = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *PAGES]
LONGEST_LINE, LONGEST_SENTENCE, LONGEST_README = 120, 25, 150
NOT_OUR_WORDS = re.compile(r"\b(lanes?|contest|owes?|goes the whole way|cannot be meant|told|asked)\b", re.IGNORECASE)

name_of = pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: str(page.relative_to(REPOSITORY)))


@cache
def script(name: str) -> ModuleType:
    """One of docs/, which is no package."""
    sys.path.insert(0, str(DOCS))
    return import_module(name)


def lines(page: Path) -> Iterator[tuple[int, str]]:
    """Lines that are neither code nor of a table, with their numbers."""
    code = False
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if line.lstrip().startswith("```"):
            code = not code
        elif not code and not line.startswith(("    ", "|")):
            yield number, line


def prose(page: Path) -> Iterator[tuple[int, str]]:
    """Lines that are neither code nor table nor link nor picture, with their numbers."""
    for number, line in lines(page):
        if not line.startswith(("![", "#", "<!--", "--8<--", ":::", ">")):
            yield number, line


def sentences(page: Path) -> Iterator[str]:
    text = "\n".join(line for _, line in prose(page))
    text = re.sub(r"`[^`]*`", "CODE", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text))
    for paragraph in re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.) )", text):
        yield from re.split(r"(?<=[.!?])[)\"*]*\s+(?=[\"*(]*[A-Z0-9])", " ".join(paragraph.split()))


@name_of
def test_a_link_leads_to_a_page_that_is_there(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not target.startswith(("http", "#")):
            assert (page.parent / target.partition("#")[0]).exists(), f"{page}: {target}"


def test_lines_of_every_committed_document_wrap() -> None:
    listed = subprocess.check_output(["git", "ls-files", "*.md"], cwd=REPOSITORY, text=True, start_new_session=True)
    committed = {REPOSITORY / name for name in listed.splitlines()}
    assert [
        f"{page.relative_to(REPOSITORY)}:{number}"
        for page in sorted({*DOCUMENTS, *committed})
        for number, line in lines(page)
        if len(line) > LONGEST_LINE
    ] == []


@name_of
def test_the_words_are_the_fields(page: Path) -> None:
    found = [(number, match[0]) for number, line in prose(page) if (match := NOT_OUR_WORDS.search(line))]
    assert found == []


@name_of
def test_sentences_are_short(page: Path) -> None:
    # A number is no word.
    words = {
        sentence: [word for word in sentence.split() if re.search("[A-Za-z]", word)] for sentence in sentences(page)
    }
    assert [sentence for sentence, each in words.items() if len(each) > LONGEST_SENTENCE] == []


def test_the_table_of_contents_lists_every_page() -> None:
    # mkdocs.yml may hold tags of Python's, which the plain loader refuses.
    nav = yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text().partition("\nnav:\n")[2])
    listed = re.findall(r"[\w/-]+\.md", str(nav))
    assert sorted(listed) == [str(page.relative_to(DOCS)) for page in PAGES]


def test_the_readme_fits_on_a_screen_or_two_and_its_pictures_are_small() -> None:
    assert len((REPOSITORY / "README.md").read_text().splitlines()) < LONGEST_README
    for picture in (DOCS / "pictures").iterdir():
        assert picture.stat().st_size < 300_000, picture


def test_one_command_makes_every_picture_and_a_page_shows_each() -> None:
    pictures = {picture.name for picture in (DOCS / "pictures").iterdir()}
    assert set(script("make_pictures").PICTURES) == pictures
    text = "".join(page.read_text() for page in DOCUMENTS)
    assert [name for name in pictures if f"pictures/{name})" not in text] == []


def test_the_architecture_draws_the_folders_that_are_there() -> None:
    committed = subprocess.check_output(["git", "ls-files"], cwd=REPOSITORY, text=True, start_new_session=True).split()
    folders = {name.partition("/")[0] for name in committed if "/" in name and not name.startswith(".")}
    package = REPOSITORY / "kuavo_train"
    rooms, beside = drawn_layout()
    assert {room for room in rooms if room.endswith("/")} == {f"{init.parent.name}/" for init in package.glob("*/*.py")}
    assert {name for name in beside if name.endswith("/")} == {f"{folder}/" for folder in folders - {"kuavo_train"}}
    commands = sorted(name for room, names in rooms.items() if not room.endswith("/") for name in names)
    assert commands == sorted(module.name for module in package.glob("*.py") if module.name != "__init__.py")
    for table, parent in ((rooms, package), (beside, REPOSITORY)):
        for place, names in table.items():
            folder = parent / place if place.endswith("/") else parent
            assert folder.is_dir(), place
            assert [name for name in names if not (folder / name).exists() and not (parent / name).exists()] == [], (
                place
            )


def drawn_layout() -> list[dict[str, list[str]]]:
    """Of each of the architecture's two tables: what stands in a row's first cell → files and folders that it names."""
    page = (DOCS / "explanation" / "architecture.md").read_text()
    tables = []
    for table in re.findall(r"^\|-.*\n((?:\|.*\n)+)", page.split("## The layout")[1].split("\n## ")[0], re.MULTILINE):
        cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()]
        tables.append({row[0].strip("`"): re.findall(r"`([\w/]+(?:/|\.\w+))`", " ".join(row[1:])) for row in cells})
    return tables


def test_a_check_of_every_change_can_be_run() -> None:
    assert os.access(REPOSITORY / ".ci" / "run", os.X_OK)


def test_every_make_target_that_a_page_calls_is_there() -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    for page in DOCUMENTS:
        for target in re.findall(r"(?:\$ |`)make ([a-z-]+)", page.read_text()):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{page}: make {target}"


def test_the_configuration_reference_holds_every_key_with_a_word_about_it() -> None:
    keys = [key for section in script("generated").sections() for key in section.keys]
    assert [key.name for key in keys if not key.help] == []
    names = {key.name for key in keys}
    assert {"seed", "stage.replay", "training.lora.rank", "forgetting.budget", "data.root"} <= names
    page = script("generated").on_page_markdown((DOCS / "reference" / "configuration.md").read_text())
    assert "<!-- generated" not in page
    for row in ("| `training.batch_size` | `int` | `64` | no |", "| `policy.num_mem_tokens` | `int` | `4` |"):
        assert row in page


def test_the_reference_of_commands_holds_the_help_of_each() -> None:
    page = script("generated").on_page_markdown((DOCS / "reference" / "commands.md").read_text())
    for command in (REPOSITORY / "kuavo_train").glob("*.py"):
        text = command.read_text()
        if '__name__ == "__main__"' in text:
            assert (ast.get_docstring(ast.parse(text)) or "no docstring") in page, command
    assert "  videos=INTEGER" in page


def test_the_reference_of_files_holds_every_key_that_is_read_again() -> None:
    page = (DOCS / "reference" / "files.md").read_text()
    composed = {
        "moment",
        "held_out",
        "closed_loop",
        "played",
        "reading",
    }  # of parts, which stand in the file themselves
    for record in (*vars(records).values(), MemoryReport, HeldOutEffect):
        if is_dataclass(record):
            for field in fields(record):
                key = {"origin": "from"}.get(field.name, field.name)
                assert key in composed or f"`{key}`" in page, f"{record.__name__}.{field.name}"


def test_an_error_that_is_explained_can_occur() -> None:
    texts = list(_texts_of_the_code())
    quoted = re.findall(r"^> (.*)$", (DOCS / "reference" / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(quoted) > 15
    for quote in quoted:
        (message,) = re.findall(r"^`(.*)`$", quote)
        pattern = ".*".join(map(re.escape, message.split("…")))
        assert any(re.search(pattern, text) for text in texts), message


def _texts_of_the_code() -> Iterator[str]:
    """Texts as they are written; what is put in is left out, and a constant stands where it is named."""
    for path in (REPOSITORY / "kuavo_train").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "require":
                key, rule = (list(_texts(part)) for part in node.args[1:3]) if len(node.args) > 2 else ([], [])
                yield from (f"{one} must {other}, got …" for one in key for other in rule)


def _texts(node: ast.expr) -> Iterator[str]:
    if isinstance(node, ast.JoinedStr):
        yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    else:
        yield "…"
