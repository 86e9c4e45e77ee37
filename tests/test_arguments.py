"""key=value arguments of a command, from a dataclass: how they are read, what is refused, what --help shows."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from kuavo_train.command_line import option, parse
from kuavo_train.errors import ConfigError
from kuavo_train.metrics.verdict import RetentionLimits


@dataclass(frozen=True)
class Options:
    task: str = option("which one")
    sizes: tuple[int, ...] = option("of the parts", (1,))
    speed: float | None = option("in m/s", None)
    colour: Literal["red", "blue"] = option("of the lamp", "red")
    loud: bool = option("whether it is heard", False)
    folder: Path = option("where it goes", Path("there"))
    limits: dict[str, Any] = option("of the verdict", takes=RetentionLimits)
    world: dict[str, Any] = option("a setting of the world", takes="world.KEY")
    names: dict[str, str] = option("what you call it", takes="NAME")


def parsed(*words: str) -> Options:
    return parse(Options, words, help="Says something.")


def test_a_value_is_read_as_its_field_says_and_what_is_not_given_has_its_default() -> None:
    given = parsed("task=weighing", "sizes=3,4", "speed=0.5", "colour=blue", "loud=true", "folder=here/too")
    assert given == Options("weighing", (3, 4), 0.5, "blue", True, Path("here/too"))
    assert parsed("task=") == Options("")


def test_keys_of_a_kind_go_into_a_dictionary_of_what_was_given() -> None:
    given = parsed("task=it", "slight_change=0.5", "resamples=9", "world.light=[1, 2]", "mine=a=b")
    assert given.limits == {"slight_change": 0.5, "resamples": 9}
    assert given.world == {"light": [1, 2]}
    assert given.names == {"mine": "a=b"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["task=it", "sizes=3,x"], "sizes must be a whole number, got 'x'"),
        (["task=it", "sizes=3,3"], "sizes must be values with commas between, each once, got '3,3'"),
        (["task=it", "speed=fast"], "speed must be a number, got 'fast'"),
        (["task=it", "speed=inf"], "speed must be a number, got 'inf'"),
        (["task=it", "colour=green"], "colour must be one of red, blue, got 'green'"),
        (["task=it", "loud=yes"], "loud must be one of true, false, got 'yes'"),
        (["task=it", "folder="], "folder must be a path, got ''"),
        (["task=it", "world.light=["], "world.light must be a YAML value, got '\\['"),
        (["task=it", "task=that"], "task must be given once, got 'task=that'"),
        (["task=it", "resamples=few"], "resamples must be a whole number, got 'few'"),
        (["sizes=3"], "task must be given, got 'nothing'"),
        (["task"], "arguments must be key=value with a key of task, sizes, .*, got 'task'"),
    ],
)
def test_what_cannot_be_read_is_named_with_key_rule_and_value(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parsed(*words)


def test_a_key_that_does_not_exist_is_refused_with_the_nearest_that_does() -> None:
    @dataclass(frozen=True)
    class Few:
        episodes: int = option("how many", 3)

    with pytest.raises(ConfigError, match=r"a key of episodes, got 'episode=4'; did you mean episodes\?"):
        parse(Few, ["episode=4"], help="")


def test_help_shows_every_key_with_its_type_its_meaning_and_its_default(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as left:
        parsed("--help", "nonsense")
    assert left.value.code == 0
    shown = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert shown[0] == "Says something."
    for line in (
        "task=TEXT which one (must be given)",
        "sizes=INTEGER,… of the parts (default 1)",
        "speed=NUMBER in m/s",
        "colour=red|blue of the lamp (default red)",
        "loud=true|false whether it is heard (default false)",
        "folder=PATH where it goes (default there)",
        "slight_change=NUMBER of the verdict",
        "world.KEY=VALUE a setting of the world",
        "NAME=TEXT what you call it",
    ):
        assert line in shown
