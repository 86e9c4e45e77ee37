"""What is measured of a served policy, in small: episodes over the network, and many robots for a long time."""

import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from served import Served

from benchmarks import network_episodes, serving_episodes, serving_load
from benchmarks.network_episodes import Played, Row
from benchmarks.server_process import ServerProcess
from kuavo_train.wrapper.policy.smolvla import SmolVLAPolicyWrapper

TICKS = 12


@pytest.fixture
def serve_here(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Serve from a thread: another process would import torch for seconds."""

    def instead(module: object, seed: int, **serving: int) -> None:
        @contextmanager
        def served(*words: str) -> Iterator[ServerProcess]:
            checkpoint = words[0].removeprefix("checkpoint=")
            policy = SmolVLAPolicyWrapper.from_pretrained(checkpoint, device="cpu", seed=seed)
            with Served(policy, **serving) as server:
                yield ServerProcess(f"ws://127.0.0.1:{server.port}", os.getpid())

        monkeypatch.setattr(module, "served", served)

    return instead


def play(run: Path, output: Path, *words: str) -> list[dict]:
    small = ["tasks=placement", "n_episodes=1", f"max_steps={TICKS}", f"robot_python={sys.executable}"]
    assert serving_episodes.main([f"checkpoint={run}", f"output={output}", *small, *words]) == 0
    return json.loads(output.read_text())["rows"]


def test_a_robot_over_the_network_does_what_is_done_in_process_also_with_a_hand_over(
    simulated_run: Path, serve_here: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    serve_here(network_episodes, 0, batch=1)
    rows = play(simulated_run, tmp_path / "found.json", "delay_ms=200", "handover=rtc")
    assert [(row["handover"], row["delay_ms"]) for row in rows] == [("wait", 0.0), ("rtc", 200.0)]
    for row in rows:
        assert (row["layouts"], row["equal_episodes"], row["equal"], row["ticks"]) == (1, 1, TICKS, TICKS), row
    shown = capsys.readouterr().out
    assert f"| placement | rtc | 200 ms | 1 of 1 | {TICKS} of {TICKS} | none |" in shown


def test_what_differs_is_counted_from_its_first_tick_on() -> None:
    row, here = Row("weighing", "wait", 0.0), [np.zeros(2), np.zeros(2), np.zeros(2)]
    row.add(3, Played([here[0], np.array([0.25, 0.0]), np.ones(2)], success=False), Played(here, success=True))
    assert (row.equal, row.ticks, row.equal_episodes, row.apart) == (1, 3, 0, 0.25)
    assert (row.served, row.in_process) == ([], [3])


def test_an_episode_that_is_longer_is_not_equal() -> None:
    row, one, two = Row("weighing", "wait", 0.0), [np.zeros(2)], [np.zeros(2), np.ones(2)]
    row.add(3, Played(two, success=True), Played(one, success=False))
    assert (row.equal, row.equal_episodes, row.served, row.in_process) == (1, 0, [3], [])


def test_many_robots_are_answered_rightly_among_garbage_and_broken_connections(
    small_checkpoint: Path, serve_here: Callable[..., None], capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(serving_load, "GARBAGE", 0.5)
    monkeypatch.setattr(serving_load, "BREAKS", 0.5)
    serve_here(serving_load, 0, robots=6)
    assert serving_load.main([f"checkpoint={small_checkpoint}", "robots=3", "seconds=1.5"]) == 0
    shown = capsys.readouterr().out
    answers, wrong, garbage, broken = (int(count) for count in re.findall(r"\d+", shown.splitlines()[0]))
    assert answers > 0
    assert wrong == 0
    assert garbage > 0
    assert broken > 0
    assert "gave up" not in shown
    assert "p99" in shown


def test_a_wrong_answer_fails_the_load_test(
    small_checkpoint: Path, serve_here: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, asked = SmolVLAPolicyWrapper.plan, []

    def spoilt(self: SmolVLAPolicyWrapper, queries: list) -> list:
        plans = plan(self, queries)
        asked.append(len(queries))
        if len(asked) > serving_load.LOOKS:
            plans[0].actions[0] += 1
        return plans

    monkeypatch.setattr(SmolVLAPolicyWrapper, "plan", spoilt)
    serve_here(serving_load, 0)
    assert serving_load.main([f"checkpoint={small_checkpoint}", "robots=1", "seconds=1"]) == 1
