"""The robot's side, in whatever Python runs this file: it needs kuavo_client's own dependencies and pytest alone."""

import io
import json
import threading
import time

import numpy as np
import pytest
from websockets.sync.server import serve

from kuavo_client import Handover, Limits, RobotLoop, ServerError, main, pack, unpack

NAMES = ["left", "right"]
LIMITS = {"left": [-1.0, 1.0, 0.5], "right": [-1.0, 1.0, 0.5]}
CHUNK, EVERY = 8, 4
PATIENCE = 20.0  # seconds until what does not come has failed its test


class Stub:
    """A server whose chunk number k is `steps` k, k + 0.01, k + 0.02, … for both joints, after `thinks` seconds."""

    def __init__(
        self, thinks=0.0, hangs_up_at=(), refuses=None, actions=None, handover=("wait", "blend", "rtc"), forgets=False
    ):
        self.thinks, self.hangs_up_at, self.refuses, self.actions = thinks, set(hangs_up_at), refuses, actions
        self.handover, self.requests, self.go_on = list(handover), [], threading.Event()
        self.go_on.set()
        self.forgets, self.connections = forgets, 0

    def __enter__(self):
        self.server = serve(self._serve, "127.0.0.1", 0)
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()
        self.address = "ws://127.0.0.1:" + str(self.server.socket.getsockname()[1])
        return self

    def __exit__(self, *_):
        self.go_on.set()
        self.server.shutdown()
        self.thread.join(PATIENCE)

    def _serve(self, connection):
        task = {"limits": LIMITS, "state_names": NAMES, "action_names": NAMES, "instructions": ["lift"]}
        about = {"tasks": {"lift": task}, "handover": self.handover, "n_action_steps": EVERY, "frames": 1}
        about.update(
            {"policy": "act", "has_memory": False, "fps": 10, "cameras": {"observation.images.head": [48, 64]}}
        )
        connection.send(pack(about))
        self.connections += 1
        for message in connection:
            request = unpack(message)
            self.requests.append(request)
            number = len(self.requests)
            if number in self.hangs_up_at:
                connection.socket.close()
                return
            if self.forgets and self.connections > 1 and "executed" in request:
                connection.send("error: executed must be 0 where an episode begins")
                continue
            if self.refuses:
                connection.send(self.refuses)
                continue
            time.sleep(self.thinks)
            self.go_on.wait(PATIENCE)
            chunk = request.get("chunk", 0) + 1
            actions = self.actions or (lambda chunk: 0.1 * chunk + 0.01 * np.arange(CHUNK)[:, None] * np.ones(2))
            answer = {"actions": np.asarray(actions(chunk), np.float32), "names": NAMES, "task": "lift", "chunk": chunk}
            connection.send(pack(answer))


class Arm:
    def __init__(self):
        self.did = []

    def observe(self):
        return {"observation.state": np.zeros(2, np.float32)}

    def act(self, action):
        self.did.append(action.copy())


def drive(stub, arm=None, ticks=12, **settings):
    arm = arm or Arm()
    settings = dict({"rate": None, "handover": "wait", "limits": None}, **settings)
    loop = RobotLoop(arm.observe, arm.act, stub.address, "lift", **settings)
    return arm, loop.run(ticks), loop


def chunk(number, start=0, stop=CHUNK):
    return [0.1 * number + 0.01 * step for step in range(start, stop)]


# ------------------------------------------------------------------------------------------------------------ hand-over


def carried_out(kind, delay, ticks, size=CHUNK):
    """What is carried out where every answer is there `delay` ticks after its look; None is a pose held."""
    handover, number, due_at, done, said = Handover(kind, EVERY), 0, None, [], []
    for tick in range(ticks):
        if handover.due:
            said.append(handover.look(delay))
            due_at = tick + delay
        if handover.waiting and tick >= due_at:
            number += 1
            handover.arrived(np.array(chunk(number, stop=size))[:, None])
        action = handover.action()
        done.append(None if action is None else round(float(action[0]), 4))
    return done, said


def test_waiting_it_carries_out_n_action_steps_of_each_chunk_and_holds_while_it_waits():
    done, said = carried_out("wait", 2, 12)
    hold = [None, None]
    assert done == [*hold, *np.round(chunk(1, 0, 4), 4), *hold, *np.round(chunk(2, 0, 4), 4)]
    assert said == [{}, {"executed": 4}]


def test_without_delay_nothing_is_held():
    for kind in ("wait", "blend", "rtc"):
        done, said = carried_out(kind, 0, 8)
        if kind != "blend":
            assert done == [*np.round(chunk(1, 0, 4), 4), *np.round(chunk(2, 0, 4), 4)]
        assert [each.get("executed") for each in said] == [None, 4]


def test_a_chunk_is_taken_up_at_the_step_that_the_robot_has_come_to():
    done, said = carried_out("rtc", 3, 15)
    assert done == [None] * 3 + [*np.round(chunk(1, 0, 7), 4), *np.round(chunk(2, 3, 7), 4), round(chunk(3)[3], 4)]
    assert said == [{}, {"executed": 4, "delay": 3}, {"executed": 4, "delay": 3}]


def test_a_blend_goes_from_the_old_chunk_to_the_new_one_without_a_jump():
    done, _ = carried_out("blend", 2, 14)
    moved = np.diff([each for each in done if each is not None])
    jumps, _ = carried_out("rtc", 2, 14)
    assert np.abs(moved).max() < 0.06 < np.abs(np.diff([each for each in jumps if each is not None])).max()
    old, new = chunk(1)[6], chunk(2)[2]
    assert done[8] == pytest.approx(old * 2 / 3 + new / 3, abs=1e-4)


def test_a_blend_is_over_before_the_next_one_begins():
    done, _ = carried_out("blend", 1, 20, size=20)
    assert np.abs(np.diff([each for each in done if each is not None])).max() < 0.03


def test_a_server_that_is_late_leaves_the_pose_held_and_the_chunk_goes_on_from_there():
    done, _ = carried_out("rtc", 6, 18)
    assert done[6:14] == list(np.round(chunk(1), 4))
    assert done[14:16] == [None, None]
    assert done[16] == round(chunk(2)[4], 4)


def test_no_more_steps_are_said_to_come_before_the_answer_than_are_planned():
    handover = Handover("rtc", EVERY)
    handover.look(10)
    handover.arrived(np.zeros((6, 1)))
    for _ in range(EVERY):
        handover.action()
    assert handover.look(10) == {"executed": EVERY, "delay": 2}


def test_steps_carried_out_around_a_look_without_an_answer_are_said_at_the_next_one():
    handover = Handover("blend", EVERY)
    handover.look()
    handover.arrived(np.zeros((CHUNK, 1)))
    for _ in range(EVERY):
        handover.action()
    said = handover.look()
    handover.action()
    handover.failed(said)
    assert handover.due
    assert handover.look() == {"executed": EVERY + 1}


def test_a_hand_over_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="handover must be one of wait, blend, rtc, got 'jump'"):
        Handover("jump", 4)


# ----------------------------------------------------------------------------------------------------------- the limits


def test_an_action_outside_the_limits_is_brought_within_them():
    limits = Limits(NAMES, LIMITS, slack=0.0)
    nowhere = np.full(2, np.nan, np.float32)
    action, limited = limits.obey(np.array([3.0, 0.2], np.float32), nowhere)
    assert (action.tolist(), limited) == ([1.0, pytest.approx(0.2)], ["left"])
    action, limited = limits.obey(np.array([0.9, -0.9], np.float32), np.zeros(2, np.float32))
    assert (action.tolist(), limited) == ([0.5, -0.5], NAMES)
    with pytest.raises(ValueError, match="limits must name every dimension, got none of right"):
        Limits(NAMES, {"left": [0, 1, 1]})


# ------------------------------------------------------------------------------------------------------------- the loop


def test_it_carries_out_what_the_server_plans_and_says_how_far_it_is():
    with Stub() as stub:
        arm, report, loop = drive(stub, ticks=12, seed=7)
        assert loop.names == NAMES
    expected = [*chunk(1, 0, 4), *chunk(2, 0, 4), *chunk(3, 0, 4)]
    np.testing.assert_allclose(np.array(arm.did)[:, 0], expected, atol=1e-6)
    said = [{key: each.get(key) for key in ("reset", "seed", "executed", "chunk")} for each in stub.requests]
    assert said[0] == {"reset": True, "seed": 7, "executed": None, "chunk": None}
    assert said[1:] == [{"reset": None, "seed": None, "executed": 4, "chunk": number} for number in (1, 2)]
    assert len({each["session"] for each in stub.requests}) == 1
    assert report == {
        "ticks": 12, "answers": 3, "held": 0, "misses": 0, "limited": 0, "refused": 0, "reconnects": 0
    }  # fmt: skip


def test_what_it_does_is_within_the_limits_of_the_checkpoint():
    with Stub(actions=lambda _: 5 * np.ones((CHUNK, 2))) as stub:
        arm, report, _ = drive(stub, ticks=4, limits="checkpoint", slack=0.0)
    np.testing.assert_allclose(np.array(arm.did)[:, 0], [0.5, 1.0, 1.0, 1.0])
    assert report["limited"] == 4


def test_what_is_not_a_number_is_never_carried_out():
    bad = {1, 3}
    with Stub(actions=lambda number: np.full((CHUNK, 2), np.nan) if number in bad and not bad.discard(number) else
              0.1 * np.ones((CHUNK, 2))) as stub:  # fmt: skip
        arm, report, _ = drive(stub, ticks=12)
    assert np.isfinite(np.array(arm.did)).all()
    assert report["refused"] == 2
    assert report["held"] == 1


def test_it_goes_on_over_a_new_connection_where_it_was():
    with Stub(hangs_up_at=[2]) as stub:
        arm, report, _ = drive(stub, ticks=8)
    np.testing.assert_allclose(np.array(arm.did)[:, 0], [*chunk(1, 0, 4), *chunk(2, 0, 4)], atol=1e-6)
    assert report["reconnects"] == 1
    assert [(each.get("chunk"), each.get("executed")) for each in stub.requests] == [(None, None), (1, 4), (1, 4)]


def test_it_begins_anew_where_the_server_has_forgotten_its_session():
    with Stub(hangs_up_at=[2], forgets=True) as stub:
        arm, report, _ = drive(stub, ticks=8, handover="rtc", seed=3)
    np.testing.assert_allclose(np.array(arm.did)[:, 0], [*chunk(1, 0, 4), *chunk(1, 0, 4)], atol=1e-6)
    assert report["reconnects"] == 1
    said = [{key: each.get(key) for key in ("reset", "chunk", "executed", "delay")} for each in stub.requests]
    assert said[2] == {"reset": None, "chunk": 1, "executed": 4, "delay": 1}
    assert said[3] == {"reset": True, "chunk": None, "executed": None, "delay": None}


def test_it_holds_the_last_pose_and_counts_it_while_the_server_is_late():
    with Stub() as stub:
        arm = Arm()
        loop = RobotLoop(arm.observe, arm.act, stub.address, "lift", rate=200, limits=None, handover="rtc")
        count = {"seen": 0}

        def observe():
            count["seen"] += 1
            if count["seen"] == 2:
                stub.go_on.clear()
            return {"observation.state": np.zeros(2, np.float32)}

        loop._observe = observe
        report = loop.run(done=lambda: loop.report["held"] > 20 and len(arm.did) > CHUNK)
    assert report["misses"] >= report["held"] > 20
    assert all(np.array_equal(each, arm.did[CHUNK - 1]) for each in arm.did[CHUNK:])


def test_it_asks_while_it_moves_and_keeps_its_rate():
    with Stub(thinks=0.03) as stub:
        arm, _, _ = drive(stub, ticks=40, rate=50, handover="rtc")
    assert len(arm.did) >= 30
    assert any(each.get("delay", 0) >= 1 for each in stub.requests)
    assert {each["executed"] for each in stub.requests[1:]} <= set(range(EVERY, CHUNK + 1))


def test_a_tick_that_has_begun_before_the_answer_is_there_counts_as_delay():
    with Stub(thinks=0.25) as stub:
        drive(stub, ticks=8, rate=5, handover="rtc")  # an answer takes one and a quarter ticks
    assert stub.requests[1]["delay"] >= 2


def test_nothing_is_carried_out_once_it_is_stopped():
    with Stub() as stub:
        arm = Arm()
        loop = RobotLoop(arm.observe, arm.act, stub.address, "lift", rate=100, handover="wait", limits=None)
        running = threading.Thread(target=loop.run)
        running.start()
        deadline = time.monotonic() + PATIENCE
        while len(arm.did) < 3 and time.monotonic() < deadline:
            time.sleep(0.002)
        loop.stop()
        done = len(arm.did)
        running.join(PATIENCE)
        assert not running.is_alive()
        assert len(arm.did) == done >= 3


def test_it_can_be_stopped_while_there_is_no_server():
    loop = RobotLoop(Arm().observe, Arm().act, "ws://127.0.0.1:9", "lift")
    running = threading.Thread(target=loop.run)
    running.start()
    loop.stop()
    running.join(PATIENCE)
    assert not running.is_alive()


def test_what_the_server_refuses_ends_the_loop_with_its_words():
    with Stub(refuses="error: task must be one of lift") as stub, pytest.raises(ServerError, match="task must be one"):
        drive(stub)
    with Stub(handover=["wait"]) as stub, pytest.raises(ValueError, match="handover must be one of wait, got 'rtc'"):
        drive(stub, handover="rtc")


def test_every_tick_is_a_line_of_the_log():
    log = io.StringIO()
    with Stub() as stub:
        arm, _, _ = drive(stub, ticks=6, log=log)
    lines = [json.loads(line) for line in log.getvalue().splitlines()]
    assert [line["tick"] for line in lines] == list(range(6))
    assert [line.get("chunk") for line in lines] == [1, None, None, None, 2, None]
    np.testing.assert_allclose([line["action"] for line in lines], np.array(arm.did), atol=1e-6)


# ------------------------------------------------------------------------------------------------------------ the check


def check(monkeypatch, capsys, *words):
    monkeypatch.setattr("sys.argv", ["kuavo_client.py", *words])
    return (main(), *capsys.readouterr())


def test_a_check_says_what_is_served_and_how_fast_it_answers(monkeypatch, capsys):
    with Stub() as stub:
        status, said, _ = check(monkeypatch, capsys, stub.address)
    assert status == 0
    lines = [line.split(None, 1) for line in said.splitlines()]
    assert [words[0] for words in lines] == ["policy", "tasks", "cameras", "hand-over", "a", "answers"]
    assert lines[2][1] == "observation.images.head 64x48"
    assert "chunk    [8, 2] of lift; a look every 4 steps of 100 ms" in said
    assert len(stub.requests) == 20
    assert stub.requests[0]["observation.images.head"].shape == (48, 64, 3)
    assert [each["executed"] for each in stub.requests[:2]] == [0, 4]


def test_a_check_of_what_is_not_there_or_refuses_is_one_line(monkeypatch, capsys):
    status, _, said = check(monkeypatch, capsys, "ws://127.0.0.1:9")
    assert (status, said.count("\n")) == (1, 1)
    with Stub(refuses="error: no") as stub:
        status, _, said = check(monkeypatch, capsys, stub.address)
    assert (status, said) == (1, "error: " + stub.address + ": error: no\n")
    assert check(monkeypatch, capsys)[0] == 2
