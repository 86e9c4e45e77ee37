"""A policy served from a thread of this process, and a robot that speaks the wire itself."""

import asyncio
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any, Self

from websockets.sync.client import ClientConnection, connect

from kuavo_train.serving.server import PolicyServer, Serving
from kuavo_train.serving.wire import pack, unpack
from kuavo_train.wrapper.policy.smolvla import SmolVLAPolicyWrapper

PATIENCE = 30.0  # seconds until what does not come has failed its test


class Served:
    """Serves for as long as the block lasts, on a free port of this machine."""

    def __init__(self, policy: SmolVLAPolicyWrapper, **serving: Any):
        self.server = PolicyServer(policy, Serving(port=0, **serving))
        self._listening = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        await self.server.run(self._ready)

    def _ready(self, port: int) -> None:
        self.port = port
        self._listening.set()

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._listening.wait(PATIENCE)
        return self

    def stop(self) -> None:
        with suppress(RuntimeError):  # its loop is closed: it has ended already
            self._loop.call_soon_threadsafe(self.server.stop)

    def ends(self) -> bool:
        self._thread.join(PATIENCE)
        return not self._thread.is_alive()

    def __exit__(self, *_: object) -> None:
        self.stop()
        assert self.ends(), "the server does not end"

    def robot(self, **headers: str) -> "Robot":
        return Robot(self.port, **headers)


class Robot:
    """A connection. `metadata` is what the server said first."""

    def __init__(self, port: int, **headers: str):
        address = f"ws://127.0.0.1:{port}"
        opening = connect(address, compression=None, max_size=None, additional_headers=headers, open_timeout=PATIENCE)
        self._open = ExitStack()
        self.connection: ClientConnection = self._open.enter_context(opening)
        self.metadata = self.hear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def hear(self) -> Any:
        """The next frame: text as it is, else what it holds."""
        message = self.connection.recv(PATIENCE)
        return message if isinstance(message, str) else unpack(message)

    def ask(self, observation: dict[str, Any], **more: Any) -> Any:
        self.connection.send(pack({**observation, **more}))
        return self.hear()

    def vanish(self) -> None:
        """As where a cable is pulled or a process killed: no goodbye."""
        self.connection.socket.close()


def eventually(happens: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + PATIENCE
    while not happens():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True
