"""Drive a robot by a served policy, from the Python that the robot has: 3.8 or later, numpy, msgpack and websockets.

    def observe():                              # what the robot sees now
        return {
            "observation.images.head_cam_h": jpeg_bytes,      # or [H, W, 3] uint8; every camera of the policy
            "observation.state": joints,                      # in rad, claws in [0, 1]
        }

    def act(action):                            # called `rate` times a second; loop.names says which joint is which
        publish(action)

    loop = RobotLoop(observe, act, "ws://192.168.26.1:8000", task="weighing", rate=10)
    report = loop.run()                         # until loop.stop(), or request_stop() from a signal handler

This file is all there is: copy it to the robot, or install the wheel. The server is `python -m kuavo_train.serve`.
Whether it answers, and how fast, without a robot that moves (KUAVO_API_KEY may hold the key):

    python3 kuavo_client.py ws://192.168.26.1:8000          # from the wheel: kuavo-check ws://…

The policy plans chunks of actions. How the robot passes from one to the next:

    wait    it carries out n_action_steps, looks, and holds its pose until the next chunk is there
    blend   it looks every n_action_steps and goes on; a new chunk is faded in over what is left of the old one
    rtc     as blend, but the server plans the new chunk so that it begins with the steps carried out meanwhile
"""

from __future__ import annotations

import json
import os
import ssl
import sys
import threading
import time
import uuid
from collections import deque
from contextlib import ExitStack
from typing import IO, Any, Callable, Mapping, Sequence

import msgpack
import numpy as np

try:
    from websockets.exceptions import WebSocketException
    from websockets.sync.client import connect
except ImportError as error:  # pragma: no cover
    raise ImportError("kuavo_client needs websockets>=13") from error

__version__ = "0.1.0"

HANDOVERS = ("wait", "blend", "rtc")
STATE = "observation.state"
REMEMBERED_DELAYS = 5
LONGEST_WAIT = 0.05  # s until a wait looks whether the loop was stopped
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 2.0  # s between attempts to connect


class ServerError(RuntimeError):
    """What the server says is wrong with a request."""


# ------------------------------------------------------------------------------------------------------------ the wire


def pack(message: object) -> bytes:
    """msgpack, with numpy arrays as openpi's client writes them."""
    return msgpack.packb(message, default=_packed)


def unpack(message: bytes) -> Any:
    return msgpack.unpackb(message, object_hook=_unpacked)


def _packed(value: object) -> object:
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "VOc":
        raise TypeError("an array must hold numbers, got dtype %s" % value.dtype)
    if isinstance(value, np.ndarray):
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    if isinstance(value, np.generic):
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    raise TypeError("a message must hold maps, lists, text, bytes, numbers and arrays, got %s" % type(value).__name__)


def _unpacked(entry: dict) -> object:
    if b"__ndarray__" in entry:
        return np.frombuffer(entry[b"data"], np.dtype(entry[b"dtype"])).reshape(entry[b"shape"]).copy()
    if b"__npgeneric__" in entry:
        return np.dtype(entry[b"dtype"]).type(entry[b"data"])
    return entry


class Server:
    """A connection. `metadata` is what the server says of itself and its policy.

    Args:
        address: ws://host:port, or wss:// where it serves with TLS.
        api_key: where the server asks for one.
        timeout: s until a server that does not answer is given up.
        tls: for wss:// with a certificate that the system does not know: ssl.create_default_context(cafile=…).
    """

    def __init__(
        self, address: str, api_key: str | None = None, timeout: float = 10.0, tls: ssl.SSLContext | None = None
    ):
        headers = {"Authorization": "Api-Key " + api_key} if api_key else None
        self._timeout = timeout
        self._open = ExitStack()  # websockets 17 wants its connections entered
        self._connection = self._open.enter_context(
            connect(address, additional_headers=headers, compression=None, max_size=None, open_timeout=timeout, ssl=tls)
        )
        self.metadata = self._hear()

    def ask(self, request: Mapping[str, Any]) -> dict:
        """Raises `ServerError` for a request that the server refuses."""
        self._connection.send(pack(request))
        return self._hear()

    def close(self) -> None:
        self._open.close()

    def _hear(self) -> dict:
        message = self._connection.recv(self._timeout)
        if isinstance(message, str):
            raise ServerError(message)
        return unpack(message)


# ------------------------------------------------------------------------------------------------------- the hand-over


class Handover:
    """Which action comes next, and when to look. Time is counted in steps that are carried out.

    A chunk's action 0 is for the step of its look. A chunk that arrives e steps later is taken up at its action e.
    """

    def __init__(self, kind: str, n_action_steps: int):
        """
        Args:
            n_action_steps: steps from one look to the next, as in training.
        """
        if kind not in HANDOVERS:
            raise ValueError("handover must be one of %s, got %r" % (", ".join(HANDOVERS), kind))
        if n_action_steps < 1:
            raise ValueError("n_action_steps must be at least 1, got %r" % n_action_steps)
        self.kind, self._every = kind, n_action_steps
        self.begin()

    def begin(self) -> None:
        """An episode begins."""
        self._chunk = self._old = None  # type: np.ndarray | None
        self._next = self._next_old = 0  # place in each
        self._fade = self._faded = 0
        self._since = 0  # steps carried out since the last look
        self.waiting = False  # for an answer

    @property
    def due(self) -> bool:
        """Whether to look now."""
        return not self.waiting and (self._nothing_left or self._since >= self._every)

    @property
    def _nothing_left(self) -> bool:
        return self._chunk is None or self._next >= len(self._chunk)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to carry out until the answer is there."""
        return self.waiting and (self._nothing_left or self.kind == "wait")

    def look(self, delay: int = 0) -> dict[str, int]:
        """The robot looks now: what the request has to say.

        Args:
            delay: steps that will be carried out before the answer is there, as far as is known.
        """
        said = {"executed": self._since} if self._chunk is not None else {}
        if self.kind == "rtc" and self._chunk is not None and self._next < len(self._chunk):
            said["delay"] = min(delay, len(self._chunk) - self._next)
        self._since, self.waiting = 0, True
        return said

    def arrived(self, actions: np.ndarray) -> int:
        """The answer is there, [T, D]; returns the steps that were carried out meanwhile."""
        if self.kind == "blend" and self._chunk is not None:
            self._old, self._next_old, self._faded = self._chunk, self._next, 0
            # over before the next one comes, which fades from this chunk as it is
            self._fade = min(max(1, self._every - 1), len(self._chunk) - self._next, len(actions) - self._since)
        self._chunk, self._next, self.waiting = actions, self._since, False
        return self._since

    def failed(self, said: Mapping[str, int]) -> None:
        """No answer will come to the look that said this: it did not happen."""
        self._since, self.waiting = self._since + said.get("executed", 0), False

    def action(self) -> np.ndarray | None:
        """The next step's, [D], which is then carried out; None where there is none: hold the pose."""
        if self._chunk is None or self._nothing_left or self.idle:
            return None
        action = self._chunk[self._next]
        if self._faded < self._fade:
            assert self._old is not None
            weight = (self._faded + 1.0) / (self._fade + 1.0)
            action = (1 - weight) * self._old[self._next_old + self._faded] + weight * action
            self._faded += 1
        self._next += 1
        self._since += 1
        return np.asarray(action, dtype=np.float32)


# ----------------------------------------------------------------------------------------------------------- the limits


class Limits:
    """What a joint may be told: a range, and a greatest change per tick."""

    def __init__(self, names: Sequence[str], limits: Mapping[str, Sequence[float]], slack: float = 0.1):
        """
        Args:
            limits: name → (least, greatest, greatest change per tick).
            slack: by how much of itself the range is wider on either side, and the change greater.
        """
        missing = [name for name in names if name not in limits]
        if missing:
            raise ValueError(
                "limits must name every dimension, got none of %s; give limits={name: (least, greatest, step)}, or "
                "limits=None for none" % ", ".join(missing)
            )
        least, greatest, step = (np.array([limits[name][k] for name in names], np.float32) for k in range(3))
        wider = slack * (greatest - least)
        self._names, self._least, self._greatest, self._step = (
            names,
            least - wider,
            greatest + wider,
            (1 + slack) * step,
        )

    def obey(self, action: np.ndarray, before: np.ndarray) -> tuple[np.ndarray, list[str]]:
        """The action within the limits, and the names of what was outside.

        Args:
            before: [D] the action of the tick before; NaN where there is none.
        """
        within = np.clip(action, self._least, self._greatest)
        near = np.clip(within, before - self._step, before + self._step)
        within = np.where(np.isnan(before), within, near).astype(np.float32)
        return within, [name for name, changed in zip(self._names, within != action) if changed]


# ------------------------------------------------------------------------------------------------------------- the loop


class RobotLoop:
    """Observes, asks, acts, `rate` times a second, until it is stopped.

    Attributes:
        metadata: of the server; None until it runs.
        names: of the action's dimensions; None until it runs.
        report: counts so far: ticks, answers, held (ticks without an action), misses (ticks that were held or came too
            late), limited (ticks with an action outside the limits), refused (chunks that were not finite), reconnects.
    """

    def __init__(
        self,
        observe: Callable[[], Mapping[str, Any]],
        act: Callable[[np.ndarray], object],
        server: str,
        task: str,
        rate: float | None = 10,
        handover: str = "blend",
        limits: Any = "checkpoint",
        slack: float = 0.1,
        seed: int | None = None,
        session: str | None = None,
        api_key: str | None = None,
        timeout: float = 10.0,
        tls: ssl.SSLContext | None = None,
        log: IO[str] | None = None,
    ):
        """
        Args:
            observe: what the robot sees now, under the policy's keys: pictures as [H, W, 3] uint8 or JPEG bytes, and
                `observation.state`.
            act: takes the action [D] of this tick.
            task: a task's name, or an instruction.
            rate: ticks a second; None ticks as fast as answers come, for a simulated robot that stands still meanwhile.
            handover: wait, blend or rtc. Measured, blend does the jobs as often as rtc and holds still least of all.
            limits: "checkpoint" for those of the policy's demonstrations, a mapping of name → (least, greatest,
                greatest change per tick), or None.
            slack: by how much of itself a range is wider and a change greater.
            seed: of the episode's noise.
            session: the id under which the robot goes on after it has lost its connection; None for one of its own.
            api_key, timeout, tls: see `Server`.
            log: a text file that takes a line of JSON per tick.
        """
        if handover not in HANDOVERS:
            raise ValueError("handover must be one of %s, got %r" % (", ".join(HANDOVERS), handover))
        if rate is not None and not rate > 0:
            raise ValueError("rate must be ticks a second above 0, or None, got %r" % rate)
        self._observe, self._act, self._task = observe, act, task
        self._period = None if rate is None else 1.0 / rate
        self._kind, self._limits_given, self._slack, self._log = handover, limits, slack, log
        self._seed = seed
        self._asker = _Asker(server, api_key, timeout, tls, session or uuid.uuid4().hex)
        self._stopped, self._acting = threading.Event(), threading.Lock()
        self._delays = deque([1], maxlen=REMEMBERED_DELAYS)
        self._command = None  # type: np.ndarray | None
        self.metadata = None  # type: dict | None
        self.names = None  # type: list[str] | None
        self.report = dict.fromkeys(("ticks", "answers", "held", "misses", "limited", "refused", "reconnects"), 0)

    def stop(self) -> None:
        """Ends the loop. After it returns nothing is carried out any more. May be called from any thread."""
        self.request_stop()
        self._asker.stop()
        with self._acting:
            pass

    def request_stop(self) -> None:
        """As `stop`, without waiting for an `act` under way: what a signal handler may call."""
        self._stopped.set()

    def run(self, ticks: int | None = None, done: Callable[[], bool] = lambda: False) -> dict[str, int]:
        """One episode, until `stop`, for so many ticks, or until `done()`.

        Returns:
            The report.

        Raises:
            ServerError: the server refuses the requests.
            ValueError: it has no such task, no such hand-over, or no limits.
        """
        self._asker.start()
        try:
            self.metadata = self._asker.metadata(self._stopped)
            if self.metadata is not None:
                self._drive(self.metadata, ticks, done)
        finally:
            self._asker.stop()
            self.report["reconnects"] = self._asker.reconnects
        return self.report

    def _drive(self, metadata: Mapping[str, Any], ticks: int | None, done: Callable[[], bool]) -> None:
        if self._kind not in metadata["handover"]:
            raise ValueError("handover must be one of %s, got %r" % (", ".join(metadata["handover"]), self._kind))
        self._handover = Handover(self._kind, metadata["n_action_steps"])
        self._seen = deque(maxlen=metadata["frames"])  # type: deque[Mapping[str, Any]]
        self._limits = self._last = None  # type: Any
        self._chunk, begun, number = 0, time.monotonic(), 0
        while not self._stopped.is_set() and (ticks is None or number < ticks) and not done():
            if self._period is not None:
                self._stopped.wait(max(0.0, begun + number * self._period - time.monotonic()))
            deadline = None if self._period is None else begun + (number + 1) * self._period
            line = {"tick": number, "time": time.monotonic() - begun}
            self._take_up(metadata, deadline, line)
            self._look(metadata, line)
            self._take_up(metadata, deadline, line)
            self._move(metadata, deadline, line)
            number += 1

    def _look(self, metadata: Mapping[str, Any], line: dict[str, Any]) -> None:
        """Ask for the next chunk where it is time."""
        due = self._handover.due
        if due or metadata["frames"] > 1:
            self._seen.append(dict(self._observe()))
        if not due:
            return
        self._said = self._handover.look(max(self._delays))
        request = dict(_stacked(self._seen, metadata["frames"]), task=self._task, **self._said)
        if self._chunk == 0:
            request["reset"] = True
        else:
            request["chunk"] = self._chunk
        if self._seed is not None and self._chunk == 0:
            request["seed"] = self._seed
        self._asked_at = time.monotonic()
        self._asker.ask(request)
        line["asked"] = dict(self._said)

    def _take_up(self, metadata: Mapping[str, Any], deadline: float | None, line: dict[str, Any]) -> None:
        """Take up the chunk that was asked for, where it is there: waiting for it while there is nothing else to do."""
        if not self._handover.waiting:
            return
        patient = self._period is None or self._handover.idle
        answer = self._asker.answer(deadline if patient else 0.0, self._stopped)
        if answer is None:
            return
        if not np.isfinite(answer["actions"]).all():
            self._handover.failed(self._said)
            self.report["refused"] += 1
            line["refused"] = "actions must be finite"
            return
        if self.names != answer["names"]:
            self.names = list(answer["names"])
            self._limits = self._limits_of(metadata["tasks"][answer["task"]])
            self._last = self._pose(metadata["tasks"][answer["task"]]["state_names"])
        meanwhile, took = self._handover.arrived(answer["actions"]), time.monotonic() - self._asked_at
        self._delays.append(meanwhile if self._period is None else int(np.ceil(took / self._period)))
        self._chunk = answer["chunk"]
        self.report["answers"] += 1
        line.update({"chunk": self._chunk, "taken_up_at": meanwhile, "answered_ms": 1000 * took})

    def _move(self, metadata: Mapping[str, Any], deadline: float | None, line: dict[str, Any]) -> None:
        action, limited = self._handover.action(), []  # type: Any, list[str]
        held = action is None
        if held:
            action = self._command
        elif self._limits is not None:
            action, limited = self._limits.obey(action, self._last)
        if not self._carry_out(action):
            return
        missed = held or (deadline is not None and time.monotonic() > deadline)
        for key, happened in (("ticks", True), ("held", held), ("misses", missed), ("limited", bool(limited))):
            self.report[key] += int(happened)
        if self._log is not None:
            line.update({"held": held, "missed": missed, "limited": limited})
            line["action"] = None if action is None else [float(each) for each in action]
            self._log.write(json.dumps(line) + "\n")
            self._log.flush()

    def _carry_out(self, action: np.ndarray | None) -> bool:
        """Whether it was: not after `stop`, and nothing before the first chunk."""
        with self._acting:
            if self._stopped.is_set():
                return False
            if action is not None:
                self._act(action)
                self._last = self._command = action
        return True

    def _pose(self, state_names: Sequence[str]) -> np.ndarray:
        """[D] where the joints are that are told where to be; NaN for the others."""
        state = dict(zip(state_names, np.atleast_2d(self._seen[-1][STATE])[-1].tolist()))
        assert self.names is not None
        return np.array([state.get(name, np.nan) for name in self.names], np.float32)

    def _limits_of(self, task: Mapping[str, Any]) -> Limits | None:
        assert self.names is not None
        if self._limits_given is None:
            return None
        given = task["limits"] if self._limits_given == "checkpoint" else self._limits_given
        return Limits(self.names, given, self._slack)


def _stacked(seen: Sequence[Mapping[str, Any]], frames: int) -> dict[str, Any]:
    """What a policy that looks at several frames is shown: the oldest first, before an episode its first one again."""
    if frames == 1:
        return dict(seen[-1])
    history = [seen[0]] * (frames - len(seen)) + list(seen)
    stacked = {}
    for key, value in seen[-1].items():
        values = [each[key] for each in history]
        stacked[key] = values if isinstance(value, bytes) else np.stack(values)
    return stacked


class _Asker:
    """Asks the server from a thread of its own, so that the robot's clock does not wait for the network.

    A request whose connection is lost is asked again over a new one, in the same session.
    """

    def __init__(self, address: str, api_key: str | None, timeout: float, tls: ssl.SSLContext | None, session: str):
        self._server, self._session = (address, api_key, timeout, tls), session
        self._changed = threading.Condition()
        self._request = self._answer = self._error = self._metadata = None  # type: Any
        self._ended = False
        self.reconnects = 0
        self._thread = threading.Thread(target=self._run, name="kuavo_client", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def ask(self, request: Mapping[str, Any]) -> None:
        with self._changed:
            self._request, self._answer = dict(request, session=self._session), None
            self._changed.notify_all()

    def metadata(self, stopped: threading.Event) -> Any:
        """What the server says first, as soon as there is one; None once the loop was stopped."""
        return self._wait_for("_metadata", None, stopped)

    def answer(self, deadline: float | None, stopped: threading.Event) -> Any:
        """The answer to the last request; None where it is not there by the deadline (time.monotonic)."""
        answer = self._wait_for("_answer", deadline, stopped)
        self._answer = None
        return answer

    def _wait_for(self, what: str, deadline: float | None, stopped: threading.Event) -> Any:
        with self._changed:
            while getattr(self, what) is None and self._error is None and not (self._ended or stopped.is_set()):
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    return None
                self._changed.wait(LONGEST_WAIT if left is None else min(left, LONGEST_WAIT))
            if self._error is not None:
                raise self._error
            return getattr(self, what)

    def _run(self) -> None:
        pause, lost = FIRST_PAUSE, False
        while not self._ended:
            try:
                server = Server(*self._server)
            except (OSError, WebSocketException, EOFError) as error:
                if _is_refusal(error):
                    return self._fail(ServerError("the server refuses to be connected to: %s" % error))
                time.sleep(pause)
                pause = min(LONGEST_PAUSE, 2 * pause)
                continue
            except ServerError as error:
                return self._fail(error)
            pause = FIRST_PAUSE
            self.reconnects += lost
            self._set("_metadata", server.metadata)
            try:
                self._serve(server, lost=lost)
                return None
            except (OSError, WebSocketException, EOFError):
                lost = True
            except ServerError as error:
                return self._fail(error)
            finally:
                try:
                    server.close()
                except (OSError, WebSocketException, EOFError):
                    pass
        return None

    def _serve(self, server: Server, lost: bool) -> None:
        while True:
            with self._changed:
                while self._request is None and not self._ended:
                    self._changed.wait()
                if self._ended:
                    return
                request = self._request
            try:
                answer = server.ask(request)
            except ServerError:
                if not lost or "reset" in request:
                    raise
                # The server was started anew, or the session timed out: what is left is to begin again.
                forgotten = {key: value for key, value in request.items() if key not in ("executed", "chunk", "delay")}
                answer = server.ask(dict(forgotten, reset=True))
            lost = False
            with self._changed:
                if self._request is request:
                    self._request, self._answer = None, answer
                    self._changed.notify_all()

    def _set(self, what: str, value: object) -> None:
        with self._changed:
            setattr(self, what, value)
            self._changed.notify_all()

    def _fail(self, error: Exception) -> None:
        self._set("_error", error)


def _is_refusal(error: BaseException) -> bool:
    """Whether the server is there and says no, as it does to a wrong key; one that is full is asked again."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status is not None and status != 503


# ------------------------------------------------------------------------------------------------------------ the check


def check(address: str, api_key: str | None = None, looks: int = 20) -> str:
    """What a server serves, and how fast it answers to black pictures and joints at zero; nothing moves.

    Raises:
        OSError, EOFError, ServerError, WebSocketException: there is none, or it refuses.
    """
    server = Server(address, api_key)
    about = server.metadata
    frames = () if about["frames"] == 1 else (about["frames"],)
    name, task = sorted(about["tasks"].items())[0]
    seen = {key: np.zeros((*frames, *size, 3), np.uint8) for key, size in about["cameras"].items()}
    seen[STATE] = np.zeros((*frames, len(task["state_names"])), np.float32)
    took = []
    for look in range(looks):
        begun = time.monotonic()
        answer = server.ask(dict(seen, task=name, executed=about["n_action_steps"] if look else 0))
        took.append(1000 * (time.monotonic() - begun))
    server.close()
    cameras = ["%s %dx%d" % (key, width, height) for key, (height, width) in about["cameras"].items()]
    every = about["n_action_steps"], 1000.0 / about["fps"]
    lines = [
        "policy     " + about["policy"] + (", with a memory" if about["has_memory"] else ""),
        "tasks      " + ", ".join(sorted(about["tasks"])),
        "cameras    " + ", ".join(cameras),
        "hand-over  " + ", ".join(about["handover"]),
        "a chunk    %s of %s; a look every %d steps of %d ms" % (list(answer["actions"].shape), name, *every),
        "answers    p50 %.0f ms, slowest %.0f ms, of %d" % (np.median(took), max(took), looks),
    ]
    return "\n".join(lines)


def main() -> int:
    if len(sys.argv) != 2:
        print("usage: %s ws://SERVER:PORT" % os.path.basename(sys.argv[0]), file=sys.stderr)
        return 2
    try:
        print(check(sys.argv[1], os.environ.get("KUAVO_API_KEY")))
    except (OSError, EOFError, ServerError, WebSocketException) as error:
        print("error: %s: %s" % (sys.argv[1], error), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
