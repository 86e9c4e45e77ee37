"""Many robots ask a served policy for a long time, with garbage frames and broken connections in between.

    python -m benchmarks.serving_load checkpoint=<checkpoint>                      # 16 robots, 10 minutes
    python -m benchmarks.serving_load checkpoint=<checkpoint> robots=4 seconds=20

The server is `python -m kuavo_train.serve` in a process of its own; the robots are threads of this one. Each goes
through the same short episode again and again, so that every answer is known from its first time. One request in ten
is garbage, after one in twenty the connection breaks in the midst of an answer. Reported: answers, wrong ones (there
must be none), latency, and how much memory the server's process holds at the beginning, after a minute and at the end.
"""

import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from tqdm import tqdm

from benchmarks.server_process import served
from kuavo_client import Server, ServerError
from kuavo_train.command_line import errors_in_one_line, option, parse, quieten_libraries
from kuavo_train.errors import require

LOOKS, GARBAGE, BREAKS = 4, 0.1, 0.05
CLOSE = 1e-5  # rad: batches round differently from time to time
MIB, MINUTE = 2**20, 60.0


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
    error: str = ""  # that ended it before its time


def robot(number: int, address: str, until: float, counts: Counts) -> None:
    """Until `until`, by time.monotonic."""
    try:
        _ask_again_and_again(number, address, until, counts)
    except Exception as error:
        counts.error = f"{type(error).__name__}: {error}"


def _ask_again_and_again(number: int, address: str, until: float, counts: Counts) -> None:
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
    words = [f"checkpoint={options.checkpoint}", f"robots={2 * options.robots}"]
    words += [] if options.device is None else [f"device={options.device}"]
    counts = [Counts() for _ in range(options.robots)]
    with served(*words) as server:
        memory = [_memory(server.pid)]
        until = time.monotonic() + options.seconds
        robots = [
            threading.Thread(target=robot, args=(number, server.address, until, counts[number]))
            for number in range(options.robots)
        ]
        for each in robots:
            each.start()
        warm = time.monotonic() + min(MINUTE, options.seconds / 4)
        with tqdm(total=round(options.seconds), unit="s") as bar:
            while time.monotonic() < until:
                time.sleep(min(1.0, max(0.0, until - time.monotonic())))
                bar.update(round(options.seconds - max(0.0, until - time.monotonic())) - bar.n)
                bar.set_postfix_str(f"{sum(len(each.latencies) for each in counts)} answers", refresh=False)
                if len(memory) == 1 and time.monotonic() >= warm:
                    memory.append(_memory(server.pid))
        for each in robots:
            each.join()
        memory.append(_memory(server.pid))
    _print(counts, memory)
    return int(any(each.wrong or each.error for each in counts))


def _memory(pid: int) -> float:
    """MiB in main memory."""
    return psutil.Process(pid).memory_info().rss / MIB


def _print(counts: Sequence[Counts], memory: Sequence[float]) -> None:
    for number, each in enumerate(counts):
        if each.error:
            print(f"robot {number} gave up: {each.error}")
    latencies = np.concatenate([each.latencies for each in counts])
    wrong, garbage, broken = (sum(getattr(each, key) for each in counts) for key in ("wrong", "refused", "broken"))
    print(f"{len(latencies)} answers, {wrong} wrong; {garbage} garbage frames, {broken} broken connections")
    if len(latencies):
        p50, p95, p99 = np.percentile(latencies, [50, 95, 99])
        print(f"latency p50 {p50:.0f} ms, p95 {p95:.0f} ms, p99 {p99:.0f} ms")
    begin, *later, end = memory
    warm = later[0] if later else begin
    print(f"server's memory {begin:.1f} MiB at the beginning, {warm:.1f} after a minute, {end:.1f} at the end")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
