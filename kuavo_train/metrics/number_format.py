"""How numbers read, in the page, in the figures and in the terminal: one place, so that all three agree."""

from collections.abc import Callable

ABSENT = "–"
MINUS = "\N{MINUS SIGN}"
NARROW_SPACE = "\N{NARROW NO-BREAK SPACE}"


def number(value: float) -> str:
    """Three decimals, four below 0.1, powers of ten below 0.001: 0.203, 0.0415, 4.2e−05."""
    size = abs(value)
    if size >= 0.0995 or value == 0:
        text = f"{value:.3f}"
    else:
        text = f"{value:.4f}" if size >= 1e-3 else f"{value:.1e}"
    return text.replace("-", MINUS)


def signed(value: float) -> str:
    """A change in its own unit: +0.182, −0.0415."""
    return ("+" if value >= 0 else "") + number(value)


def percent(value: float) -> str:
    """A change, signed, and zero with a plus whatever it was rounded from: +24.3 %."""
    return f"{100 * value:+z.1f}{NARROW_SPACE}%".replace("-", MINUS)


def whole_percent(value: float) -> str:
    """A level or a limit: 95 %."""
    return f"{100 * value:.3g}{NARROW_SPACE}%"


def share(value: float) -> str:
    """A part of a whole: 20.0 %."""
    return f"{100 * value:.1f}{NARROW_SPACE}%"


def integer(value: float) -> str:
    """Thousands apart: 86 433 024."""
    return f"{round(value):,}".replace(",", NARROW_SPACE).replace("-", MINUS)


def seconds(value: float) -> str:
    """A duration: 42 s, 3 min 12 s, 2 h 05 min."""
    minutes, rest = divmod(round(value), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _or_absent[T](form: Callable[[T], str]) -> Callable[[T | None], str]:
    return lambda value: ABSENT if value is None else form(value)


_FORMS = (number, signed, percent, whole_percent, share, integer, seconds)
FORMATS = {form.__name__: _or_absent(form) for form in _FORMS} | {"text": _or_absent(str)}
"""Name → format; every one shows None as a dash."""
