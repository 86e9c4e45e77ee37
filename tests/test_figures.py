"""What the figures of a run say."""

from typing import Any

from matplotlib.colors import to_rgba

from kuavo_train.reporting.figures.run import heat_map
from kuavo_train.reporting.figures.style import GREY


def matrix(measure: str, *, higher_is_better: bool, rows: list[list[float | None]]) -> dict[str, Any]:
    """As matrix.json holds it, of tasks a and b, each learnt in a stage of its own."""
    values = [{"stage": stage, "values": dict(zip("ab", row, strict=True))} for stage, row in enumerate(rows)]
    return {
        "matrices": {measure: {"rows": values, "higher_is_better": higher_is_better}},
        "tasks": [{"name": "a", "learnt_in": 1}, {"name": "b", "learnt_in": 2}],
        "stages": [{"index": 1, "name": "stage_a"}, {"index": 2, "name": "stage_b"}],
        "limits": {"slight_change": 0.3, "slight_drop": 0.3},
    }


def drawn(content: dict[str, Any], measure: str) -> tuple[list[str], list[Any]]:
    """The words in the cells, and the colours of the cells, row by row."""
    figure = heat_map(content, measure)
    assert figure is not None
    (axes,) = figure.axes
    words = [text.get_text() for text in axes.texts if text.get_text()]
    return words, [patch.get_facecolor() for patch in axes.patches[:6]]


def test_success_is_a_share_and_its_change_is_in_points() -> None:
    rows = [[0.0, None], [0.4, 0.0], [0.2, 0.9]]
    words, _ = drawn(matrix("success", higher_is_better=True, rows=rows), "success")
    assert "−20 points" in words
    assert any(word.startswith("40") and word.endswith("%") for word in words)
    assert not any("50" in word for word in words)  # of what it was


def test_a_task_that_never_succeeded_was_learnt_all_the_same() -> None:
    words, colours = drawn(
        matrix("success", higher_is_better=True, rows=[[0.0, None], [0.0, 0.0], [0.5, 0.9]]), "success"
    )
    assert "+50 points" in words
    assert colours[3] == to_rgba(GREY)  # task b before its stage
    assert colours[2] != to_rgba(GREY)  # task a after its own, with 0
    assert colours[4] != to_rgba(GREY)


def test_a_loss_changes_in_percent_of_what_it_was() -> None:
    words, _ = drawn(matrix("loss", higher_is_better=False, rows=[[2.0, 2.0], [0.2, 2.0], [0.3, 0.1]]), "loss")
    assert "+50%" in words
