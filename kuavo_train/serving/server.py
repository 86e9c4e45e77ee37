"""The server: openpi's wire (websocket, msgpack, numpy arrays), and what it leaves open, sessions and errors.

GET /healthz                  200 OK, without a key
a connection                  a first frame with `metadata`, then a request and its answer in turn
a request                     a binary frame: observation, task or prompt, and what request.py says
an answer                     a binary frame: actions [T, D] in robot units, names, chunk, step, server_timing
an error                      a text frame; the connection and its session live on
"""

import asyncio
import hmac
import http
import logging
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter as clock  # in s
from typing import Any

from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request as HttpRequest
from websockets.http11 import Response
from websockets.protocol import State

from kuavo_train.serving.batching import Batcher
from kuavo_train.serving.metadata import metadata
from kuavo_train.serving.request import RequestError, read_request
from kuavo_train.serving.sessions import Sessions
from kuavo_train.serving.wire import pack
from kuavo_train.wrapper.policy.smolvla import SmolVLAPolicyWrapper

BESIDE_PICTURES = 64 * 1024  # bytes of a request
DROPPED_AT = 4  # times the largest request: a frame that is longer is not read, and ends the connection
LAST_ANSWERS = 30.0  # s that answers under way get when the server stops
SEND_TIMEOUT = 20.0  # s until a robot that does not read its answer is given up

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Serving:
    """How a policy is served.

    Attributes:
        port: 0 takes a free one.
        batch: requests that are answered at once; with 1, a robot's actions are bit for bit those it would get alone.
        robots: connections at a time.
        session_timeout: s that a session with an id waits for its robot to come back.
        api_key: that requests must carry; None for none.
        tls: of the certificate; None serves in the clear.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    batch: int = 16
    robots: int = 32
    session_timeout: float = 60.0
    api_key: str | None = None
    tls: ssl.SSLContext | None = None


class PolicyServer:
    """Serves `policy` until it is stopped: `await server.run()`, and from another task `server.stop()`."""

    def __init__(self, policy: SmolVLAPolicyWrapper, serving: Serving):
        self._policy, self._serving = policy, serving
        sizes = policy.known.camera_sizes
        self._cameras = {
            camera: (max(trained[0], sizes[camera][0]), max(trained[1], sizes[camera][1]))
            for camera, trained in policy.cameras.items()
        }
        pixels = sum(height * width for height, width in self._cameras.values())
        self._largest = BESIDE_PICTURES + 3 * pixels * policy.frames
        self._metadata = pack(metadata(policy, largest_request=self._largest, session_timeout=serving.session_timeout))
        self._sessions = Sessions(timeout=serving.session_timeout, most_kept=serving.robots)
        self._connections: set[ServerConnection] = set()
        self._under_way: set[ServerConnection] = set()
        self._stopping = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._batcher = Batcher(policy, largest=serving.batch)

    async def run(self, ready: Callable[[int], object] = lambda _port: None) -> None:
        """Serve until `stop`. `ready` is called with the port.

        Raises:
            OSError: it cannot listen there.
        """
        worker = asyncio.create_task(self._batcher.work())
        async with serve(
            self._handle,
            self._serving.host,
            self._serving.port,
            ssl=self._serving.tls,
            origins=[None],  # robots send none; a page in a browser does
            compression=None,
            max_size=DROPPED_AT * self._largest,
            max_queue=1,
            process_request=self._before_handshake,
            server_header=None,
            logger=logger,
        ) as server:
            ready(next(iter(server.sockets)).getsockname()[1])
            await self._stopping.wait()
            try:
                await asyncio.wait_for(self._idle.wait(), LAST_ANSWERS)
            except TimeoutError:
                logger.warning("stopped with %d answers under way", len(self._under_way))
            server.close(reason="the server stops")
        worker.cancel()

    def stop(self) -> None:
        """Answers under way are finished; nothing new begins."""
        self._stopping.set()

    @property
    def sessions(self) -> int:
        """How many are held."""
        return len(self._sessions)

    def _before_handshake(self, connection: ServerConnection, request: HttpRequest) -> Response | None:
        if request.path == "/healthz":
            return connection.respond(http.HTTPStatus.OK, "OK\n")
        key = self._serving.api_key
        given = request.headers.get_all("Authorization")
        if key is not None and not (len(given) == 1 and _same(given[0], f"Api-Key {key}")):
            return connection.respond(http.HTTPStatus.UNAUTHORIZED, "Authorization must be: Api-Key and the key\n")
        if self._stopping.is_set():
            return connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, "the server stops\n")
        if len(self._connections) >= self._serving.robots:
            return connection.respond(
                http.HTTPStatus.SERVICE_UNAVAILABLE, f"robots must be at most {self._serving.robots} at a time\n"
            )
        return None

    async def _handle(self, connection: ServerConnection) -> None:
        self._connections.add(connection)
        try:
            await self._send(connection, self._metadata)
            async for message in connection:
                self._under_way.add(connection)
                self._idle.clear()
                try:
                    await self._send(connection, await self._answer(connection, message))
                finally:
                    self._done(connection)
                if self._stopping.is_set():
                    return
        except ConnectionClosed:
            pass
        except TimeoutError:
            logger.info("%s does not read its answers", connection.remote_address)
            connection.transport.abort()
        finally:
            self._connections.discard(connection)
            self._sessions.release(connection)

    def _done(self, connection: ServerConnection) -> None:
        self._under_way.discard(connection)
        if not self._under_way:
            self._idle.set()

    async def _send(self, connection: ServerConnection, message: bytes | str) -> None:
        await asyncio.wait_for(connection.send(message), SEND_TIMEOUT)

    async def _answer(self, connection: ServerConnection, message: bytes | str) -> bytes | str:
        """An answer, or what is wrong."""
        began = clock()
        try:
            if isinstance(message, str):
                raise RequestError("a request must be a binary frame, got text")
            request = await asyncio.to_thread(read_request, message, self._cameras, largest=self._largest)
            session = self._sessions.of(connection, request.session)
            chunk = await self._batcher.ask(request, session, lambda: connection.state is not State.OPEN)
        except ValueError as error:
            return f"error: {error}"
        except Exception as error:
            logger.exception("a request could not be answered")
            return f"error: the policy failed, {type(error).__name__}: {error}"
        answer: dict[str, Any] = {
            "actions": chunk.plan.actions,
            "names": list(chunk.query.look.task.action_names),
            "task": chunk.query.look.task.name,
            "chunk": chunk.kept.number,
            "step": chunk.plan.episode.advanced,
            "server_timing": {
                "queue_ms": 1000 * chunk.queued,
                "model_ms": 1000 * chunk.computed,
                "total_ms": 1000 * (clock() - began),
            },
        }
        return pack(answer)


def _same(given: str, wanted: str) -> bool:
    """In a time that does not tell how much of it is right."""
    return hmac.compare_digest(given.encode(), wanted.encode())
