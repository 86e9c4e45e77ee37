"""The numbers of a run, or of several, as text: lines for a terminal, sentences for a page."""

from collections.abc import Sequence

from kuavo_train.metrics.intervals import Interval
from kuavo_train.metrics.number_format import ABSENT, FORMATS, integer, number, signed, whole_percent
from kuavo_train.metrics.verdict import VERDICTS
from kuavo_train.reading import Json
from kuavo_train.reporting.run_analysis import Analysis
from kuavo_train.reporting.strategy_comparison import JOINT, Comparison, StrategyNumbers

NOT_SETTLED = "not settled"


def summary_table(analysis: Analysis) -> str:
    """A run in a few lines."""
    matrix, number = analysis.matrix, FORMATS["number"]
    done = sum(stage["status"] == "finished" for stage in matrix["stages"])
    title = " · ".join(str(matrix[key]) for key in ("run", "strategy", "profile") if matrix[key] is not None)
    played = "success" in matrix["matrices"]
    closed_loop = ("success learnt", "now") if played else ()
    by_loss = ("by its loss",) if played else ()
    columns = ("task", "before", "learnt", "now", "change since learnt", "error/constant", *closed_loop, "verdict")
    columns += by_loss
    rows: list[Sequence[str]] = [columns]
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
                *(_verdict(verdict["loss_verdict"]) if verdict["loss_verdict"] else "" for _ in by_loss),
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


def success_table(analysis: Analysis) -> str:
    """The last words on a run: each job's success when learnt and in the end, after an empty line.

    Without rollouts there are none.
    """
    matrix = analysis.matrix
    if not matrix["closed_loop"]:
        return ""
    found = {(entry["stage"], entry["task"]): entry for entry in matrix["closed_loop"]}
    last = max(stage for stage, _ in found)
    rows: list[Sequence[str]] = [("success in closed loop", "after its own stage", "in the end", "on the same layouts")]
    for verdict in matrix["verdicts"]:
        name, pair = verdict["task"], verdict["success_verdict"]
        rows.append(
            (
                name,
                _rate(found.get((verdict["learnt_in"], name))),
                _rate(found.get((last, name))),
                "" if pair is None else f"lost {pair['lost']}, won {pair['won']}, p = {number(pair['p_value'])}",
            )
        )
    return "\n".join(["", "", *_table(rows, right=())])


def _rate(closed_loop: Json | None) -> str:
    """7/10  70 % [40 %, 89 %]: Wilson's interval."""
    if closed_loop is None:
        return ABSENT
    counted = f"{closed_loop['successes']}/{closed_loop['trials']}"
    return f"{counted.rjust(7)}  {_interval(_whole(closed_loop['interval']), 'whole_percent')}"


def _whole(interval: Json) -> Json:
    """Ends in whole per cents."""
    return {key: round(value, 2) if key in ("estimate", "low", "high") else value for key, value in interval.items()}


def comparison_table(comparison: Comparison) -> str:
    """Strategies side by side, in a few lines."""
    columns = ("average", "backward transfer", "forgetting", "forward transfer", "plasticity", "intransigence")
    rows: list[Sequence[str]] = [("strategy", "seeds", *columns)]
    for entry in comparison.strategies:
        named = entry.metrics["loss"]
        cells = [_estimate(named[metric].value, "number") if metric in named else "" for metric in columns]
        rows.append((entry.strategy + (" (partial)" if entry.partial else ""), str(len(entry.seeds)), *cells))
    played: list[Sequence[str]] = [("success in closed loop", *comparison.tasks)]
    for entry in comparison.strategies:
        played.append((entry.strategy, *(_estimate(task.now, "share") for task in entry.closed_loop)))
    differences = [
        f"{entry.strategy}: backward transfer {_estimate(found.difference, 'number')} against {comparison.reference}"
        for entry in comparison.strategies
        if (found := entry.metrics["loss"]["backward transfer"]).difference is not None
    ]
    return "\n".join(
        [
            "held-out loss as score (negated, higher is better)",
            "",
            *_table(rows, right=(1,)),
            "",
            *([*_table(played, right=()), ""] if comparison.layouts else []),
            *differences,
            about_intervals(comparison),
            *(f"partial: {text}" for text in comparison.missing),
        ]
    )


def about_intervals(comparison: Comparison) -> str:
    """What the intervals of a comparison are of."""
    fewest = min(len(entry.seeds) for entry in comparison.strategies)
    limits = comparison.limits
    text = (
        f"Intervals ({whole_percent(limits.confidence)}) come from a bootstrap over training seeds and held-out "
        f"episodes ({integer(limits.resamples)} resamples). The same episodes are drawn for every run, and differences "
        "are paired by seed and episode."
    )
    if fewest == 1:
        text += " A strategy with a single seed has an interval over episodes alone: other seeds may well fall outside."
    elif fewest < 5:
        text += (
            f" It is widened for the few there are, as Student's interval is: where {fewest} seeds differ it is wide, "
            "and further seeds narrow it most."
        )
    return text


def outcome(entry: StrategyNumbers) -> str:
    """How many of the earlier tasks got which verdict."""
    words = [task.verdict if task.settled else NOT_SETTLED for task in entry.tasks if task.verdict]
    if not words:
        return "all tasks at once" if entry.strategy.split()[0] == JOINT else "nothing to forget yet"
    return ", ".join(f"{words.count(word)} {word}" for word in (*VERDICTS, NOT_SETTLED) if word in words)


def evidence(entry: StrategyNumbers, comparison: Comparison) -> str:
    """What a strategy costs, in a sentence or two."""
    count, episodes = len(entry.seeds), min(comparison.held_out_episodes.values(), default=0)
    seeds = f"{count} seed{'s' if count > 1 else ''}, {episodes} held-out episodes a task"
    start = f"Partial: {len(entry.stages)} stages finished. " if entry.partial else ""
    average, transfer = entry.metrics["loss"]["average"].value, entry.metrics["loss"]["backward transfer"]
    if average is None:
        return f"{start}Nothing was learnt to the end ({seeds})."
    text = f"{start}Held-out loss {number(-average.estimate)} in the end, mean over tasks"
    if transfer.value is None:
        return f"{text} ({seeds})."
    text += f"; on the earlier tasks it changed by {_rise(transfer.value)} since they were learnt ({seeds})."
    difference = transfer.difference
    if difference is None:
        return text
    text += f" Against {comparison.reference}: {_rise(difference)}"
    shown = difference.low is not None and difference.high is not None and not difference.low <= 0 <= difference.high
    return text + ("." if shown else ", so that these runs do not show which of the two forgets more.")


def _rise(transfer: Interval) -> str:
    """A backward transfer, which is negated, as a change of the loss: +0.182 [+0.165, +0.200]."""
    text = signed(-transfer.estimate)
    if transfer.low is None or transfer.high is None:
        return text
    return f"{text} [{signed(-transfer.high)}, {signed(-transfer.low)}]"


def evaluation_lines(found: Json) -> str:
    """Checkpoints side by side, from the content of evaluation_results.json."""
    return (_played_lines if found["mode"] == "simulation" else _demonstrated_lines)(found)


def _demonstrated_lines(found: Json) -> str:
    groups = list(
        dict.fromkeys(g["name"] for row in found["rows"] for of_task in row["tasks"] for g in of_task["groups"])
    )
    rows = [("", "task", "episodes", *(group.replace("_", " ") for group in groups), "difference")]
    for row in found["rows"]:
        for place, of_task in enumerate(row["tasks"]):
            errors = {group["name"]: _interval(group["error"], "number") for group in of_task["groups"]}
            difference = of_task["groups"][0]["difference"]
            rows.append(
                (
                    row["name"] if place == 0 else "",
                    of_task["task"],
                    str(len(of_task["episodes"])),
                    *(errors.get(group, "") for group in groups),
                    "" if difference is None else f"{_interval(difference, 'signed')} against {row['against']}",
                )
            )
    return "\n".join(["mean absolute action error, robot units", "", *_table(rows, right=(2,))])


def _played_lines(found: Json) -> str:
    number, share, integer = (FORMATS[form] for form in ("number", "share", "integer"))
    many = len(found["tasks"]) > 1
    rows = [("", "task", "success", "sub-goals", "right branch", "steps", "roughness", "a query")]
    differences = []
    for row in found["rows"]:
        query = "" if row["cost"] is None else f"{number(row['cost']['query_ms']['p50'])} ms"
        for place, of_task in enumerate([*row["tasks"], *([row["all"]] if many else [])]):
            success, branches = of_task["success"], of_task["branches"]
            rows.append(
                (
                    row["name"] if place == 0 else "",
                    of_task["task"],
                    _interval(success, "share") if success else f"failed: {of_task['failures'][0]}",
                    "" if of_task["progress"] is None else share(of_task["progress"]["estimate"]),
                    "" if branches is None else f"{branches['right']}/{branches['n']}",
                    "" if of_task["steps"] is None else integer(of_task["steps"]["estimate"]),
                    "" if of_task["roughness"] is None else number(of_task["roughness"]["estimate"]),
                    query if place == 0 else "",
                )
            )
            if of_task["difference"] is not None:
                change = of_task["difference"]
                differences.append(
                    f"{row['name']}, {of_task['task']}: success {_interval(change['success'], 'percent')} against "
                    f"{row['against']}, p = {number(change['p_value'])} (won {change['won']}, lost {change['lost']} of "
                    f"{change['n']} layouts); sub-goals {_interval(change['progress'], 'percent')}"
                )
    smooth = ["", *_smoothness_lines(found)] if any(row["handover"] for row in found["rows"]) else []
    return "\n".join([*_table(rows, right=(3, 4, 5, 6, 7)), *smooth, "", *differences]).rstrip()


def _smoothness_lines(found: Json) -> list[str]:
    """How smoothly the robot was told to move, a line for each row, task and joint group."""
    number, share = FORMATS["number"], FORMATS["share"]
    rows = [("", "task", "held", "", "jump at borders", "acceleration inside", "reversed")]
    for row in found["rows"]:
        for of_task in row["tasks"]:
            for place, (group, of_group) in enumerate(of_task["smoothness"].items()):
                texts = [
                    ABSENT if of_group[key] is None else form(of_group[key])
                    for key, form in (("jump", number), ("acceleration", number), ("reversed", share))
                ]
                first = (row["name"], of_task["task"], share(of_task["held"])) if place == 0 else ("", "", "")
                rows.append((*first, group, texts[0], texts[1], texts[2]))
    return _table(rows, right=(2, 4, 5, 6))


def _interval(interval: Json | None, form: str) -> str:
    """One of a JSON file."""
    if interval is None:
        return ""
    return _estimate(Interval(**{key: interval[key] for key in ("estimate", "low", "high", "level", "n")}), form)


def _estimate(interval: Interval | None, form: str) -> str:
    if interval is None:
        return ""
    text = FORMATS[form]
    ends = "" if interval.low is None else f" [{text(interval.low)}, {text(interval.high)}]"
    return text(interval.estimate) + ends


def _verdict(verdict: Json) -> str:
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
