"""What a checkpoint's memory does, in numbers and pictures."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from kuavo_train.command_line import option
from kuavo_train.data.dataset import MixedDataset
from kuavo_train.data.task import open_task
from kuavo_train.errors import require
from kuavo_train.probing.memory_decisions import (
    Question,
    answer_questions,
    attention_at,
    probe_over_time,
    trace_of,
)
from kuavo_train.probing.memory_walk import MemoryProbe, Walk, seeded_noise
from kuavo_train.probing.simulated_cues import cues_of, question_of
from kuavo_train.reading import Json
from kuavo_train.runs.files import write_json
from kuavo_train.runs.trained_run import TrainedRun, checkpoint_name, load_policy, stage_folder_above

MEMORY_FIELDS = (
    "num_mem_tokens",
    "mem_at_start",
    "mem_at_end",
    "mem_update",
    "mem_frames",
    "mem_frame_tokens",
    "mem_frame_sampling",
    "mem_backprop_depth",
)
CURVE_EPISODES = 64  # training episodes that the linear probe is fitted on, at most


def find_policy(checkpoint: Path) -> tuple[Path, Path]:
    """(pretrained_model, stage folder) of checkpoints/<step>, best or last, or its pretrained_model.

    Raises:
        ConfigError: it is none of these, or lies outside a stage's folder.
    """
    folder = checkpoint / "pretrained_model" if (checkpoint / "pretrained_model").is_dir() else checkpoint
    is_policy = (folder / "config.json").is_file() and (folder / "model.safetensors").is_file()
    require(is_policy, "checkpoint", "be a folder of a stage's checkpoints, or its pretrained_model", str(checkpoint))
    stage = stage_folder_above(folder)
    require(stage is not None, "checkpoint", "lie in a stage's folder, with its config.yaml above", str(checkpoint))
    assert stage is not None
    return folder, stage


@dataclass(frozen=True)
class Options:
    checkpoint: Path = option("checkpoints/<step>, best or last of a stage, or its pretrained_model")
    task: str = option("name of a task of the run")
    data: Path | None = option("dataset that was never trained on; none: the run's held-out episodes", None)
    episodes: int | None = option("how many of them; none: all", None)
    output: Path | None = option("folder for the report; none: <stage folder>/memory_<task>", None)


def report(options: Options) -> Json:
    """Write the report and return the content of memory.json. Raises `ConfigError`."""
    folder, stage_folder = find_policy(options.checkpoint)
    run = TrainedRun.open(stage_folder.parent)
    task, data, episodes = options.task, options.data, options.episodes
    known = run.task(task)
    numbers: Sequence[int]
    examined, numbers = known, known.held_out_episodes
    if data is not None:
        examined = open_task(
            replace(run.recipe(task), root=str(data), episodes=None), replace(run.settings.data, held_out_episodes=1)
        )
        numbers = tuple(range(len(examined.bounds)))
        require(examined.content_hash != known.content_hash, "data", "be another dataset than the run's own", str(data))
    if episodes is not None:
        require(1 <= episodes <= len(numbers), "episodes", f"be in [1, {len(numbers)}], those there are", episodes)
        numbers = numbers[:episodes]
    run.normalization.check_covers(examined)
    policy, preprocessor = load_policy(folder, torch.device("cpu"))
    dataset = run.dataset([examined, known], policy.config)
    probe = MemoryProbe(policy, dataset, preprocessor)
    cues = cues_of(examined)
    found: Json = {
        "run": run.stored.record.run,
        "checkpoint": checkpoint_name(folder),
        "stage": next(stage.name for stage in run.stages if stage.folder.name == stage_folder.name),
        "task": task,
        "data": str(examined.root),
        "episodes": list(numbers),
        "memory": {key: getattr(policy.config, key, None) for key in MEMORY_FIELDS},
    }
    walk = probe.walk([probe.queries_of(0, episode) for episode in numbers])
    if probe.has_memory:
        found["trace"] = trace_of(walk, 0)
    questions = []
    if any(cues.get(episode, {}).get("cue") is not None for episode in numbers):
        stride = policy.config.n_action_steps
        questions = [question_of(examined, run.normalization, cues, episode, stride) for episode in numbers]
        found["decision"] = answer_questions(probe, walk, questions)
        if probe.has_memory:
            fitted = list(known.train_episodes[:CURVE_EPISODES])
            fit_walk = probe.walk([probe.queries_of(1, episode) for episode in fitted])
            labels = [(cues_of(known)[e]["cue"], cues_of(known)[e]["decision_frames"][0] // stride) for e in fitted]
            found["probe"] = probe_over_time(fit_walk, labels, walk, [(q.cue, q.query) for q in questions])
    at = [q.query for q in questions] or [len(draws) // 2 for draws in walk.episodes]
    noise = seeded_noise(policy, [[episode, query] for episode, query in zip(numbers, at, strict=True)])
    found["attention"] = attention_at(probe, walk, at, noise)
    output = options.output or stage_folder / f"memory_{task}"
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "memory.json", found)
    _draw(output, found, questions, dataset, walk)
    return found


def _draw(output: Path, found: Json, questions: Sequence[Question], dataset: MixedDataset, walk: Walk) -> None:
    from kuavo_train.probing.memory_figures import draw_cue, draw_trace  # matplotlib: slow to import

    if "trace" in found:
        camera = next(iter(dataset.tasks[0].cameras))
        rows = np.array([draw.row for draw in walk.episodes[0]])
        pictures = dataset.images[0](camera, rows).permute(0, 2, 3, 1).numpy()
        draw_trace(output / "memory_trace.png", found, pictures, questions[0] if questions else None)
    if "decision" in found:
        draw_cue(output / "memory_cue.png", found)


def summary(found: Json) -> str:
    """The report in a few lines for a terminal."""
    memory = found["memory"]
    held = f"{memory['num_mem_tokens'] or 0} memory tokens, {memory['mem_frames'] or 0} past frames"
    lines = [f"{found['task']}: {len(found['episodes'])} episodes, {held}"]
    decision = found.get("decision")
    if decision is None:
        lines.append("no cue in this task's data: nothing to decide from memory")
    else:
        lines.append(
            f"decision: {decision['n']} episodes, chance {decision['chance']:.2f}, observation independent of the cue "
            f"in {decision['identical_observations']}"
        )
        for name, row in decision["interventions"].items():
            what = "follows the donor" if name == "swapped" else "right"
            lines.append(
                f"  {name:8} {what}: {row['correct']}/{row['n']} = {row['accuracy']:.2f} "
                f"[{row['low']:.2f}, {row['high']:.2f}], action error {row['action_error']:.3f}"
            )
    shares = ", ".join(f"{kind} {share:.3f}" for kind, share in found["attention"].items())
    return "\n".join([*lines, f"attention of the action tokens: {shares}"])
