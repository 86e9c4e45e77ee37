"""Combinations, one after another: data → twin → training → decisions → a line of results.jsonl."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from tqdm import tqdm

from benchmarks.memory_suite.curve import curve_of
from benchmarks.memory_suite.data import VERSION, ensure_dataset, held_out
from benchmarks.memory_suite.decisions import decide, probe_of
from benchmarks.memory_suite.layouts import FRAMES_PER_QUERY, TASKS
from benchmarks.memory_suite.options import Combination, Options, of_frames, of_memory
from kuavo_train.compose import compose_run
from kuavo_train.config import RunConfig
from kuavo_train.config_folders import quoted
from kuavo_train.data.policy_traits import remembers
from kuavo_train.errors import RunError, require
from kuavo_train.runs.files import JsonLines, read_lines
from kuavo_train.runs.run_folder import StageFolder, stage_folder
from kuavo_train.runs.trained_run import TrainedRun, load_policy
from kuavo_train.training.policy_factory import policy_defaults

PLACES = ("run", "outputs", "resume", "config_dir", "tasks_dir")
"""Settings that say where something lies, and nothing of what is trained."""

Train = Callable[[Sequence[str]], int]
Record = dict[str, Any]


def train_in_a_process(words: Sequence[str]) -> int:
    return subprocess.run([sys.executable, "-m", "kuavo_train", *words], check=False).returncode


def run_study(options: Options, train: Train = train_in_a_process) -> list[Record]:
    """The records of the combinations, trained now where they are not there yet.

    Args:
        train: kuavo_train's command, given its words; returns its exit status.
    """
    options.output.mkdir(parents=True, exist_ok=True)
    found = []
    for combination in tqdm(list(options.combinations()), "memory suite", unit="run"):
        run = Run.of(combination)
        record = stored(options.results, run.settings)
        if record is None:
            record = run.carry_out(train)
            JsonLines(options.results).append(record)
            tqdm.write(f"{combination.name}: {record['trained']['on']['right']} of {record['trained']['on']['n']}")
        found.append(record)
    return found


def stored(results: Path, settings: Record) -> Record | None:
    return next((record for record in read_lines(results) if record["settings"] == settings), None)


class Run:
    """A combination with all of its settings.

    Attributes:
        settings: all that decides what is trained and evaluated, the policy's defaults included: a run of other ones is
            another run. A dictionary as JSON gives it back.
    """

    def __init__(self, combination: Combination, config: RunConfig, twin: "Run | None"):
        self.combination, self.twin = combination, twin
        self.settings = _settings(combination, config, twin)
        digest = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()
        self.name = f"{combination.name}-{digest[:8]}"
        self.folder = stage_folder(replace(config, run=self.name))

    @classmethod
    def of(cls, combination: Combination) -> "Run":
        """Raises `ConfigError` for what kuavo_train would refuse before it opens any data."""
        (config,) = compose_run(combination.words())
        strides = config.policy["n_action_steps"]
        require(strides == FRAMES_PER_QUERY, "policy.n_action_steps", f"be {FRAMES_PER_QUERY}, a query's", strides)
        return cls(combination, config, None if combination.twin is None else cls.of(combination.twin))

    @property
    def result(self) -> Path:
        return self.folder.path / "checkpoints" / "best" / "pretrained_model"

    def trained(self, train: Train) -> StageFolder:
        """The run's folder, once it is finished; goes on where it was cut off. Others who need it wait.

        Raises:
            RunError: kuavo_train did not come to its end.
        """
        options = self.combination.options
        folder = self.folder
        with FileLock(options.output / f".{self.name}.lock"):
            if folder.status != "finished":
                ensure_dataset(self.combination.task, options.data, options.episodes)
                words = [*self.combination.words(), f"run={self.name}", "resume=true"]
                if self.twin is not None:
                    self.twin.trained(train)
                    words.append(f"policy.pretrained_path={quoted(str(self.twin.result))}")
                status = train(words)
                if status:
                    raise RunError(f"{self.name} must be trained to its end, kuavo_train ended with status {status}")
        return folder

    def carry_out(self, train: Train) -> Record:
        """Train, evaluate, report."""
        combination, options = self.combination, self.combination.options
        folder = self.trained(train)
        about = folder.about
        run = TrainedRun.open(folder.path.parent)
        policy, preprocessor = load_policy(self.result, torch.device("cpu"))
        decided = {}
        for part in ("trained", "twice"):
            episodes = held_out(combination.task, part, options.decisions)
            decided[part] = decide(
                probe_of(policy, preprocessor, run.normalization, episodes), run.normalization, episodes
            )
        curve = curve_of(folder).read()
        return {
            "task": combination.task,
            "situation": combination.situation,
            "memory": combination.memory,
            "seed": combination.seed,
            "steps": about["steps"],
            "chance": TASKS[combination.task].chance,
            **decided,
            "cpu_seconds": cpu_seconds(curve),
            "twin_cpu_seconds": None if self.twin is None else cpu_seconds(curve_of(self.twin.folder).read()),
            "curve": [{key: line[key] for key in ("step", "right", "n")} for line in curve],
            "run": str(folder.path.parent),
            "commit": run.stored.record.git_commit,
            "settings": self.settings,
        }


def cpu_seconds(curve: Sequence[Record]) -> float:
    """Of all processes that had a part in a run, each up to its last validation."""
    clock = [line["cpu_seconds"] for line in curve]
    ends = [now for now, later in zip(clock, [*clock[1:], 0.0], strict=True) if later < now]
    return round(sum(ends), 1)


def _settings(combination: Combination, config: RunConfig, twin: Run | None) -> Record:
    settings = {key: value for key, value in asdict(config).items() if key not in PLACES}
    settings["policy"] = {**policy_defaults(config.policy["type"]), **config.policy, "pretrained_path": None}
    for is_there, of_it in ((remembers(settings["policy"]), of_memory), (settings["policy"]["mem_frames"], of_frames)):
        if not is_there:
            settings["policy"] = {key: value for key, value in settings["policy"].items() if not of_it(key)}
    settings["data"] = {key: value for key, value in settings["data"].items() if key not in ("root", "cache_root")}
    settings["stage"] = {key: value for key, value in settings["stage"].items() if key != "root"}
    options = combination.options
    settings["suite"] = {
        "version": VERSION,
        "situation": combination.situation,
        "episodes": options.episodes,
        "decisions": options.decisions,
        "twin": twin and twin.name,
    }
    return json.loads(json.dumps(settings, default=str))
