"""The numbers of a run, or of several, as lines of text."""

from collections.abc import Sequence

from kuavo_train.evaluation.numbers import FORMATS
from kuavo_train.evaluation.stored_run import Record


def run_lines(matrix: Record) -> str:
    """A run in a few lines, from the content of matrix.json."""
    number = FORMATS["number"]
    done = sum(stage["status"] == "finished" for stage in matrix["stages"])
    title = " · ".join(str(matrix[key]) for key in ("run", "strategy", "profile") if matrix[key] is not None)
    rows = [("task", "before", "learnt", "now", "change since learnt", "error/constant", "verdict")]
    for verdict in matrix["verdicts"]:
        error, constant = verdict.get("action_error_now"), verdict.get("constant_error")
        rows.append(
            (
                verdict["task"],
                number(verdict["loss_before_training"]),
                number(verdict.get("loss_when_learnt")),
                number(verdict.get("loss_now")),
                _interval(verdict["relative_change"], "percent"),
                "" if error is None or not constant else f"{number(error)} / {number(constant)}",
                _verdict(verdict),
            )
        )
    metrics = matrix["matrices"]["loss"]["metrics"]
    named = [
        f"{name} {number(metrics[name]['value'])}" for name in metrics if not isinstance(metrics[name]["value"], dict)
    ]
    return "\n".join(
        [
            f"{title} · seed {matrix['seed']} · {done} stage{'' if done == 1 else 's'} finished",
            "",
            *_table(rows, right=(1, 2, 3)),
            "",
            f"held-out loss as score (negated, higher is better): {' · '.join(named)}",
            *(f"FAILED: {check['name']}: {check['detail']}" for check in matrix["checks"] if check["passed"] is False),
            *(f"partial: {text}" for text in matrix["missing"]),
        ]
    )


def comparison_lines(comparison: Record) -> str:
    """Strategies side by side, from the content of comparison.json."""
    reference = comparison["reference"]
    columns = ("average", "backward transfer", "forgetting", "forward transfer", "plasticity", "intransigence")
    rows = [("strategy", "seeds", *columns)]
    for entry in comparison["strategies"]:
        named = entry["metrics"]["loss"]
        cells = [_interval(named[metric]["value"], "number") if metric in named else "" for metric in columns]
        name = entry["strategy"] + (" (partial)" if entry["partial"] else "")
        rows.append((name, str(len(entry["seeds"])), *cells))
    differences = [
        f"{entry['strategy']}: backward transfer {_interval(found['difference'], 'number')} against {reference}"
        for entry in comparison["strategies"]
        if (found := entry["metrics"]["loss"]["backward transfer"])["difference"] is not None
    ]
    return "\n".join(
        [
            "held-out loss as score (negated, higher is better)",
            "",
            *_table(rows, right=(1,)),
            "",
            *differences,
            comparison["intervals"],
            *(f"partial: {text}" for text in comparison["missing"]),
        ]
    )


def _interval(interval: Record | None, form: str) -> str:
    if interval is None:
        return ""
    text = FORMATS[form]
    ends = "" if interval["low"] is None else f" [{text(interval['low'])}, {text(interval['high'])}]"
    return text(interval["estimate"]) + ends


def _verdict(verdict: Record) -> str:
    word = verdict["verdict"] or verdict["state"]
    if verdict["settled"] is not False:
        return word
    return f"at best {word}, at worst {verdict['worst']}" if verdict["worst"] else f"{word} (not settled)"


def _table(rows: Sequence[Sequence[str]], *, right: Sequence[int]) -> list[str]:
    """Lines with the columns below each other, those of `right` to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            text.rjust(width) if column in right else text.ljust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
