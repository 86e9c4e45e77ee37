"""The errors of this project, as a user reads them, and how a rule is checked.

Imports nothing of the project, so that anything may import it.
"""

from collections.abc import Callable, Iterable


class ConfigError(ValueError):
    """A value the user can correct; its text names the key, the rule and the value."""


class RunFolderError(ConfigError):
    """A run folder that cannot be read; the message names the folder and what to do."""


class RunError(RuntimeError):
    """A run that cannot go on; its text says where it stopped and what is kept."""


class Interrupted(BaseException):
    """A signal ended the work. No `Exception`: what catches those would take it for a fault of the work it ends."""

    def __init__(self, number: int):
        super().__init__(f"signal {number}")
        self.number = number

    @property
    def exit_status(self) -> int:
        """130 for SIGINT, 143 for SIGTERM, 138 for SIGUSR1."""
        return 128 + self.number


class Problems(list[str]):
    """All that is wrong, each thing once, reported at once instead of the first thing only."""

    def attempt[**P, T](self, function: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T | None:
        """The function's result; None when it raised `ConfigError`, which then is among the problems."""
        try:
            return function(*arguments, **named)
        except ConfigError as error:
            if str(error) not in self:  # two checks may come upon the same
                self.append(str(error))
            return None

    def raise_all(self) -> None:
        """Raises `ConfigError` with all of them, a line each."""
        if self:
            raise ConfigError("\n".join(self))


def require(condition: bool, key: str, rule: str, value: object) -> None:
    """Raise `ConfigError` saying that `key` must obey `rule`, unless `condition` holds."""
    if not condition:
        raise ConfigError(f"{key} must {rule}, got {value!r}")


def one_of(key: str, value: str, allowed: Iterable[str]) -> None:
    names = list(allowed)
    require(value in names, key, f"be one of {', '.join(names)}", value)


def said(error: BaseException, limit: int = 1500) -> str:
    """What an error says: its type and text, and of those it came from the last that says anything else.

    The hub's library hides the reason behind texts that are empty, or begin with an empty line.
    """
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    errors_named = [(type(each).__name__, str(each).strip()[:limit]) for each in chain]
    texts = [f"{name}: {text}" for name, text in errors_named if text]
    if not texts:
        return " from ".join(name for name, _ in errors_named)
    last = texts[-1].partition(": ")[2]
    return texts[0] if last in texts[0] else f"{texts[0]} (from {texts[-1]})"
