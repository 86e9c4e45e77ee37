"""One process owns a folder; the others are told who, and a dead one's place is taken by one alone."""

import json
import multiprocessing
import os
import shutil
import signal
import threading
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from kuavo_train.errors import ConfigError, RunError
from kuavo_train.runs import lease
from kuavo_train.runs.lease import Holder, held, living_holder

FORK = multiprocessing.get_context("fork")


def left_behind(folder: Path, *, age: float = 0.0, **changes: Any) -> Path:
    """A lease as another process left it."""
    folder.mkdir(exist_ok=True)
    path = folder / ".lease-000007"
    path.write_text(json.dumps(asdict(replace(Holder.this_process(folder), **changes))))
    there = path.stat().st_mtime
    os.utime(path, (there - age, there - age))
    return path


def taken(folder: Path) -> bool:
    try:
        with held(folder, "it"):
            return True
    except ConfigError:
        return False


def test_the_second_is_told_who_has_it_and_the_folder_is_free_after_any_end(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "stage"
    for end in (None, KeyboardInterrupt):
        with ExitStack() as ends:
            if end:
                ends.enter_context(pytest.raises(end))
            with held(folder, "stage 1"):
                message = (
                    rf"stage 1 must .* one process .*: process {os.getpid()} on \S+ has had .*stage since \d{{4}}-"
                )
                with pytest.raises(ConfigError, match=message), held(folder, "stage 1"):
                    pass
                if end:
                    raise end
        assert living_holder(folder) is None
        assert list(tmp_path.iterdir()) == []  # it made nothing but an empty folder
    (folder / "files").mkdir(parents=True)
    assert taken(folder)
    assert [path.name for path in folder.iterdir()] == ["files"]


def test_a_dead_holder_of_this_machine_is_known_by_its_number_and_when_it_began(tmp_path: Path) -> None:
    def take_and_die() -> None:
        with held(tmp_path / "a", "it"):
            os.kill(os.getpid(), signal.SIGKILL)

    child = FORK.Process(target=take_and_die)
    child.start()
    child.join(timeout=60)
    assert list((tmp_path / "a").glob(".lease-*"))
    assert taken(tmp_path / "a")
    left_behind(tmp_path / "b")  # as if alive: the number is that of this process
    assert not taken(tmp_path / "b")
    left_behind(tmp_path / "b", began=1.0)  # and now another process has that number
    assert taken(tmp_path / "b")


def test_a_holder_elsewhere_is_dead_when_it_was_not_heard_of_for_long(tmp_path: Path) -> None:
    about = {"host": "far", "machine": "another boot", "pid": 1}
    left_behind(tmp_path / "fresh", age=5, **about)
    with pytest.raises(ConfigError, match=r"on far .* last heard of \d+ s ago; .* takes over in \d+ s"):
        held(tmp_path / "fresh", "it").__enter__()
    left_behind(tmp_path / "old", age=lease.STALE_S + 1, **about)
    assert taken(tmp_path / "old")
    (tmp_path / "old" / ".lease-000009").touch()  # a process that is about to write its name
    assert not taken(tmp_path / "old")


def test_a_copy_of_a_folder_that_is_held_is_nobodys(tmp_path: Path) -> None:
    with held(tmp_path / "one", "it"):
        shutil.copytree(tmp_path / "one", tmp_path / "copy")
        assert taken(tmp_path / "copy")
        (tmp_path / "one").rename(tmp_path / "moved")
        assert not taken(tmp_path / "moved")
        (tmp_path / "moved").rename(tmp_path / "one")


@pytest.mark.parametrize("number", range(20))
def test_of_many_that_take_over_at_once_one_wins(tmp_path: Path, number: int) -> None:
    left_behind(tmp_path, began=1.0)
    together, over = threading.Barrier(8), threading.Barrier(8)
    won: list[int] = []

    def work(rank: int) -> None:
        together.wait()
        try:
            with held(tmp_path, "it"):
                won.append(rank)
                over.wait()
        except ConfigError:
            over.wait()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1


def test_a_late_one_that_judged_a_lease_which_is_gone_does_not_take_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left_behind(tmp_path, began=1.0)
    runs, others = Holder.runs, ExitStack()

    def slowly(dead: Holder) -> bool:
        monkeypatch.setattr(Holder, "runs", runs)
        assert not dead.runs
        with held(tmp_path, "another's"):  # in the meantime another has taken over and let go,
            pass
        others.enter_context(held(tmp_path, "a third's"))  # and a third has it now
        return False

    monkeypatch.setattr(Holder, "runs", property(slowly))
    assert not taken(tmp_path)
    assert len(list(tmp_path.glob(".lease-*"))) == 1
    others.close()
    assert taken(tmp_path)


def test_one_that_was_taken_for_dead_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with held(tmp_path, "it") as mine:
        mine.confirm()
        monkeypatch.setattr(Holder, "runs", property(lambda self: False))
        with held(tmp_path, "it"), pytest.raises(RunError, match="was taken over by another process"):
            mine.confirm()


def test_a_lease_is_refreshed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "REFRESH_S", 0.001)
    touched = threading.Event()
    monkeypatch.setattr(os, "utime", lambda path: touched.set())
    with held(tmp_path, "it"):
        assert touched.wait(30)
