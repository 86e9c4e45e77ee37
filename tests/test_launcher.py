"""`processes=N`: who prints, what the exit status is, and that nobody is left behind."""

import os
import pickle
import signal
import sys
import time
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest

from kuavo_train import launcher
from kuavo_train.errors import ConfigError, RunError
from kuavo_train.launcher import findable, run_together

LONG = 20.0  # s, in which whoever is not ended would end by himself


@pytest.fixture(autouse=True)
def _forks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fork has its imports done, and takes functions of a test."""
    monkeypatch.setattr(launcher, "START", "fork")


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Callable[[], None]]:
    """To be called by each process; in the end none of them must be there any more."""
    folder = tmp_path / "started"
    folder.mkdir()
    yield lambda: (folder / str(os.getpid())).touch()
    assert [path.name for path in folder.iterdir() if is_there(path.name)] == []


def is_there(pid: str) -> bool:
    """And not only as what nobody has asked for the exit status of."""
    stat = Path("/proc") / pid / "stat"
    return stat.is_file() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def rank() -> int:
    return int(os.environ["RANK"])


def test_each_process_is_told_of_the_others_and_only_the_first_prints(
    started: Callable[[], None], capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(launcher, "usable_cpus", lambda: 7)

    def work(word: str) -> int:
        started()
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS")
        os.write(1, " ".join([word, *(os.environ[name] for name in names)]).encode())
        os.write(2, b"seen")
        return 0

    assert run_together(2, work, "hello") == 0
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("hello 0 0 2 2 127.0.0.1 3", "seen")
    assert "WORLD_SIZE" not in os.environ


def test_one_process_is_this_one() -> None:
    here = os.getpid()
    assert run_together(1, lambda: 3 if os.getpid() == here else 4) == 3


def test_another_launcher_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"processes must be 1 in a process that a launcher .* one of 2 .*, got 3"):
        run_together(3, lambda: 0)
    assert run_together(1, lambda: 0) == 0


@pytest.mark.parametrize("send", [os.kill, os.killpg], ids=["to the launcher", "to its group"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], ids=lambda number: number.name)
def test_a_signal_reaches_each_process_once(
    started: Callable[[], None], tmp_path: Path, number: signal.Signals, send: Callable[[int, int], None]
) -> None:
    def work() -> int:
        try:
            started()
            while len(list((tmp_path / "started").iterdir())) < 2:  # the other hears by then as well
                time.sleep(0.01)
            if rank() == 0:
                send(os.getppid(), number)
            time.sleep(LONG)
        finally:
            time.sleep(0.2)  # a second one would come in the midst of this
            (tmp_path / f"unwound{rank()}").touch()
        return 0

    assert launched(work) == 128 + number
    assert {path.name for path in tmp_path.glob("unwound*")} == {"unwound0", "unwound1"}


def launched(work: Callable[[], int]) -> int:
    """The exit status of a launcher in a process, and a group, of its own; negative where a signal has killed it."""
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os._exit(run_together(2, work))
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_the_status_is_0_where_all_came_to_their_end_in_spite_of_a_signal() -> None:
    def work() -> int:
        signal.signal(signal.SIGTERM, lambda *_: None)
        time.sleep(0.5)
        if rank() == 0:
            os.kill(os.getppid(), signal.SIGTERM)
            time.sleep(0.5)
        return 0

    assert run_together(2, work) == 0


class Ends:
    """A process that has failed by the `looks`-th time that somebody looks."""

    sentinel = pid = 0

    def __init__(self, looks: int):
        self.looks = looks

    @property
    def exitcode(self) -> int | None:
        self.looks -= 1
        return None if self.looks > 0 else 3


@pytest.mark.parametrize("looks", range(1, 6))
def test_an_end_is_not_missed_whenever_it_comes(monkeypatch: pytest.MonkeyPatch, looks: int) -> None:
    monkeypatch.setattr(launcher.connection, "wait", lambda *_, **__: None)
    assert launcher._wait([Ends(looks)], []) == 0


@pytest.mark.parametrize("dies", [0, 1])
def test_who_hangs_on_the_dead_is_ended(
    started: Callable[[], None], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture, dies: int
) -> None:
    monkeypatch.setattr(launcher, "SETTLES", 0.2)
    monkeypatch.setattr(launcher, "PATIENCE", 0.2)

    def work() -> int:
        started()
        if rank() == dies:
            os.kill(os.getpid(), signal.SIGKILL)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as in an exchange
        time.sleep(LONG)
        return 0

    began = time.monotonic()
    assert run_together(2, work) == 128 + signal.SIGKILL
    assert time.monotonic() - began < LONG / 2
    assert f"error: process {dies + 1} of 2 was ended by SIGKILL" in capfd.readouterr().err


@pytest.mark.parametrize("fails", [{0}, {1}, {0, 1}], ids=str)
def test_an_error_is_said_once_whoever_has_it(
    started: Callable[[], None], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture, fails: set[int]
) -> None:
    monkeypatch.setattr(launcher, "FIRST_SPEAKS", 0.5)
    monkeypatch.setattr(launcher, "SETTLES", 0.2)
    monkeypatch.setattr(sys, "stderr", os.fdopen(2, "w", buffering=1, closefd=False))  # not what captures it

    def work() -> int:
        started()
        if rank() in fails:
            time.sleep(0.2 * (1 - rank()))
            raise RunError("no room")
        time.sleep(LONG)
        return 0

    assert run_together(2, work) == 1
    assert capfd.readouterr().err.count("error: no room\n") == 1


def test_processes_end_with_their_launcher(started: Callable[[], None], tmp_path: Path) -> None:
    def work() -> int:
        try:
            started()
            while len(list((tmp_path / "started").iterdir())) < 2:
                time.sleep(0.01)
            if rank() == 0:
                os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(LONG)
        finally:
            (tmp_path / f"unwound{rank()}").touch()
        return 0

    assert launched(work) == -signal.SIGKILL
    due = time.monotonic() + LONG / 2
    while len(list(tmp_path.glob("unwound*"))) < 2 and time.monotonic() < due:
        time.sleep(0.05)
    assert len(list(tmp_path.glob("unwound*"))) == 2
    time.sleep(0.5)


def test_the_work_of_the_command_that_runs_is_named_so_that_another_process_finds_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`python -m kuavo_train` runs as `__main__`, which a spawned process does not have."""

    def elsewhere(of: int) -> int:
        return of

    command, running = ModuleType("a_command"), ModuleType("__main__")
    running.__spec__ = ModuleSpec("a_command", None)
    command._work = lambda of: 2 * of  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "a_command", command)
    monkeypatch.setitem(sys.modules, "__main__", running)
    assert findable(elsewhere) is elsewhere
    elsewhere.__module__, elsewhere.__qualname__ = "__main__", "_work"
    assert findable(elsewhere)(21) == 42
    assert pickle.loads(pickle.dumps(findable(elsewhere)))(4) == 8
