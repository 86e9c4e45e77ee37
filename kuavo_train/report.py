"""The forgetting report of a run: one self-contained HTML file, its numbers as JSON, its figures as PNG.

    python -m kuavo_train.report run=outputs/<run>              # no run: the one modified last under outputs/
    python -m kuavo_train.report run=outputs/<run> joint=outputs/<joint run>          # adds intransigence
    python -m kuavo_train.report run=outputs/<run> slight_change=0.2                  # other limits for the verdict

Writes outputs/<run>/report/{report.html, matrix.json, *.png}. The page shows numbers only through
`value(pointer)`, which looks them up in matrix.json, so that the two cannot disagree.
"""

import base64
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from kuavo_train.evaluation.forgetting import RetentionLimits
from kuavo_train.evaluation.matrix import analyse, stored_limits, write_matrix
from kuavo_train.evaluation.numbers import FORMATS
from kuavo_train.evaluation.stored_run import Record, newest_run, read_run

__all__ = ["main", "summary_table", "write_matrix", "write_report"]

TEMPLATES = Path(__file__).parent / "templates"
OUTPUTS = Path("outputs")


def write_report(
    run_folder: Path | str, *, limits: RetentionLimits | None = None, joint: Path | str | None = None
) -> Path:
    """Write report/ in the run folder and return the path of report.html. Arguments and errors as `write_matrix`."""
    from kuavo_train.evaluation.figures import write_figures  # matplotlib: slow to import, needed only here

    matrix = write_matrix(run_folder, limits=limits, joint=joint)
    run = read_run(run_folder)
    folder = run.folder / "report"
    figures = write_figures(folder, matrix, [(stage.index, stage.metrics) for stage in run.stages])
    page = folder / "report.html"
    partial = page.with_suffix(".html.partial")
    partial.write_text(render(matrix, figures), encoding="utf-8")
    partial.replace(page)
    return page


def render(matrix: Record, figures: dict[str, Path]) -> str:
    """The page as text: figures inlined, numbers through JSON pointers into `matrix`."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )

    def value(pointer: str, form: str = "number") -> Markup:
        text = FORMATS[form](look_up(matrix, pointer))
        return Markup('<span class="v" data-pointer="{}" data-form="{}">{}</span>').format(pointer, form, text)

    def figure(name: str, alt: str) -> Markup:
        if name not in figures:
            return Markup("")
        data = base64.b64encode(figures[name].read_bytes()).decode("ascii")
        return Markup('<img src="data:image/png;base64,{}" alt="{}">').format(Markup(data), escape(alt))

    return environment.get_template("report.html.jinja").render(m=matrix, value=value, figure=figure, figures=figures)


def look_up(matrix: Record, pointer: str) -> Any:
    """What a JSON pointer such as /verdicts/0/loss_now points at (RFC 6901, without its escapes)."""
    found: Any = matrix
    for key in pointer.removeprefix("/").split("/"):
        found = found[int(key)] if isinstance(found, list) else found[key]
    return found


def summary_table(run_folder: Path | str) -> str:
    """The run in a few lines for a terminal. Raises RunFolderError as `write_matrix` does; writes nothing."""
    run = read_run(run_folder)
    matrix = analyse(run, stored_limits(run.folder) or RetentionLimits())
    number, percent = FORMATS["number"], FORMATS["percent"]
    done = sum(stage["status"] == "finished" for stage in matrix["stages"])
    title = " · ".join(str(matrix[key]) for key in ("run", "strategy", "profile") if matrix[key] is not None)
    lines = [f"{title} · seed {matrix['seed']} · {done} stage{'' if done == 1 else 's'} finished", ""]
    rows = [("task", "before", "learnt", "now", "change since learnt", "error/constant", "verdict")]
    for verdict in matrix["verdicts"]:
        change = verdict["relative_change"]
        interval = ""
        if change is not None:
            interval = percent(change["estimate"])
            interval += "" if change["low"] is None else f" [{percent(change['low'])}, {percent(change['high'])}]"
        error, constant = verdict.get("action_error_now"), verdict.get("constant_error")
        rows.append(
            (
                verdict["task"],
                number(verdict["loss_before_training"]),
                number(verdict.get("loss_when_learnt")),
                number(verdict.get("loss_now")),
                interval,
                "" if error is None or not constant else f"{number(error)} / {number(constant)}",
                (verdict["verdict"] or verdict["state"])
                + ("" if verdict["settled"] in (True, None) else " (not settled)"),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [
            text.rjust(width) if column in (1, 2, 3) else text.ljust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    metrics = matrix["matrices"]["loss"]["metrics"]
    named = [
        f"{name} {number(metrics[name]['value'])}" for name in metrics if not isinstance(metrics[name]["value"], dict)
    ]
    lines += ["", f"held-out loss as score (negated, higher is better): {' · '.join(named)}"]
    lines += [f"FAILED: {check['name']}: {check['detail']}" for check in matrix["checks"] if check["passed"] is False]
    lines += [f"partial: {text}" for text in matrix["missing"]]
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Command line: key=value arguments; 0, or 1 with the error on stderr."""
    if {"-h", "--help", "help"} & set(arguments):
        print(__doc__)
        return 0
    settings = {field.name: field for field in dataclasses.fields(RetentionLimits)}
    try:
        given = dict(_key_value(argument, ["run", "joint", *settings]) for argument in arguments)
        if "run" in given:
            run_folder = Path(given["run"])
        else:
            run_folder = newest_run(OUTPUTS)
            print(f"no run given: taking the one modified last, {run_folder}")
        wanted = {key: _parse(key, text) for key, text in given.items() if key in settings}
        limits = None
        if wanted:
            limits = dataclasses.replace(stored_limits(run_folder) or RetentionLimits(), **wanted)
        page = write_report(run_folder, limits=limits, joint=given.get("joint"))
        print(summary_table(run_folder))
        print(f"\nreport: {page}")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _key_value(argument: str, known: Sequence[str]) -> tuple[str, str]:
    key, equals, text = argument.partition("=")
    if not equals or key not in known:
        raise ValueError(f"{argument!r} is not understood: give key=value with a key of {', '.join(known)}")
    return key, text


def _parse(key: str, text: str) -> Any:
    """A limit from the command line."""
    try:
        return int(text) if key == "resamples" else float(text)
    except ValueError as error:
        raise ValueError(f"{key} must be a number, got {text!r}") from error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
