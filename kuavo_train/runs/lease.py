"""One process owns a folder at a time: a file in it says which, and is touched as long as that process lives.

    with held(folder, "stage 2 (weighing) of run embedded"):
        ...

Who comes second is refused; the error names who is there. The file of a process that died is taken over: on this
machine the process is looked for, and elsewhere, on a shared file system, the file is old by that file system's own
clock. Files are numbered, and the last one counts, so that of several that take over at once one wins: only one can
create the next number, and only as long as the file it judged is still there.
"""

import contextlib
import json
import os
import random
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import psutil

from kuavo_train.errors import ConfigError, RunError

REFRESH_S = 10.0
STALE_S = 90.0  # after so long without a touch, the process on another machine is dead
FILES = ".lease-*"
SAME_PROCESS_S = 5.0  # by which the time a process began may seem to differ, where the clock was set


@dataclass(frozen=True)
class Holder:
    """The process that owns a folder.

    Attributes:
        machine: that its number means something on.
        began: when it was started, seconds since the epoch.
        since: when it took the folder.
        folder: inode, so that a copy of the folder is nobody's.
    """

    host: str
    pid: int
    machine: str
    began: float
    since: str
    folder: int
    token: str = field(default_factory=lambda: uuid.uuid4().hex)

    @classmethod
    def this_process(cls, folder: Path) -> "Holder":
        pid, since = os.getpid(), datetime.now(UTC).isoformat(timespec="seconds")
        began = psutil.Process(pid).create_time()
        return cls(socket.gethostname(), pid, _machine(), began, since, folder.stat().st_ino)

    @property
    def is_here(self) -> bool:
        return self.machine == _machine()

    @property
    def runs(self) -> bool:
        """Whether the process, of this machine, is there."""
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.began) < SAME_PROCESS_S
            return same and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False


def _machine() -> str:
    """Where numbers of processes are those we see: a boot of a machine, a container in it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


@dataclass(frozen=True)
class Lease:
    """The file by which this process owns a folder."""

    path: Path
    text: str

    def confirm(self) -> None:
        """Raises RunError when another process took the folder over, as if this one were dead."""
        if _read(self.path) != self.text:
            raise RunError(
                f"{self.path.parent} was taken over by another process: this one had not been heard of for {STALE_S:g} "
                "s (was it suspended?); it stops here, and the other goes on"
            )

    def refresh_until(self, released: threading.Event) -> None:
        while not released.wait(REFRESH_S):
            with contextlib.suppress(OSError):  # lost, which `confirm` reports, or out of reach for a while
                os.utime(self.path)


class NoLease:
    """Of a process whose run's first process holds the folder."""

    def confirm(self) -> None:
        pass


@contextlib.contextmanager
def held(folder: Path, what: str) -> Iterator[Lease]:
    """Own `folder`, which is made if need be, and removed if it is still empty in the end.

    Raises:
        ConfigError: another process has it; `what` is its name in the message.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    lease, released = _take(folder, what), threading.Event()
    thread = threading.Thread(target=lease.refresh_until, args=(released,), daemon=True)
    thread.start()
    try:
        yield lease
    finally:
        released.set()
        thread.join()
        if _read(lease.path) == lease.text:
            lease.path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # no longer empty
            for path in made:
                path.rmdir()


def living_holder(folder: Path) -> Holder | None:
    """The process that owns `folder` now."""
    path = _last(folder)
    return None if path is None else _judge(path, _read(path))


def _take(folder: Path, what: str) -> Lease:
    for _ in range(50):
        folder.mkdir(parents=True, exist_ok=True)
        last = _last(folder)
        text = None if last is None else _read(last)
        if last is not None and (holder := _judge(last, text)) is not None:
            raise ConfigError(
                f"{what} must be trained by one process at a time, got a second one: {_described(holder, last)}"
            )
        number = 1 if last is None else 1 + int(last.name.rpartition("-")[2])
        with contextlib.suppress(FileExistsError, FileNotFoundError):  # another was quicker, or removed the folder
            mine = Lease(folder / f".lease-{number:06d}", json.dumps(asdict(Holder.this_process(folder))))
            with mine.path.open("x") as file:
                file.write(mine.text)
            others = [path for path in folder.glob(FILES) if path != mine.path]
            if (last is None and not others) or (last is not None and _read(last) == text):
                for path in others:
                    path.unlink(missing_ok=True)
                return mine
            mine.path.unlink()  # what was judged is gone: somebody else has been here
        time.sleep(random.uniform(0.001, 0.02))
    raise ConfigError(f"{what} must be trained by one process at a time, got several that begin at once; try again")


def _judge(path: Path, text: str | None) -> Holder | None:
    """Who holds a lease of that text, if alive."""
    try:
        holder = Holder(**json.loads(text or ""))
    except (ValueError, TypeError):  # not written to its end: by a process that is about to, or that died of it
        holder = Holder("an unknown host", 0, "", 0.0, "just now", path.parent.stat().st_ino)
    if holder.folder != path.parent.stat().st_ino:
        return None
    alive = holder.runs if holder.is_here else _age(path) < STALE_S
    return holder if alive else None


def _age(path: Path) -> float:
    """Seconds since the last touch, by the clock of its file system."""
    probe = path.with_name(f".clock-{uuid.uuid4().hex}")
    try:
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink()
    except OSError:  # not ours to write in
        now = time.time()
    try:
        return now - path.stat().st_mtime
    except FileNotFoundError:
        return float("inf")


def _described(holder: Holder, path: Path) -> str:
    who = f"process {holder.pid} on {holder.host} has had {path.parent} since {holder.since}"
    if holder.is_here:
        return f"{who}; wait for it, or stop it"
    age = max(0.0, _age(path))
    return (
        f"{who} and was last heard of {age:.0f} s ago; wait for it, or stop it; if it is dead, the same command takes "
        f"over in {STALE_S - age:.0f} s"
    )


def _last(folder: Path) -> Path | None:
    return max(folder.glob(FILES), default=None)


def _read(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return None
