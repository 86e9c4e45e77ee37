"""Serve a policy to robots over the network, each with an episode and a memory of its own.

    python -m kuavo_train.serve checkpoint=outputs/<run>                      # the best of its last stage
    python -m kuavo_train.serve checkpoint=<checkpoint> port=0                       # a free port, which is printed
    KUAVO_API_KEY=… python -m kuavo_train.serve checkpoint=<checkpoint> host=0.0.0.0 tls_cert=… tls_key=…

Robots connect with kuavo_client, which runs in the Python 3.8 that they have, or with openpi-client. The wire is
openpi's: a websocket, msgpack with numpy arrays. GET /healthz says that it serves.

Beyond this machine it serves only with a key, KUAVO_API_KEY in its environment. SIGTERM and Ctrl-C end it once the
answers under way are given.
"""

import asyncio
import ipaddress
import logging
import os
import signal
import ssl
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

from kuavo_train.command_line import errors_in_one_line, option, parse, quieten_libraries
from kuavo_train.errors import ConfigError, RunError, require
from kuavo_train.interruption import main_ends_on_signals

KEY_VARIABLE = "KUAVO_API_KEY"


@dataclass(frozen=True)
class Options:
    checkpoint: str = option("a run, for the best of its last stage; a checkpoint; or a hub id")
    host: str = option("where to listen", "127.0.0.1")
    port: int = option("where to listen; 0 takes a free one", 8000)
    device: str | None = option("cpu, cuda or mps; none: a GPU where there is one", None)
    dtype: Literal["float32", "bfloat16"] | None = option("of the model's weights; none: as they are stored", None)
    cuda_graphs: bool = option("each query of SmolVLA as one CUDA graph; then no rtc", False)
    seed: int = option("of the policy's noise", 0)
    n_action_steps: int | None = option("steps between two looks; none: as in training", None)
    batch: int = option("requests answered at once; 1: bit for bit as if each robot were alone", 16)
    robots: int = option("connections at a time", 32)
    session_timeout: float = option("seconds that a session with an id waits for its robot to come back", 60.0)
    tls_cert: Path | None = option("certificate chain, PEM", None)
    tls_key: Path | None = option("its private key, PEM", None)

    def __post_init__(self) -> None:
        require(0 <= self.port < 65536, "port", "be in [0, 65535]", self.port)
        require(self.seed >= 0, "seed", "not be negative", self.seed)
        for key in ("batch", "robots"):
            require(getattr(self, key) >= 1, key, "be at least 1", getattr(self, key))
        require(self.session_timeout >= 0, "session_timeout", "not be negative", self.session_timeout)
        both = (self.tls_cert is None) == (self.tls_key is None)
        require(both, "tls_cert and tls_key", "be given together", (str(self.tls_cert), str(self.tls_key)))
        for key in ("tls_cert", "tls_key"):
            path = getattr(self, key)
            require(path is None or path.is_file(), key, "be a file", str(path))

    @property
    def stays_here(self) -> bool:
        """Whether only this machine can connect."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def main(words: Sequence[str]) -> int:
    """Command line: key=value arguments; the exit status."""
    return errors_in_one_line(lambda: _serve(parse(Options, words, help=__doc__)))


def _serve(options: Options) -> int:
    key = os.environ.get(KEY_VARIABLE) or None
    if key is None and not options.stays_here:
        raise ConfigError(f"{KEY_VARIABLE} must be set to listen on {options.host}, got none")
    tls = server_context(options)
    quieten_libraries()
    from kuavo_train.serving.server import PolicyServer, Serving
    from kuavo_train.wrapper.policy.smolvla import SmolVLAPolicyWrapper

    try:
        policy = SmolVLAPolicyWrapper.from_pretrained(
            options.checkpoint,
            device=options.device,
            dtype=options.dtype,
            cuda_graphs=options.cuda_graphs,
            seed=options.seed,
        )
        if options.n_action_steps is not None:
            policy.n_action_steps = options.n_action_steps
    except (OSError, ValueError) as error:
        raise ConfigError(f"checkpoint: {error}") from error
    serving = Serving(options.host, options.port, options.batch, options.robots, options.session_timeout, key, tls)
    logging.getLogger("kuavo_train.serving").setLevel(logging.WARNING)

    async def until_told() -> None:
        server = PolicyServer(policy, serving)
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, server.stop)
        await server.run(lambda port: _say_ready(options, port, encrypted=tls is not None))

    try:
        asyncio.run(until_told())
    except OSError as error:
        raise RunError(f"cannot listen on {options.host}:{options.port}: {error.strerror or error}") from error
    print("stopped", file=sys.stderr)
    return 0


def server_context(options: Options) -> ssl.SSLContext | None:
    """None without a certificate. Raises `ConfigError` for files that hold none."""
    if options.tls_cert is None or options.tls_key is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(options.tls_cert, options.tls_key)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"tls_cert and tls_key must be a certificate and its key, PEM, got {error}") from error
    return context


def _say_ready(options: Options, port: int, *, encrypted: bool) -> None:
    host = f"[{options.host}]" if ":" in options.host else options.host
    print(f"serving {options.checkpoint} on {'wss' if encrypted else 'ws'}://{host}:{port}", flush=True)


def command() -> NoReturn:
    main_ends_on_signals(main)


if __name__ == "__main__":
    command()
