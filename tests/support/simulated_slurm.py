"""SLURM's commands, as far as submitit uses them: jobs are processes of this machine.

`install(folder)` makes sbatch, srun, sacct, scancel and scontrol in folder/bin. A job's script is run by a process of
its own, as often as it is queued; folder/state holds a file for all that is known of a job.
"""

import contextlib
import os
import re
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

COMMANDS = ("sbatch", "srun", "sacct", "scancel", "scontrol")


def install(folder: Path) -> Path:
    """The folder to be put on the PATH."""
    programs = folder / "bin"
    programs.mkdir(parents=True)
    (folder / "state").mkdir()
    for name in COMMANDS:
        program = programs / name
        program.write_text(f'#!/bin/sh\nexec {sys.executable} {__file__} {folder / "state"} {name} "$@"\n')
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return programs


def sbatch(state: Path, script: str) -> None:
    kept = state / "script.sh"
    kept.write_text(Path(script).read_text())
    first = 1001 + len(list(state.glob("*.State")))
    found = re.search(r"--array=0-(\d+)", kept.read_text())
    for task in range(int(found[1]) + 1) if found else [None]:
        job = f"{first}" if task is None else f"{first}_{task}"
        (state / f"{job}.State").write_text("RUNNING")
        runner = [sys.executable, __file__, str(state), "run", job]
        subprocess.Popen(runner, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    print(f"Submitted batch job {first}")


def run(state: Path, job: str) -> None:
    """What a node does."""
    first, _, task = job.partition("_")
    names = {"SLURM_JOB_ID": first, "SLURM_NTASKS": 1, "SLURM_JOB_NUM_NODES": 1, "SLURM_NODEID": 0, "SLURM_PROCID": 0}
    names |= {"SLURM_LOCALID": 0, "SIMULATED_JOB": job}
    if task:
        names |= {"SLURM_ARRAY_JOB_ID": first, "SLURM_ARRAY_TASK_ID": task}
    queued = state / f"{job}.queued"
    queued.touch()
    status = 0
    while queued.exists():
        queued.unlink()
        environment = {**os.environ, **{name: str(value) for name, value in names.items()}}
        status = subprocess.run(["bash", str(state / "script.sh")], env=environment, check=False).returncode
    if not (state / f"{job}.cancelled").exists():
        (state / f"{job}.State").write_text("FAILED" if status else "COMPLETED")


def srun(state: Path, *words: str) -> None:
    command, paths = list(words), {}
    while command[0].startswith("--"):
        option = command.pop(0)
        if option in ("--output", "--error"):
            paths[option] = command.pop(0)
    (state / f"{os.environ['SIMULATED_JOB']}.pid").write_text(str(os.getpid()))
    for option, descriptor in (("--output", 1), ("--error", 2)):
        path = paths[option].replace("%t", "0").replace("%j", os.environ["SIMULATED_JOB"]).replace("%A_%a", "array")
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.execvp(command[0], command)


def sacct(state: Path, *_: str) -> None:
    print("JobID|State|NodeList")
    for path in sorted(state.glob("*.State")):
        print(f"{path.stem}|{path.read_text()}|here")


def scancel(state: Path, *words: str) -> None:
    job = next(word for word in words if word[0].isdigit())
    number = signal.SIGTERM
    if "--signal" in words:
        number = signal.Signals[f"SIG{words[words.index('--signal') + 1].removeprefix('SIG')}"]
    else:
        (state / f"{job}.cancelled").touch()
        (state / f"{job}.State").write_text("CANCELLED")
    with contextlib.suppress(ProcessLookupError, FileNotFoundError):
        os.kill(int((state / f"{job}.pid").read_text()), number)


def scontrol(state: Path, word: str, job: str) -> None:
    assert word == "requeue"
    (state / f"{job}.queued").touch()
    time.sleep(0.01)


if __name__ == "__main__":
    globals()[sys.argv[2]](Path(sys.argv[1]), *sys.argv[3:])
