"""Many robots ask a served policy for a long time, with garbage frames and broken connections in between.

    python -m benchmarks.serving_load checkpoint=<checkpoint>                      # 16 robots, 10 minutes
    python -m benchmarks.serving_load checkpoint=<checkpoint> robots=4 seconds=20

Each robot goes through the same short episode again and again, so that every answer is known from its first time. One
request in ten is garbage, after one in twenty the connection breaks in the midst of an answer. Reported: answers,
wrong ones (there must be none), latency, and how much memory the server's process has taken on since its first minute.
"""

import asyncio
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from kuavo_client import Server, ServerError
from kuavo_train.command_line import errors_in_one_line, option, parse, quieten_libraries
from kuavo_train.errors import require
from kuavo_train.serving.server import PolicyServer, Serving
from kuavo_train.wrapper.policy.smolvla import SmolVLAPolicyWrapper

LOOKS, GARBAGE, BREAKS = 4, 0.1, 0.05
CLOSE = 1e-5  # rad: batches round differently from time to time
MIB = 2**20


@dataclass(frozen=True)
class Options:
    checkpoint: Path = option("a folder")
    robots: int = option("at a time", 16)
    seconds: float = option("that they ask for", 600.0)
    device: str | None = option("cpu, cuda or mps; none: a GPU where there is one", None)

    def __post_init__(self) -> None:
        require(self.robots >= 1, "robots", "be at least 1", self.robots)
        require(self.seconds > 0, "seconds", "be more than 0", self.seconds)


@dataclass
class Counts:
    """Of one robot; latencies in ms."""

    latencies: list[float] = field(default_factory=list)
    wrong: int = 0
    refused: int = 0
    broken: int = 0


def robot(number: int, address: str, until: float, counts: Counts) -> None:
    random = np.random.default_rng(number)
    server = Server(address)
    task = sorted(server.metadata["tasks"])[number % len(server.metadata["tasks"])]
    known: dict[int, np.ndarray] = {}
    look, chunk = 0, 0
    while time.monotonic() < until:
        if random.random() < GARBAGE:
            counts.refused += refused(server, random)
        request: dict[str, Any] = observation(server.metadata, task, 100 * number + look)
        request |= {"session": f"robot {number}", "chunk": chunk}
        request |= {"reset": True, "seed": number} if look == 0 else {"executed": server.metadata["n_action_steps"]}
        if random.random() < BREAKS:
            server._connection.send(b"\x80" + random.bytes(10))
            server._connection.socket.close()
            counts.broken += 1
            server = Server(address)
        began = time.perf_counter()
        answer = server.ask(request)
        counts.latencies.append(1000 * (time.perf_counter() - began))
        expected = known.setdefault(look, answer["actions"])
        counts.wrong += not np.allclose(answer["actions"], expected, atol=CLOSE)
        look, chunk = (look + 1) % LOOKS, answer["chunk"]
    server.close()


def observation(metadata: dict, task: str, number: int) -> dict[str, Any]:
    random = np.random.default_rng(number)
    frames = () if metadata["frames"] == 1 else (metadata["frames"],)
    pictures = {
        camera: random.integers(0, 256, (*frames, *size, 3), dtype=np.uint8)
        for camera, size in metadata["cameras"].items()
    }
    state = random.normal(size=(*frames, len(metadata["tasks"][task]["state_names"]))).astype(np.float32)
    return {**pictures, "observation.state": state, "task": task}


def refused(server: Server, random: np.random.Generator) -> int:
    try:
        server._connection.send(random.bytes(int(random.integers(1, 2000))))
        server._hear()
    except ServerError:
        return 1
    return 0


def main(words: Sequence[str]) -> int:
    return errors_in_one_line(lambda: _run(parse(Options, words, help=__doc__)))


def _run(options: Options) -> int:
    quieten_libraries()
    policy = SmolVLAPolicyWrapper.from_pretrained(options.checkpoint, device=options.device, seed=0)
    server = PolicyServer(policy, Serving(port=0, robots=2 * options.robots))
    listening, port, loops = threading.Event(), list[int](), list[asyncio.AbstractEventLoop]()

    async def serve() -> None:
        loops.append(asyncio.get_running_loop())
        await server.run(ready)

    def ready(chosen: int) -> None:
        port.append(chosen)
        listening.set()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    listening.wait()
    until, counts = time.monotonic() + options.seconds, [Counts() for _ in range(options.robots)]
    robots = [
        threading.Thread(target=robot, args=(number, f"ws://127.0.0.1:{port[0]}", until, counts[number]))
        for number in range(options.robots)
    ]
    for each in robots:
        each.start()
    time.sleep(min(60.0, options.seconds / 4))
    before = psutil.Process().memory_info().rss
    for each in robots:
        each.join()
    after = psutil.Process().memory_info().rss
    loops[0].call_soon_threadsafe(server.stop)
    thread.join()
    latencies = np.concatenate([each.latencies for each in counts])
    p50, p95, p99 = np.percentile(latencies, [50, 95, 99])
    wrong, garbage, broken = (sum(getattr(each, key) for each in counts) for key in ("wrong", "refused", "broken"))
    print(f"{len(latencies)} answers, {wrong} wrong; {garbage} garbage frames, {broken} broken connections")
    print(f"latency p50 {p50:.0f} ms, p95 {p95:.0f} ms, p99 {p99:.0f} ms")
    print(f"memory {(after - before) / MIB:+.1f} MiB since the first minute, {server.sessions} sessions left")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
