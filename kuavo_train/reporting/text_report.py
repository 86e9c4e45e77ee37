"""The numbers of a run, or of several, as lines of text."""

from collections.abc import Sequence

from kuavo_train.metrics.number_format import FORMATS
from kuavo_train.runs.stored_run import Record


def run_lines(matrix: Record) -> str:
    """A run in a few lines, from the content of matrix.json."""
    number = FORMATS["number"]
    done = sum(stage["status"] == "finished" for stage in matrix["stages"])
    title = " · ".join(str(matrix[key]) for key in ("run", "strategy", "profile") if matrix[key] is not None)
    played = "success" in matrix["matrices"]
    closed_loop = ("success learnt", "now") if played else ()
    rows = [("task", "before", "learnt", "now", "change since learnt", "error/constant", *closed_loop, "verdict")]
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
                *(FORMATS["share"](verdict.get(f"success_{when}")) for when in ("when_learnt", "now") if played),
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
    played = [("success in closed loop", *(task["name"] for task in comparison["tasks"]))]
    for entry in comparison["strategies"]:
        played.append((entry["strategy"], *(_interval(task["now"], "share") for task in entry["closed_loop"])))
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
            *([*_table(played, right=()), ""] if comparison["layouts"] else []),
            *differences,
            comparison["intervals"],
            *(f"partial: {text}" for text in comparison["missing"]),
        ]
    )


def evaluation_lines(found: Record) -> str:
    """Checkpoints side by side, from the content of evaluation_results.json."""
    return (_played_lines if found["mode"] == "simulation" else _demonstrated_lines)(found)


def _demonstrated_lines(found: Record) -> str:
    groups = list(dict.fromkeys(g["name"] for row in found["rows"] for told in row["tasks"] for g in told["groups"]))
    rows = [("", "task", "episodes", *(group.replace("_", " ") for group in groups), "difference")]
    for row in found["rows"]:
        for place, told in enumerate(row["tasks"]):
            errors = {group["name"]: _interval(group["error"], "number") for group in told["groups"]}
            difference = told["groups"][0]["difference"]
            rows.append(
                (
                    row["name"] if place == 0 else "",
                    told["task"],
                    str(len(told["episodes"])),
                    *(errors.get(group, "") for group in groups),
                    "" if difference is None else f"{_interval(difference, 'signed')} against {row['against']}",
                )
            )
    return "\n".join(["mean absolute action error, robot units", "", *_table(rows, right=(2,))])


def _played_lines(found: Record) -> str:
    number, share, integer = (FORMATS[form] for form in ("number", "share", "integer"))
    many = len(found["tasks"]) > 1
    rows = [("", "task", "success", "sub-goals", "right branch", "steps", "roughness", "a query")]
    differences = []
    for row in found["rows"]:
        query = "" if row["cost"] is None else f"{number(row['cost']['query_ms']['p50'])} ms"
        for place, told in enumerate([*row["tasks"], *([row["all"]] if many else [])]):
            success, branches = told["success"], told["branches"]
            rows.append(
                (
                    row["name"] if place == 0 else "",
                    told["task"],
                    _interval(success, "share") if success else f"failed: {told['failures'][0]}",
                    "" if told["progress"] is None else share(told["progress"]["estimate"]),
                    "" if branches is None else f"{branches['right']}/{branches['n']}",
                    "" if told["steps"] is None else integer(told["steps"]["estimate"]),
                    "" if told["roughness"] is None else number(told["roughness"]["estimate"]),
                    query if place == 0 else "",
                )
            )
            if told["difference"] is not None:
                change = told["difference"]
                differences.append(
                    f"{row['name']}, {told['task']}: success {_interval(change['success'], 'percent')} against "
                    f"{row['against']}, p = {number(change['p_value'])} (won {change['won']}, lost {change['lost']} of "
                    f"{change['n']} layouts); sub-goals {_interval(change['progress'], 'percent')}"
                )
    return "\n".join([*_table(rows, right=(3, 4, 5, 6, 7)), "", *differences]).rstrip()


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
