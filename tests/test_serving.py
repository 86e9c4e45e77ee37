"""A served policy: openpi's wire, an episode for every robot, and errors that a session survives."""

import asyncio
import http.client
import io
import shutil
import signal
import ssl
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from commands import Here
from forked import Forked
from PIL import Image
from served import PATIENCE, Robot, Served, eventually
from small_datasets import ARM_NAMES, BASE_NAMES, CAMERAS, TASK_NAMES
from websockets.exceptions import ConnectionClosed, InvalidStatus

from kuavo_client import Server
from kuavo_train.errors import ConfigError
from kuavo_train.serve import KEY_VARIABLE, Options, server_context
from kuavo_train.serving.server import PolicyServer, Serving
from kuavo_train.serving.sessions import Sessions
from kuavo_train.serving.wire import WireError, pack, unpack
from kuavo_train.wrapper.policy.episode import RobotEpisode
from kuavo_train.wrapper.policy.smolvla import Query, SmolVLAPolicyWrapper

Observation = dict[str, Any]
HEAD = f"observation.images.{CAMERAS[0]}"
STEPS = 2  # n_action_steps of the small checkpoint


@pytest.fixture(scope="module")
def policy(small_checkpoint: Path) -> SmolVLAPolicyWrapper:
    return SmolVLAPolicyWrapper.from_pretrained(small_checkpoint, device="cpu", seed=3)


@pytest.fixture(scope="module")
def alone(small_checkpoint: Path) -> SmolVLAPolicyWrapper:
    """The same policy in process: what a robot gets that has it for itself."""
    return SmolVLAPolicyWrapper.from_pretrained(small_checkpoint, device="cpu", seed=3)


@pytest.fixture(scope="module")
def served(policy: SmolVLAPolicyWrapper) -> Iterator[Served]:
    with Served(policy, batch=1) as server:
        yield server


def look(number: int = 0, task: str = "weighing") -> Observation:
    random = np.random.default_rng(number)
    pictures = {f"observation.images.{c}": random.integers(0, 256, (32, 32, 3), dtype=np.uint8) for c in CAMERAS}
    return {**pictures, "observation.state": random.normal(size=16).astype(np.float32), "task": task}


def in_process(
    policy: SmolVLAPolicyWrapper, seed: int, task: str, *, steps: int = 6, first_look: int = 0
) -> np.ndarray:
    """[steps, A] of an episode whose observations are `look(first_look + step)`."""
    policy.reset(seeds=[seed])
    return np.stack([policy.select_action(look(first_look + step, task)) for step in range(steps)])


# ------------------------------------------------------------------------------------------------------------ the wire


def test_an_array_goes_over_the_wire_as_openpis_client_writes_it() -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    as_openpi = {b"__ndarray__": True, b"data": array.tobytes(), b"dtype": "<f4", b"shape": [2, 3]}
    number = {b"__npgeneric__": True, b"data": 3, b"dtype": "<i8"}
    assert msgpack.unpackb(pack({"a": array, "n": np.int64(3)})) == {"a": as_openpi, "n": number}
    read = unpack(msgpack.packb({"a": as_openpi, "n": number}))
    assert np.array_equal(read["a"], array)
    assert read["a"].dtype == np.float32
    assert type(read["n"]) is np.int64


def entry(**changes: object) -> bytes:
    whole = {b"__ndarray__": True, b"data": b"\0" * 8, b"dtype": "<f4", b"shape": [2]}
    return msgpack.packb({"a": whole | {key.encode(): value for key, value in changes.items()}})


NO_MESSAGES = {
    "empty": b"",
    "a pickle": b"\x80\x04K\x01.",
    "cut off": pack({"a": np.zeros(9)})[:-3],
    "two": pack({}) + pack({}),
    "an object array": entry(dtype="|O"),
    "a structure": entry(dtype="i4,i4"),
    "a structure that fits": entry(dtype="i4,i4", shape=[1]),
    "a date": entry(dtype="<M8[s]", shape=[1]),
    "no dtype": entry(dtype=7),
    "too long a shape": entry(shape=[1] * 33),
    "a negative side": entry(shape=[-2]),
    "more than is there": entry(shape=[2**40, 2**40]),
    "less than is there": entry(shape=[1]),
    "no data": entry(data=[0, 0]),
    "a list of a billion": b"\xdd\x3b\x9a\xca\x00",
    "a list of two thousand": msgpack.packb([0] * 2000),
    "a map of two thousand": msgpack.packb(dict.fromkeys(range(2000))),
    "a map of a billion": b"\xdf\x3b\x9a\xca\x00",
    "an extension": msgpack.packb(msgpack.ExtType(4, b"x")),
    "a number too large": msgpack.packb({b"__npgeneric__": True, b"data": 999, b"dtype": "|u1"}),
    "no text": b"\x81\xa1\xff\x01",
    "lists in lists": b"\x91" * 100_000 + b"\x01",
}


@pytest.mark.parametrize("message", NO_MESSAGES.values(), ids=NO_MESSAGES)
def test_what_is_no_message_is_refused_before_room_is_made_for_it(message: bytes) -> None:
    with pytest.raises(WireError, match="must"):
        unpack(message)


def test_an_array_of_another_size_than_it_says_is_refused_by_both_sizes() -> None:
    with pytest.raises(WireError, match=r"an array of shape \[1\] and dtype <f4 must hold 4 bytes, got 8"):
        unpack(entry(shape=[1]))
    with pytest.raises(WireError, match=r"an array's dtype must be one of <f2, .*, got 'O'"):
        unpack(entry(dtype="O"))


# ------------------------------------------------------------------------------------------------------------ episodes


def test_a_robot_is_told_what_the_policy_takes_and_gives(served: Served) -> None:
    with served.robot() as robot:
        told = robot.metadata
    assert set(told["tasks"]) == set(TASK_NAMES)
    assert told["tasks"]["sorting"]["action_names"] == ARM_NAMES + BASE_NAMES
    assert told["cameras"] == {f"observation.images.{camera}": [32, 32] for camera in CAMERAS}
    assert (told["chunk_size"], told["n_action_steps"], told["fps"]) == (6, STEPS, 10)
    for least, greatest, step in told["tasks"]["weighing"]["limits"].values():
        assert least < greatest
        assert 0 < step <= greatest - least


def test_an_answer_is_a_chunk_in_the_dimensions_of_the_task(served: Served, alone: SmolVLAPolicyWrapper) -> None:
    with served.robot() as robot:
        answer = robot.ask(look(), reset=True, seed=0)
        assert answer["actions"].shape == (6, 16)
        assert (answer["names"], answer["step"], answer["chunk"]) == (ARM_NAMES, 1, 1)
        assert set(answer["server_timing"]) == {"queue_ms", "model_ms", "total_ms"}
        assert robot.ask(look(task="sorting"), reset=True)["actions"].shape == (6, 20)
    alone.reset(seeds=[0])
    assert np.array_equal(answer["actions"], alone.predict_chunk(look()))


def test_eight_robots_with_their_own_tasks_act_exactly_as_alone(served: Served, alone: SmolVLAPolicyWrapper) -> None:
    tasks = [TASK_NAMES[number % 4] for number in range(8)]
    with_others = walk_interleaved(served, tasks)
    for number, task in enumerate(tasks):
        assert np.array_equal(with_others[number], in_process(alone, number, task, first_look=10 * number)), number


def test_requests_that_wait_are_answered_in_one_batch_and_do_not_mix(
    policy: SmolVLAPolicyWrapper, alone: SmolVLAPolicyWrapper, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks, sizes = [TASK_NAMES[number % 4] for number in range(8)], []
    plan = policy.plan
    monkeypatch.setattr(policy, "plan", lambda queries: [sizes.append(len(queries)), plan(queries)][1])
    with Served(policy, batch=4) as server:
        together = walk_interleaved(server, tasks)
    assert max(sizes) == 4
    for number, task in enumerate(tasks):
        expected = in_process(alone, number, task, first_look=10 * number)
        np.testing.assert_allclose(together[number], expected, atol=1e-5)


@pytest.fixture
def busy(policy: SmolVLAPolicyWrapper, monkeypatch: pytest.MonkeyPatch) -> Iterator["Busy"]:
    """A server of `policy` that answers nobody until it is let go."""
    with Served(policy, batch=8) as server:
        yield Busy(server, policy, monkeypatch)


class Busy:
    """`sizes` are those of the batches that were computed."""

    def __init__(self, served: Served, policy: SmolVLAPolicyWrapper, monkeypatch: pytest.MonkeyPatch):
        self.served, self.sizes, self._go_on, self._plan = served, list[int](), threading.Event(), policy.plan
        monkeypatch.setattr(policy, "plan", self._held)
        self.first = served.robot()
        self.first.connection.send(pack(look()))
        assert eventually(lambda: len(self.sizes) == 1)

    def _held(self, queries: Any) -> Any:
        self.sizes.append(len(queries))
        assert self._go_on.wait(PATIENCE)
        return self._plan(queries)

    def send(self, robot: Robot, request: Observation) -> None:
        """Returns when it waits for its turn."""
        queue = self.served.server._batcher._queue
        before = queue.qsize()
        robot.connection.send(pack(request))
        assert eventually(lambda: queue.qsize() == before + 1)

    def go_on(self) -> None:
        self._go_on.set()
        assert self.first.hear()["step"] == 1


def test_a_request_that_is_refused_leaves_the_others_of_its_batch_their_answers(busy: Busy) -> None:
    with busy.served.robot() as good, busy.served.robot() as bad:
        busy.send(good, look(1))
        busy.send(bad, look(2) | {"executed": 3})
        busy.go_on()
        assert good.hear()["step"] == 1
        assert "executed must be 0" in bad.hear()
    assert busy.sizes == [1, 1]


def test_nothing_is_computed_for_a_robot_that_has_gone(busy: Busy) -> None:
    gone = busy.served.robot()
    with busy.served.robot() as there:
        busy.send(gone, look(1))
        waiting = busy.served.server._batcher._queue._queue[0]  # type: ignore[attr-defined]
        gone.vanish()
        assert eventually(waiting.gone)
        busy.send(there, look(2))
        busy.go_on()
        assert there.hear()["step"] == 1
    assert busy.sizes == [1, 1]


def test_a_session_is_not_asked_for_two_chunks_at_a_time(busy: Busy) -> None:
    with busy.served.robot() as one, busy.served.robot() as other:
        busy.send(one, look(1) | {"session": "shared"})
        busy.send(other, look(1) | {"session": "shared"})
        busy.go_on()
        assert one.hear()["step"] == 1
        assert "session 'shared' must be asked for one chunk at a time, got two" in other.hear()
    assert busy.sizes == [1, 1]


def walk_interleaved(server: Served, tasks: list[str]) -> list[np.ndarray]:
    """[6, A] of each robot, with requests of all under way at once; robot n begins at look 10 n."""
    robots = [server.robot() for _ in tasks]
    chunks: list[list[np.ndarray]] = [[] for _ in tasks]
    for step in range(0, 6, STEPS):
        for number, (robot, task) in enumerate(zip(robots, tasks, strict=True)):
            begins = {"reset": True, "seed": number} if step == 0 else {"executed": STEPS}
            robot.connection.send(pack(look(10 * number + step, task) | begins))
        for number, robot in enumerate(robots):
            chunks[number].append(robot.hear()["actions"][:STEPS])
    for robot in robots:
        robot.connection.close()
    return [np.concatenate(each) for each in chunks]


def test_a_reset_and_a_new_connection_and_another_task_begin_an_episode(
    served: Served, alone: SmolVLAPolicyWrapper
) -> None:
    first, second = (in_process(alone, seed, "weighing", steps=2) for seed in (0, 1))
    placement = in_process(alone, 1, "placement", steps=2)
    with served.robot() as robot:
        assert np.array_equal(robot.ask(look())["actions"][:2], first)
        assert not np.allclose(robot.ask(look())["actions"][:2], first)
        assert np.array_equal(robot.ask(look(), reset=True)["actions"][:2], second)
        assert np.array_equal(robot.ask(look(task="placement"))["actions"][:2], placement)
    with served.robot() as robot:
        assert np.array_equal(robot.ask(look())["actions"][:2], first)


def test_a_prompt_or_an_instruction_in_full_names_the_task_as_well(served: Served) -> None:
    with served.robot() as robot:
        by_name = robot.ask(look(), reset=True, seed=0)["actions"]
        instruction = robot.metadata["tasks"]["weighing"]["instructions"][0]
        asked = {**look(), "prompt": instruction}
        del asked["task"]
        assert np.array_equal(robot.ask(asked, reset=True, seed=0)["actions"], by_name)


def test_pictures_come_in_either_order_or_as_jpeg(served: Served) -> None:
    smooth = np.broadcast_to(np.arange(32, dtype=np.uint8)[:, None, None] * 4, (32, 32, 3))
    pictures = {key: smooth for key in look() if "images" in key}
    file = io.BytesIO()
    Image.fromarray(smooth).save(file, "jpeg", quality=100, subsampling=0)
    with served.robot() as robot:
        rows, planes, jpeg = (
            robot.ask({**look(), **dict.fromkeys(pictures, each)}, reset=True, seed=0)["actions"]
            for each in (smooth, np.moveaxis(smooth, -1, 0), file.getvalue())
        )
    assert np.array_equal(rows, planes)
    np.testing.assert_allclose(jpeg, rows, atol=0.02)


def test_the_memory_advances_as_in_training_however_often_a_robot_looks(served: Served) -> None:
    """Every `n_action_steps` steps carried out, at most once a look; a look in between plans anew from what it is."""
    with served.robot() as robot:
        sooner = [robot.ask(look(0), reset=True)["step"]]
        sooner += [robot.ask(look(n), executed=1)["step"] for n in range(1, 7)]
        later = [robot.ask(look(0), reset=True)["step"]]
        later += [robot.ask(look(n), executed=5)["step"] for n in range(1, 4)]
        as_trained = [robot.ask(look(n), reset=n == 0)["step"] for n in range(4)]
    assert sooner == [1, 1, 2, 2, 3, 3, 4]
    assert later == [1, 2, 3, 4]
    assert as_trained == [1, 2, 3, 4]


def test_a_look_in_between_leaves_the_memory_as_it_was(served: Served, alone: SmolVLAPolicyWrapper) -> None:
    with served.robot() as robot:
        robot.ask(look(0), reset=True, seed=0)
        robot.ask(look(1), executed=1)
        after = robot.ask(look(2), executed=1)["actions"][:STEPS]
    expected = in_process(alone, 0, "weighing", steps=4)[2:]
    assert np.array_equal(after, expected)


# ----------------------------------------------------------------------------------------------------- real-time chunks


def test_a_plan_for_the_hand_over_begins_with_the_steps_carried_out_meanwhile(
    served: Served, alone: SmolVLAPolicyWrapper
) -> None:
    """`executed` steps of the last chunk are done at the look, `delay` more follow before the answer is there."""
    executed, delay = 1, 2
    with served.robot() as robot:
        first = robot.ask(look(0), reset=True, seed=0)
        planned = robot.ask(look(1), executed=executed, delay=delay, chunk=first["chunk"])["actions"]
        freely = robot.ask(look(1), executed=executed, chunk=first["chunk"])["actions"]
    meanwhile = first["actions"][executed : executed + delay]
    np.testing.assert_allclose(planned[:delay], meanwhile, atol=1e-4)
    assert np.abs(freely[:delay] - meanwhile).max() > 1e-3
    begun = alone.plan([Query(alone.look(look(0)), RobotEpisode(0))])[0]
    assert np.array_equal(begun.actions, first["actions"])
    episode = begun.episode.moved(executed)
    for delayed, got in ((delay, planned), (None, freely)):
        assert np.array_equal(alone.plan([Query(alone.look(look(1)), episode, executed, delayed)])[0].actions, got)


def test_robots_with_and_without_a_delay_are_answered_as_alone(
    policy: SmolVLAPolicyWrapper, alone: SmolVLAPolicyWrapper
) -> None:
    """Also those of another delay, and of another place in their chunk, in one batch."""
    sayings = [{"executed": 2}, {"executed": 2, "delay": 1}, {"executed": 2, "delay": 1}, {"executed": 3, "delay": 1}]
    plans = [alone.plan([Query(alone.look(look(n)), RobotEpisode(n))])[0].episode for n in range(len(sayings))]
    expected = [
        alone.plan([Query(alone.look(look(9)), plan.moved(said["executed"]), said["executed"], said.get("delay"))])[0]
        for plan, said in zip(plans, sayings, strict=True)
    ]
    with Served(policy, batch=4) as server:
        robots = [server.robot() for _ in sayings]
        for number, robot in enumerate(robots):
            robot.ask(look(number), reset=True, seed=number)
        for robot, said in zip(robots, sayings, strict=True):
            robot.connection.send(pack(look(9) | said))
        for robot, plan in zip(robots, expected, strict=True):
            np.testing.assert_allclose(robot.hear()["actions"], plan.actions, atol=1e-4)
            robot.connection.close()


# ------------------------------------------------------------------------------------------------------------ sessions


def test_a_robot_that_lost_its_connection_goes_on_where_it_was(served: Served, alone: SmolVLAPolicyWrapper) -> None:
    expected = in_process(alone, 5, "weighing")
    robot = served.robot()
    first = robot.ask(look(0), reset=True, seed=5, session="left arm")
    robot.vanish()
    with served.robot() as robot:
        second = robot.ask(look(2), executed=2, session="left arm")
        robot.connection.send(pack(look(4) | {"executed": 2, "session": "left arm", "chunk": second["chunk"]}))
        robot.vanish()  # the answer is lost
    with served.robot() as robot:
        third = robot.ask(look(4), executed=2, session="left arm", chunk=second["chunk"])
    walked = np.concatenate([each["actions"][:STEPS] for each in (first, second, third)])
    assert np.array_equal(walked, expected)
    assert third["step"] == 3


def test_a_robot_whose_first_answer_was_lost_begins_as_it_would_have(served: Served) -> None:
    with served.robot() as robot:
        first, again = (robot.ask(look(0), session="new here", seed=5, chunk=0) for _ in range(2))
    assert np.array_equal(first["actions"], again["actions"])
    assert [(each["chunk"], each["step"]) for each in (first, again)] == [(1, 1), (1, 1)]


def test_a_session_that_was_lost_for_too_long_is_forgotten_and_says_so(policy: SmolVLAPolicyWrapper) -> None:
    with Served(policy, session_timeout=0.0) as server:
        robot = server.robot()
        robot.ask(look(), session="a")
        robot.vanish()
        assert eventually(lambda: server.server.sessions == 0)
        with server.robot() as robot:
            told = robot.ask(look(), executed=2, session="a")
            assert "executed must be 0 where an episode begins, got 2; a session that was lost" in told
            assert robot.ask(look(), reset=True, session="a")["chunk"] == 1


def test_of_the_sessions_that_wait_for_their_robots_the_oldest_go_first() -> None:
    """However many robots come with an id and go again, so many sessions are kept and no more."""
    time = iter(range(100))
    sessions = Sessions(timeout=1000.0, most_kept=2, clock=lambda: float(next(time)))
    for name in ("first", "second", "third"):
        sessions.of(owner := object(), name).answers = (name,)  # type: ignore[assignment]
        sessions.release(owner)
    assert len(sessions) == 2
    assert [sessions.of(object(), name).answers for name in ("second", "third")] == [("second",), ("third",)]
    assert sessions.of(object(), "first").answers == ()


def test_a_later_connection_takes_a_session_over(served: Served) -> None:
    with served.robot() as old, served.robot() as new:
        old.ask(look(), reset=True, session="shared")
        assert new.ask(look(), executed=2, session="shared")["step"] == 2
        assert "session 'shared' must be of one connection" in old.ask(look(), executed=2, session="shared")
        assert new.ask(look(), executed=2, session="shared")["step"] == 3


def test_a_robot_that_vanishes_frees_its_place(policy: SmolVLAPolicyWrapper) -> None:
    with Served(policy, robots=1) as server:
        robot = server.robot()
        robot.ask(look())
        with pytest.raises(InvalidStatus, match="503"):
            server.robot()
        robot.connection.send(pack(look()))
        robot.vanish()
        assert eventually(lambda: server.server.sessions == 0)
        with server.robot() as robot:
            assert robot.ask(look())["step"] == 1


def test_a_robot_that_does_not_read_its_answers_is_given_up(
    policy: SmolVLAPolicyWrapper, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Deaf:
        """A connection whose other end takes nothing."""

        remote_address, transport, aborted = ("robot", 1), property(lambda self: self), False

        async def send(self, _message: bytes) -> None:
            await asyncio.Event().wait()

        def abort(self) -> None:
            self.aborted = True

    monkeypatch.setattr("kuavo_train.serving.server.SEND_TIMEOUT", 0.01)
    deaf = Deaf()

    async def handle() -> None:
        await asyncio.wait_for(PolicyServer(policy, Serving())._handle(deaf), PATIENCE)  # type: ignore[arg-type]

    asyncio.run(handle())
    assert deaf.aborted


# -------------------------------------------------------------------------------------------------------------- errors

MISUSES: dict[str, tuple[Callable[[Observation], Any], str]] = {
    "no camera": (lambda o: o.pop(HEAD), f"must hold {HEAD}"),
    "no state": (lambda o: o.pop("observation.state"), "must hold observation.state"),
    "no task": (lambda o: o.pop("task"), "task must be an instruction, or a task's name, got None"),
    "unknown task": (lambda o: o.update(task="make coffee"), "task must be one of moving_grasp, weighing"),
    "two tasks": (lambda o: o.update(prompt="sorting"), "task and prompt must be the same"),
    "misspelt": (lambda o: o.update(excuted=2), "keys must be observation"),
    "17 joints": (lambda o: o.update({"observation.state": np.zeros(17)}), "16 dimensions of weighing"),
    "two robots": (lambda o: o.update({"observation.state": np.zeros((2, 16))}), "must be of shape [S]"),
    "text for joints": (lambda o: o.update({"observation.state": "no"}), "observation.state must be an array"),
    "nan": (lambda o: o.update({"observation.state": np.full(16, np.nan)}), "observation.state must be finite"),
    "float pictures": (lambda o: o.update({HEAD: np.zeros((3, 32, 32))}), f"{HEAD} must be [H, W, 3]"),
    "another size": (lambda o: o.update({HEAD: np.zeros((9, 9, 3), np.uint8)}), f"{HEAD} must be of the size"),
    "no jpeg": (lambda o: o.update({HEAD: b"\xff\xd8 no"}), f"{HEAD} must be a whole JPEG"),
    "a half jpeg": (lambda o: o.update({HEAD: jpeg(32)[:-200]}), f"{HEAD} must be a whole JPEG"),
    "a png": (lambda o: o.update({HEAD: png(32)}), f"{HEAD} must be a whole JPEG"),
    "a large jpeg": (lambda o: o.update({HEAD: jpeg(64)}), f"{HEAD} must be at most (32, 32)"),
    "reset of text": (lambda o: o.update(reset="yes"), "reset must be true or false"),
    "negative": (lambda o: o.update(executed=-1), "executed must be a whole number"),
    "a flag for a number": (lambda o: o.update(executed=True), "executed must be a whole number"),
    "half a step": (lambda o: o.update(executed=0.5), "executed must be a whole number"),
    "more than planned": (lambda o: o.update(executed=7), "executed must be in [0, 6]"),
    "executed before": (lambda o: o.update(reset=True, executed=1), "executed must be 0 where an episode begins"),
    "seed in between": (lambda o: o.update(seed=9), "seed must be given where an episode begins"),
    "another chunk": (lambda o: o.update(chunk=77), "chunk must be 1, the number of the answer that you have"),
    "too late": (lambda o: o.update(executed=4, delay=3), "executed + delay must be at most 6"),
    "no id": (lambda o: o.update(session=""), "session must be text"),
    "too large": (lambda o: o.update({"observation.more": bytes(80_000)}), "a request must hold at most"),
}


def jpeg(size: int, kind: str = "jpeg") -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, kind, quality=95)
    return file.getvalue()


def png(size: int) -> bytes:
    return jpeg(size, "png")


def test_a_bad_request_is_answered_by_key_and_rule_and_the_session_lives_on(
    served: Served, alone: SmolVLAPolicyWrapper
) -> None:
    with served.robot() as robot:
        answers = [robot.ask(look(0), reset=True, seed=0)]
        for spoil, message in MISUSES.values():
            asked = look(1)
            spoil(asked)
            robot.connection.send(pack(asked))
            told = robot.hear()
            assert isinstance(told, str), message
            assert message in told
        for garbage in (*NO_MESSAGES.values(), pack([1]), "text"):
            robot.connection.send(garbage)
            assert robot.hear().startswith("error: a")
        answers.append(robot.ask(look(2), executed=2))
    walked = np.concatenate([each["actions"][:STEPS] for each in answers])
    assert np.array_equal(walked, in_process(alone, 0, "weighing", steps=4))


def test_a_frame_far_too_large_ends_the_connection_and_not_the_server(served: Served) -> None:
    with served.robot() as robot:
        robot.connection.send(bytes(4 * robot.metadata["largest_request"] + 1))
        with pytest.raises(ConnectionClosed, match="1009"):
            robot.hear()
    with served.robot() as robot:
        assert robot.ask(look())["step"] == 1


def test_what_is_no_websocket_does_not_disturb_the_robots(served: Served) -> None:
    for greeting in (b"\0" * 100, b"GET / HTTP/1.1\r\n\r\n", struct.pack("!I", 2**31) * 50):
        with io.BytesIO(greeting), http.client.socket.create_connection(("127.0.0.1", served.port), PATIENCE) as raw:
            raw.sendall(greeting)
    with served.robot() as robot:
        assert robot.ask(look())["step"] == 1


def test_what_the_model_raises_is_told_and_the_server_goes_on(
    served: Served, policy: SmolVLAPolicyWrapper, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_queries: object) -> None:
        raise RuntimeError("out of memory")

    with served.robot() as robot:
        with monkeypatch.context() as patched:
            patched.setattr(policy, "plan", fail)
            assert robot.ask(look()) == "error: the policy failed, RuntimeError: out of memory"
        assert robot.ask(look())["step"] == 1


# ------------------------------------------------------------------------------------------------------ who may connect


def get(port: int, path: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    connection.request("GET", path)
    response = connection.getresponse()
    return response.status, response.read()


def test_a_key_is_asked_for_but_by_the_health_check(policy: SmolVLAPolicyWrapper) -> None:
    with Served(policy, api_key="right") as server:
        for headers in ({}, *({"Authorization": key} for key in ("Api-Key wrong", "Api-Key r", "right"))):
            with pytest.raises(InvalidStatus, match="401"):
                server.robot(**headers)
        assert get(server.port, "/healthz") == (200, b"OK\n")
        with server.robot(Authorization="Api-Key right") as robot:
            assert robot.ask(look())["step"] == 1


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
def test_a_robot_connects_over_tls_with_the_key_and_the_certificate(
    policy: SmolVLAPolicyWrapper, tmp_path: Path
) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    words = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    made = ["openssl", *words, *names, "-keyout", str(key), "-out", str(cert)]
    subprocess.run(made, check=True, capture_output=True)
    options = Options("any", tls_cert=cert, tls_key=key)
    with Served(policy, api_key="right", tls=server_context(options)) as server:
        address = f"wss://127.0.0.1:{server.port}"
        robot = Server(address, "right", PATIENCE, ssl.create_default_context(cafile=str(cert)))
        assert robot.ask(look())["step"] == 1
        robot.close()
        with pytest.raises(ssl.SSLError):
            Server(address, "right", PATIENCE)
    with pytest.raises(ConfigError, match="tls_cert and tls_key must be a certificate and its key"):
        server_context(Options("any", tls_cert=key, tls_key=cert))


def test_a_page_in_a_browser_cannot_connect(served: Served) -> None:
    with pytest.raises(InvalidStatus, match="403"):
        served.robot(Origin="http://example.org")


def test_a_server_that_stops_gives_the_answers_under_way(
    policy: SmolVLAPolicyWrapper, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on, plan = threading.Event(), threading.Event(), policy.plan

    def slow(queries: Any) -> Any:
        begun.set()
        assert go_on.wait(PATIENCE)
        return plan(queries)

    with Served(policy) as server:
        monkeypatch.setattr(policy, "plan", slow)
        asking, idle = server.robot(), server.robot()
        asking.connection.send(pack(look()))
        assert begun.wait(PATIENCE)
        server.stop()
        assert eventually(lambda: _refused(server))
        go_on.set()
        assert asking.hear()["step"] == 1
        for robot in (asking, idle):
            with pytest.raises(ConnectionClosed):
                robot.hear()
        assert server.ends()


def _refused(server: Served) -> bool:
    try:
        server.robot().connection.close()
    except InvalidStatus as refusal:
        return refusal.response.status_code == 503
    return False


# --------------------------------------------------------------------------------------------------------- the command


def test_beyond_this_machine_it_serves_only_with_a_key(
    here: Here, monkeypatch: pytest.MonkeyPatch, small_checkpoint: Path
) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    for host in ("0.0.0.0", "::", "robot.example"):
        done = here("kuavo_train.serve", f"checkpoint={small_checkpoint}", f"host={host}")
        assert done.returncode == 2
        assert done.stderr == f"error: {KEY_VARIABLE} must be set to listen on {host}, got none\n"


def test_what_cannot_be_served_is_said_in_one_line(here: Here, tmp_path: Path, small_checkpoint: Path) -> None:
    for words, told in (
        ([f"checkpoint={tmp_path}"], "must be a checkpoint's folder"),
        ([f"checkpoint={small_checkpoint}", "port=65536"], "port must be in [0, 65535], got 65536"),
        ([f"checkpoint={small_checkpoint}", f"tls_cert={tmp_path}"], "tls_cert and tls_key must be given together"),
        ([f"checkpoint={small_checkpoint}", "n_action_steps=7"], "n_action_steps must be in [1, 6], got 7"),
        (
            [f"checkpoint={small_checkpoint}", "device=cpu", "cuda_graphs=true", "n_action_steps=7"],
            "cuda_graphs must be false on cpu, got true",
        ),
    ):
        done = here("kuavo_train.serve", *words)
        assert done.returncode == 2
        assert told in done.stderr
        assert done.stderr.count("\n") == 1


def test_sigterm_ends_the_command_cleanly(forked: Callable[..., Forked], small_checkpoint: Path) -> None:
    running = forked("kuavo_train.serve", f"checkpoint={small_checkpoint}", "port=0", "device=cpu")
    assert eventually(lambda: "\n" in running.printed("stdout"))
    said = running.printed("stdout")
    with Robot(int(said.rsplit(":", 1)[1])) as robot:
        assert robot.ask(look())["step"] == 1
        running.send(signal.SIGTERM)
        with pytest.raises(ConnectionClosed):
            robot.hear()
    done = running.wait()
    assert done.returncode == 0
    assert done.stderr == "stopped\n"
