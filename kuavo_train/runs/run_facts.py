"""run.json: what a run is made of, written once, and what a later stage may not change."""

import hashlib
import json
import platform
import subprocess
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from itertools import takewhile
from pathlib import Path

from kuavo_train.config import ReplayConfig, RunConfig, StageConfig
from kuavo_train.data.normalization import Normalization
from kuavo_train.data.task import Task
from kuavo_train.errors import Problems
from kuavo_train.reading import ANOTHER_RUN, Json
from kuavo_train.runs.files import now, write_json
from kuavo_train.runs.records import DatasetRecord, RunRecord, StatisticsRecord, TaskRecord
from kuavo_train.runs.settings import is_free
from kuavo_train.runs.stored_run import read_run_record

VERSIONS_OF = ("lerobot", "torch", "transformers", "accelerate", "mujoco", "numpy")


def write_run_facts(
    config: RunConfig, curriculum: Sequence[StageConfig], tasks: Sequence[Task], normalization: Normalization
) -> None:
    """run.json as the run's first stage begins it; a later stage adds what it says of the tasks.

    `tasks` are those of `curriculum`, opened.

    Raises:
        ConfigError: what the run began with has changed.
    """
    path, facts = config.run_folder / "run.json", facts_of(config, curriculum, tasks, normalization)
    if path.is_file():
        began = read_run_record(path, remedy=ANOTHER_RUN)
        learnt = [stage.name for stage in takewhile(lambda stage: stage.name != config.stage.name, curriculum)]
        Problems(differences(began, facts, learnt=learnt)).raise_all()
        facts = replace(began, tasks=facts.tasks)
    else:
        versions = {"python": platform.python_version(), **{name: version(name) for name in VERSIONS_OF}}
        facts = replace(facts, created=now(), git_commit=_git_commit(), versions=versions)
    write_json(path, facts.to_json())


def facts_of(
    config: RunConfig, curriculum: Sequence[StageConfig], tasks: Sequence[Task], normalization: Normalization
) -> RunRecord:
    """What a run is made of as it stands now, without when, where and with what it was begun."""
    return RunRecord(
        run=config.run,
        seed=config.seed,
        profile=config.profile,
        strategy=config.strategy,
        strategy_settings={
            "mixture": config.mixture,
            "ewc": config.ewc and asdict(config.ewc),
            "merge": config.merge and asdict(config.merge),
            **({"distill": asdict(config.distill)} if config.distill else {}),  # runs before it lack it
            **({"adapters": asdict(config.adapters)} if config.adapters else {}),
            **_replay_settings(config.replay),
        },
        axes=config.axes,
        config_hash=_hash(
            {
                "policy": {key: value for key, value in config.policy.items() if not is_free(f"policy.{key}")},
                "tiny_vlm": config.tiny_vlm and asdict(config.tiny_vlm),
            }
        ),
        tasks=tuple(_task(stage, task) for stage, task in zip(curriculum, tasks, strict=True)),
        normalization=StatisticsRecord(normalization.source, normalization.hash),
    )


def _replay_settings(replay: ReplayConfig) -> Json:
    """What is kept and how much is replayed, where anything is set; runs before these keys lack them."""
    kept = {key: value for key, value in asdict(replay).items() if key != "share"} if replay.keeps_part else {}
    share = {} if replay.share is None else {"share": replay.share}
    return {"replay": kept | share} if kept or share else {}


def _task(stage: StageConfig, task: Task) -> TaskRecord:
    return TaskRecord(
        name=task.name,
        index=task.index,
        instruction=task.instruction,
        instructions=task.instructions.texts,
        instructions_of_dataset=task.instructions.own,
        loss_target=stage.loss_target,
        final_loss_limit=stage.final_loss_limit,
        recipe=asdict(stage),
        dataset=DatasetRecord(
            root=str(task.root),
            origin=asdict(task.origin) if task.origin else None,
            hash=task.content_hash,
            episodes=len(task.bounds),
            frames=task.frames,
            train_episodes=task.train_episodes,
            held_out_episodes=task.held_out_episodes,
            choosing_episodes=task.choosing_episodes,
            validated_episodes=task.validated_episodes,
        ),
    )


def differences(began: RunRecord, now: RunRecord, *, learnt: Collection[str]) -> Iterator[str]:
    """What may not differ and does, a sentence each: such a stage belongs to another run.

    What the run did not write down when it began is not compared.

    Args:
        learnt: tasks that would be replayed and validated with other words than they were learnt with.
    """
    unknown = RunRecord(run=began.run, tasks=())
    for key in ("seed", "strategy", "strategy_settings", "config_hash", "normalization"):
        if getattr(began, key) not in (getattr(unknown, key), getattr(now, key)):
            was, found = (record.to_json()[key] for record in (began, now))
            yield f"{key} must stay what run {began.run} began with ({was}), got {found}; choose another run=NAME"
    before = {task.name: task for task in began.tasks}
    for task in now.tasks:
        if task.name in before:
            if task.name in learnt:
                yield from _other_words(began.run, before[task.name], task)
            yield from _other_data(began.run, task.name, before[task.name].dataset, task.dataset)


def _other_words(run: str, was: TaskRecord, now: TaskRecord) -> Iterator[str]:
    for key in ("instructions", "instructions_of_dataset"):
        if getattr(was, key) not in (None, (), getattr(now, key)):
            yield (
                f"the {key.replace('_', ' ')} of {now.name} must stay what it was learnt with in run {run} "
                f"({was.to_json()[key]}), got {now.to_json()[key]}; put stage.instruction back, or choose another "
                "run=NAME"
            )


def _other_data(run: str, task: str, was: DatasetRecord, now: DatasetRecord) -> Iterator[str]:
    if was.hash is None:
        return
    if was.hash != now.hash:
        yield (
            f"the dataset of {task} must stay what run {run} began with ({was.hash[:12]}…), got "
            f"{str(now.hash)[:12]}… in {now.root}; choose another run=NAME"
        )
    elif (was.train_episodes, was.held_out_episodes) != (now.train_episodes, now.held_out_episodes):
        yield (
            f"the held-out episodes of {task} must stay those run {run} began with ({list(was.held_out_episodes)}), "
            f"got {list(now.held_out_episodes)}: what was trained on must not be validated on; put "
            "data.held_out_episodes, data.split_seed and stage.episodes back, or choose another run=NAME"
        )


def _hash(content: Json) -> str:
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
