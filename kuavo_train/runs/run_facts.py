"""run.json: what a run is made of, written once, and what a later stage may not change."""

import hashlib
import json
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from itertools import takewhile
from pathlib import Path
from typing import Any

from kuavo_train.config import RunConfig, StageConfig
from kuavo_train.data.normalization import Normalization
from kuavo_train.data.task import Task
from kuavo_train.errors import ConfigError
from kuavo_train.reading import ANOTHER_RUN, read_json
from kuavo_train.runs.files import now, write_json
from kuavo_train.runs.settings import is_free

VERSIONS_OF = ("lerobot", "torch", "transformers", "accelerate", "mujoco", "numpy")


def write_run_facts(
    config: RunConfig, curriculum: Sequence[StageConfig], tasks: Sequence[Task], normalization: Normalization
) -> None:
    """run.json, once; a later stage with other data or another seed belongs to another run.

    `tasks` are those of `curriculum`, opened.
    """
    path = config.run_folder / "run.json"
    facts: dict[str, Any] = {
        "run": config.run,
        "seed": config.seed,
        "profile": config.profile,
        "strategy": config.strategy,
        "strategy_settings": {
            "mixture": config.mixture,
            "ewc": config.ewc and asdict(config.ewc),
            "merge": config.merge and asdict(config.merge),
        },
        "config_hash": _hash(
            {
                "policy": {key: value for key, value in config.policy.items() if not is_free(f"policy.{key}")},
                "tiny_vlm": config.tiny_vlm and asdict(config.tiny_vlm),
            }
        ),
        "tasks": [
            {
                "name": task.name,
                "index": task.index,
                "instruction": task.instruction,
                "instructions": list(task.instructions.texts),
                "instructions_of_dataset": task.instructions.own,
                "loss_target": stage.loss_target,
                "final_loss_limit": stage.final_loss_limit,
                "recipe": asdict(stage),
                "dataset": {
                    "root": str(task.root),
                    "from": task.origin and asdict(task.origin),
                    "hash": task.content_hash,
                    "episodes": len(task.bounds),
                    "frames": len(task.state),
                    "train_episodes": list(task.train_episodes),
                    "held_out_episodes": list(task.held_out_episodes),
                },
            }
            for stage, task in zip(curriculum, tasks, strict=True)
        ],
        "normalization": {"source": normalization.source, "hash": normalization.hash},
    }
    if path.is_file():
        stored = read_json(path, keys=("tasks",), remedy=ANOTHER_RUN)
        for key in ("seed", "strategy", "strategy_settings", "config_hash", "normalization"):
            if stored.get(key, facts[key]) != facts[key]:
                raise ConfigError(
                    f"{key} must stay what run {config.run} began with ({stored[key]}), got {facts[key]}; "
                    "choose another run=NAME"
                )
        known = {task["name"]: task["dataset"] for task in stored["tasks"]}
        learnt = {stage.name for stage in takewhile(lambda stage: stage.name != config.stage.name, curriculum)}
        _check_instructions(config.run, [task for task in facts["tasks"] if task["name"] in learnt], stored["tasks"])
        for task in facts["tasks"]:
            dataset = task["dataset"]
            before = known.get(task["name"], dataset)
            if before["hash"] != dataset["hash"]:
                raise ConfigError(
                    f"the dataset of {task['name']} must stay what run {config.run} began with "
                    f"({before['hash'][:12]}…), got {dataset['hash'][:12]}… in {dataset['root']}; "
                    "choose another run=NAME"
                )
            if any(before[split] != dataset[split] for split in ("train_episodes", "held_out_episodes")):
                raise ConfigError(
                    f"the held-out episodes of {task['name']} must stay those run {config.run} began with "
                    f"({before['held_out_episodes']}), got {dataset['held_out_episodes']}: what was trained on must "
                    "not be validated on; put data.held_out_episodes, data.split_seed and stage.episodes back, or "
                    "choose another run=NAME"
                )
        facts = {**stored, "tasks": facts["tasks"]}
    else:
        facts |= {
            "created": now(),
            "git_commit": _git_commit(),
            "versions": {"python": platform.python_version(), **{name: version(name) for name in VERSIONS_OF}},
        }
    write_json(path, facts)


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _git_commit() -> str:
    """Of the code, where it lies in its own repository (not installed, in another's) and git is there."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return "unknown"
    try:
        # In a session of its own: a signal to our process group would leave a run without its commit for ever.
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False, start_new_session=True
        )
    except OSError:
        return "unknown"
    return found.stdout.strip() or "unknown"


def _check_instructions(run: str, learnt: Sequence[dict[str, Any]], stored: Sequence[dict[str, Any]]) -> None:
    """Raises `ConfigError` where a task that was learnt would be replayed and validated with other words."""
    before = {task["name"]: task for task in stored}
    for task in learnt:
        for key in ("instructions", "instructions_of_dataset"):
            told = before.get(task["name"], {}).get(key, task[key])
            if told != task[key]:
                raise ConfigError(
                    f"the {key.replace('_', ' ')} of {task['name']} must stay what it was learnt with in run {run} "
                    f"({told}), got {task[key]}; put stage.instruction back, or choose another run=NAME"
                )
