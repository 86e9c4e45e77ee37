"""Where a step's time went, without waiting for the device in every step."""

import pytest
import torch

from kuavo_train.training.step_metrics import MetricsWindow


class Event:
    """A GPU's, which gets there a ms after the one before."""

    recorded = 0
    waited_for: tuple[int, ...] = ()

    def __init__(self, *, enable_timing: bool):
        assert enable_timing

    def record(self) -> None:
        self.at = Event.recorded
        Event.recorded += 1

    def synchronize(self) -> None:
        Event.waited_for += (self.at,)

    def elapsed_time(self, later: "Event") -> float:
        assert later.at in Event.waited_for
        return float(later.at - self.at)


def test_a_gpu_is_waited_for_when_something_is_reported_and_not_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: pytest.fail("the whole GPU was waited for"))
    window = MetricsWindow({})
    for step in range(3):
        window.start_step()
        for part in ("data", "forward", "backward", "forward", "backward", "optimizer"):
            window.mark(part)
        window.end_step({"loss": float(step)}, samples=4)
        if step == 1:
            window.go_on()  # after a validation, which is no part
    assert Event.waited_for == ()
    summary = window.summary()
    parts = {name: value for name, value in summary.items() if name.endswith("_ms")}
    assert parts == {"wait_ms": 1, "data_ms": 1, "forward_ms": 2, "backward_ms": 2, "optimizer_ms": 1}
    assert summary["loss"] == 1
