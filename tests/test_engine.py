"""The engines of a study: who trains when and on what, and that a cell's end, whatever it is, touches no other."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from io import StringIO
from pathlib import Path

import cluster_work
import pytest
import simulated_slurm
from forked import fork
from submitit.slurm.slurm import SlurmInfoWatcher

from kuavo_train import launcher
from kuavo_train.compose import compose_run
from kuavo_train.config import EngineConfig, RunConfig
from kuavo_train.engine import local, slurm
from kuavo_train.engine.choice import engine_of
from kuavo_train.engine.engine import Ended, Train
from kuavo_train.engine.local import shares_of
from kuavo_train.engine.side_by_side import SideBySide
from kuavo_train.engine.table import Table, place_of
from kuavo_train.errors import ConfigError, RunError
from kuavo_train.runs.run_folder import stage_folder
from kuavo_train.runs.study_file import Cell

LONG = 30.0  # s, in which whoever is not ended would end by himself


@pytest.fixture(autouse=True)
def _forks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fork has its imports done, and takes functions of a test."""
    monkeypatch.setattr(launcher, "START", "fork")
    monkeypatch.setattr(local.Local, "look_s", 0.02)


@pytest.fixture(scope="module")
def composed() -> list[RunConfig]:
    return compose_run(["profile=smoke", "learn=[moving_grasp,weighing]"])


@pytest.fixture
def cells(composed: list[RunConfig], tmp_path: Path) -> list[Cell]:
    """Four of them, which differ by their seeds; nothing of them is trained."""
    configs = [replace(each, outputs=str(tmp_path / "outputs")) for each in composed]
    return [
        Cell("replay", seed, [replace(each, run=f"cell{seed}", seed=seed) for each in configs]) for seed in range(4)
    ]


@dataclass
class Seen:
    """What an engine has said of its cells."""

    said: list[str] = field(default_factory=list)
    ended: dict[str, Ended] = field(default_factory=dict)
    needs: dict[str, str] = field(default_factory=dict)

    def waits(self, cell: Cell, running: Sequence[Cell]) -> bool:
        return self.needs.get(cell.run) in [each.run for each in running]

    def begins(self, cell: Cell) -> str | None:
        self.said.append(f"+{cell.run}")
        return None

    def ends(self, cell: Cell, state: Ended, *, seconds: float) -> None:
        self.said.append(f"-{cell.run}")
        self.ended[cell.run] = state


def side_by_side(work: Train, tmp_path: Path, jobs: int = 2) -> SideBySide:
    engine = engine_of(EngineConfig("local", jobs=jobs), work, tmp_path / "logs")
    assert isinstance(engine, SideBySide)
    return engine


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_so_many_cells_run_at_a_time_in_processes_of_their_own(cells: list[Cell], tmp_path: Path) -> None:
    here = os.getpid()

    def meet(configs: Sequence[RunConfig]) -> int:
        number = configs[0].seed
        (tmp_path / str(number)).touch()
        until((tmp_path / str(number ^ 1)).exists)  # 0 with 1, 2 with 3
        return int(os.getpid() == here)

    seen = Seen()
    assert side_by_side(meet, tmp_path).train(cells, seen) == 0
    assert seen.ended == {cell.run: "finished" for cell in cells}
    under_way = [seen.said[:n].count("+" + c.run) - seen.said[:n].count("-" + c.run) for n in range(9) for c in cells]
    assert max(sum(under_way[place : place + 4]) for place in range(0, len(under_way), 4)) == 2


def test_a_cell_that_needs_what_another_is_about_to_finish_waits_for_it(cells: list[Cell], tmp_path: Path) -> None:
    seen = Seen(needs={"cell1": "cell0"})
    assert side_by_side(lambda configs: 0, tmp_path, jobs=3).train(cells, seen) == 0
    assert seen.said.index("-cell0") < seen.said.index("+cell1")
    assert seen.said[:3] == ["+cell0", "+cell2", "+cell3"]


@pytest.mark.parametrize(
    ("places", "cpus", "gpus"),
    [
        (2, [[0, 1, 2], [3, 4, 5, 6]], [["0"], ["1", "2"]]),
        (3, [[0, 1], [2, 3], [4, 5, 6]], [["0"], ["1"], ["2"]]),
        (4, [[0], [1, 2], [3, 4], [5, 6]], [["0"], ["1"], ["2"], ["0"]]),
    ],
)
def test_cpus_and_gpus_are_divided_among_the_places(places: int, cpus: list, gpus: list) -> None:
    shares = shares_of(places, range(7), ["0", "1", "2"])
    assert [list(share.cpus) for share in shares] == cpus
    assert [list(share.gpus) for share in shares] == gpus
    assert shares_of(2, [5], [])[1] == local.Share((5,), ())  # one CPU for both


def test_a_cell_knows_its_share_before_any_library_is_loaded(
    cells: list[Cell], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "_cpus", lambda: sorted(os.sched_getaffinity(0)) * 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    bound: list[Sequence[int]] = []  # in the cell's own process
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, cpus: bound.append(cpus))

    def look(configs: Sequence[RunConfig]) -> int:
        names = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
        about = [*(os.environ[name] for name in names), *map(len, bound)]
        (tmp_path / f"{configs[0].run}.json").write_text(json.dumps(about))
        until((tmp_path / "cell0.json").exists)
        until((tmp_path / "cell1.json").exists)
        return 0

    batch = replace(cells[1].configs[0].training, batch_size=64)
    two = [
        cells[0],
        replace(cells[1], configs=[replace(each, processes=2, training=batch) for each in cells[1].configs]),
    ]
    assert side_by_side(look, tmp_path).train(two, Seen()) == 0
    mine = len(os.sched_getaffinity(0))
    half, quarter = str(mine * 2), str(mine)
    assert json.loads((tmp_path / "cell0.json").read_text()) == [half, "GPU-a", 2 * mine]
    assert json.loads((tmp_path / "cell1.json").read_text()) == [quarter, "GPU-b", 2 * mine]
    assert os.environ["OMP_NUM_THREADS"] == "7"


def test_a_cell_that_fails_or_is_killed_touches_no_other_and_its_log_says_why(
    cells: list[Cell], tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    def end(configs: Sequence[RunConfig]) -> int:
        os.write(1, f"here is {configs[0].run}\n".encode())
        if configs[0].seed == 0:
            raise RunError("the disk is full")
        if configs[0].seed == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if configs[0].seed == 2:
            sys.exit(128 + signal.SIGTERM)  # somebody has stopped this one
        return 0

    seen = Seen()
    assert side_by_side(end, tmp_path).train(cells, seen) == 0
    assert seen.ended == {"cell0": "failed", "cell1": "failed", "cell2": "interrupted", "cell3": "finished"}
    logs = {path.name: path.read_text() for path in (tmp_path / "logs").iterdir()}
    assert sorted(logs) == [f"cell{seed}.log" for seed in range(4)]
    assert all(f"here is {name.removesuffix('.log')}" in text for name, text in logs.items())
    out = capfd.readouterr().out
    assert "replay, seed 0 is failed (status 1): the disk is full; its log is" in out
    assert "replay, seed 1 is failed (status 137); its log is" in out
    assert "here is" not in out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], ids=lambda number: number.name)
def test_a_signal_stops_every_cell_once_and_no_other_begins(
    cells: list[Cell], tmp_path: Path, number: signal.Signals
) -> None:
    def train(configs: Sequence[RunConfig]) -> int:
        heard: list[int] = []
        for each in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(each, lambda number, _: heard.append(number))
        (tmp_path / f"began{configs[0].seed}").touch()
        until(lambda: bool(heard))
        time.sleep(0.3)  # a second one would come in the midst of this
        (tmp_path / f"heard{configs[0].seed}").write_text(json.dumps(heard))
        return 128 + heard[0]

    def study() -> int:
        seen = Seen()
        status = side_by_side(train, tmp_path).train(cells, seen)
        (tmp_path / "ended").write_text(json.dumps(seen.ended))
        return status

    running = fork(study, tmp_path / "printed")
    until(lambda: len(list(tmp_path.glob("began?"))) == 2)
    running.send(number)  # to the whole group, as a terminal does
    assert running.wait().returncode == 128 + number
    assert json.loads((tmp_path / "ended").read_text()) == {"cell0": "interrupted", "cell1": "interrupted"}
    assert [json.loads(path.read_text()) for path in sorted(tmp_path.glob("heard?"))] == [[number], [number]]
    assert running.survivors() == []


def test_cells_end_when_their_study_is_killed(cells: list[Cell], tmp_path: Path) -> None:
    def train(configs: Sequence[RunConfig]) -> int:
        (tmp_path / f"pid{os.getpid()}").touch()
        time.sleep(LONG)
        return 0

    running = fork(lambda: side_by_side(train, tmp_path).train(cells[:2], Seen()), tmp_path / "printed")
    until(lambda: len(list(tmp_path.glob("pid*"))) == 2)
    os.kill(running.process.pid or 0, signal.SIGKILL)
    running.process.join()
    pids = [path.name.removeprefix("pid") for path in tmp_path.glob("pid*")]
    until(lambda: not any(is_there(pid) for pid in pids))


def is_there(pid: str) -> bool:
    """And not only as what nobody has asked for the exit status of."""
    stat = Path("/proc") / pid / "stat"
    return stat.is_file() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def begun(cell: Cell, place: int, **about: object) -> Path:
    folder = stage_folder(cell.stages[place]).path
    folder.mkdir(parents=True)
    (folder / "stage.json").write_text(json.dumps({"status": "running", "total_steps": 100, **about}))
    return folder


def test_the_table_is_read_from_the_cells_own_files(cells: list[Cell]) -> None:
    cells = [replace(cell, configs=[long(each, place) for place, each in enumerate(cell.configs)]) for cell in cells]
    begun(cells[1], 0, status="finished")
    first = begun(cells[0], 0)
    lines = [{"step": 20, "samples_per_s": 31.25, "seconds": 30}, {"step": 40, "samples_per_s": 32.5, "seconds": 60.0}]
    (first / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 6')
    place = place_of(cells[0])
    assert (place.stage, place.step, place.steps, place.samples_per_s) == ("1 of 2", 40, 100, 32.5)
    assert place.seconds_left == (60 + 300) * 1.5  # the other stage has three times as many epochs
    assert place_of(cells[1]).stage == "2 of 2"
    stream = StringIO()
    table = Table(cells, stream)
    table.show(["cell0", "cell2"])
    shown = [re.split(r"  +", line) for line in stream.getvalue().splitlines()]
    assert shown[0] == ["cell", "state", "stage", "step", "samples/s", "ends about"]
    assert shown[1][:5] == ["cell0", "running", "1 of 2", "40/100", "32.5"]
    assert re.fullmatch(r"(\d\d \w+ )?\d\d:\d\d", shown[1][5])
    assert shown[2:] == [["cell2", "starting"], ["cell1", "waiting", "2 of 2"], ["cell3", "waiting"]]
    assert table.lines(datetime(2026, 1, 1, 12, 0))[1].endswith("12:09")


def long(config: RunConfig, place: int) -> RunConfig:
    return replace(config, training=replace(config.training, epochs=[2, 6][place], max_steps=None))


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


def test_the_table_is_drawn_anew_on_a_terminal_and_printed_seldom_elsewhere(
    cells: list[Cell], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    shown = {}
    for stream in (Terminal(), StringIO()):
        table = Table(cells, stream)
        for now[0] in (0.0, 0.5, 1.5, 601.0):
            table.show([])
        shown[type(stream)] = stream.getvalue()
        table.say("a word")
    assert shown[Terminal].count("samples/s") == 3
    assert shown[Terminal].count("\x1b[5F\x1b[J") == 2
    assert shown[StringIO].count("samples/s") == 2
    assert "\x1b" not in shown[StringIO]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["engine=remote"], "engine must be one of inline, local, slurm"),
        (["engine.jobs=2"], r"engine.jobs must be left out with engine=inline, which has no such setting, got 2"),
        (["engine=local", "++engine.partition=gpu"], r"engine.partition must be left out with engine=local"),
        (["engine=slurm", "engine.minutes=0"], r"engine.minutes must be at least 1, got 0"),
        (["engine=slurm", "engine.gpus=-1"], r"engine.gpus must not be negative, got -1"),
    ],
)
def test_an_engine_that_cannot_be_is_refused_by_key_and_rule(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose_run(["profile=smoke", "learn=[moving_grasp]", *words])


@pytest.mark.parametrize("module", ["kuavo_train", "kuavo_train.curriculum", "kuavo_train.base"])
def test_a_single_run_has_no_engine(here: Callable, module: str) -> None:
    done = here(module, "profile=smoke", "engine=local", "learn=[nothing]")  # refused next
    assert done.returncode == 2
    assert "engine chooses what trains the cells of a study" in done.stderr


def test_no_cluster_is_an_error_with_what_to_do_before_anything_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # this machine may be of a cluster
    with pytest.raises(ConfigError, match="engine=slurm must be used where SLURM's commands are"):
        engine_of(EngineConfig("slurm"), lambda configs: 0, tmp_path / "logs")


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of SLURM's commands on the PATH, which run jobs on this machine; what they know of the jobs."""
    monkeypatch.setattr(slurm.Slurm, "look_s", 0.05)
    monkeypatch.setenv("PATH", str(simulated_slurm.install(tmp_path / "slurm")), prepend=os.pathsep)
    monkeypatch.setenv("PYTHONPATH", str(Path(simulated_slurm.__file__).parent))
    monkeypatch.setattr(slurm.submitit.SlurmJob, "watcher", SlurmInfoWatcher(delay_s=1))
    return tmp_path / "slurm" / "state"


def test_jobs_of_a_cluster_are_an_array_and_a_preempted_one_is_queued_again(
    cells: list[Cell], tmp_path: Path, cluster: Path, capfd: pytest.CaptureFixture
) -> None:
    outputs = tmp_path / "outputs"

    def warn() -> None:
        for cell in (0, 1):
            until((outputs / f"cell{cell}" / "turn0").exists)
            subprocess.run(["scancel", f"1001_{cell}", "--signal", "USR1"], check=True)

    threading.Thread(target=warn).start()
    options = EngineConfig("slurm", jobs=5, partition="gpu", gpus=2, memory_gb=16, minutes=90, warning_seconds=77,
                           setup=["module load cuda"], more={"account": "robots"})  # fmt: skip
    seen = Seen()
    assert engine_of(options, cluster_work.train_until_warned, tmp_path / "logs").train(cells[:3], seen) == 0
    log = (tmp_path / "logs" / "cell0.log").read_text()
    assert seen.ended == {"cell0": "finished", "cell1": "finished", "cell2": "failed"}, log
    assert [len(list((outputs / f"cell{cell}").iterdir())) for cell in (0, 1)] == [2, 2]
    script = (cluster / "script.sh").read_text()
    for line in ("--partition=gpu", "--gpus-per-node=2", "--cpus-per-task=8", "--mem=16GB", "--time=90", "--requeue",
                 "--signal=USR1@77", "--array=0-2%3", "--account=robots"):  # fmt: skip
        assert f"#SBATCH {line}\n" in script
    assert "\nmodule load cuda\n" in script
    assert "replay, seed 2 is failed (status 1): ValueError: the third one fails; its log is" in capfd.readouterr().out


def test_stopping_a_study_cancels_its_jobs_and_none_is_queued_again(
    cells: list[Cell], tmp_path: Path, cluster: Path
) -> None:
    def study() -> int:
        engine = engine_of(EngineConfig("slurm"), cluster_work.train_until_warned, tmp_path / "logs")
        return engine.train(cells[:2], Seen())

    running = fork(study, tmp_path / "printed")
    for cell in (0, 1):
        until((tmp_path / "outputs" / f"cell{cell}" / "turn0").exists)
    running.send(signal.SIGTERM)
    assert running.wait().returncode == 128 + signal.SIGTERM
    for cell in (0, 1):
        pid = (cluster / f"1001_{cell}.pid").read_text()
        until(lambda pid=pid: not is_there(pid))
        assert (cluster / f"1001_{cell}.State").read_text() == "CANCELLED"
        assert not (cluster / f"1001_{cell}.queued").exists()
        assert not (tmp_path / "outputs" / f"cell{cell}" / "turn1").exists()
