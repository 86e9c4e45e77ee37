"""What a policy's memory does, as pictures and numbers: is it written, is it used, what for.

    python -m kuavo_train.memory_report checkpoint=outputs/<run>/stage2_weighing/checkpoints/best task=weighing
    python -m kuavo_train.memory_report checkpoint=… task=… data=outputs/probe/weighing   # other episodes of the task
    python -m kuavo_train.memory_report checkpoint=… task=… episodes=4 output=some/folder

Takes the run's held-out episodes of the task, or all of `data`, a dataset that was never trained on. Writes
memory.json, memory_trace.png and, where the task has cues, memory_cue.png to `output` (default:
<stage folder>/memory_<task>). What is asked of the memory is told in `kuavo_train.evaluation.memory_probe`.

Cues are those of kuavo_sim. The right answer to the *other* cue in the very same layout comes from its expert, who
is asked to do the recorded episode again with that cue; up to the decision both demonstrations are the same.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from lerobot.configs import PreTrainedConfig
from lerobot.policies.factory import get_policy_class, make_pre_post_processors
from lerobot.utils.constants import ACTION
from omegaconf import OmegaConf

import lerobot_policy_smolvla_memory  # noqa: F401 - registers the policy
from kuavo_sim.env import KuavoEnv
from kuavo_sim.expert import demonstrate
from kuavo_train.config import ConfigError, RunConfig, StageConfig, require, resolve
from kuavo_train.data.frames import open_frames
from kuavo_train.data.mixture import MixedDataset
from kuavo_train.data.normalization import Normalization
from kuavo_train.data.tasks import Task, open_task
from kuavo_train.evaluation.memory_probe import MemoryProbe, seeded_noise
from kuavo_train.evaluation.memory_questions import (
    Question,
    answer_questions,
    attention_at,
    probe_over_time,
    trace_of,
)

CURVE_EPISODES = 64  # training episodes that the linear probe is fitted on, at most
KEYS = ("checkpoint", "task", "data", "episodes", "output")


@dataclass(frozen=True)
class StoredPolicy:
    """A checkpoint with what its run knows about it."""

    folder: Path  # pretrained_model
    stage_folder: Path
    config: RunConfig
    normalization: Normalization

    @classmethod
    def find(cls, checkpoint: Path) -> "StoredPolicy":
        """From checkpoints/<step>, best or last, or its pretrained_model. Raises `ConfigError`."""
        folder = checkpoint / "pretrained_model" if (checkpoint / "pretrained_model").is_dir() else checkpoint
        is_policy = (folder / "config.json").is_file() and (folder / "model.safetensors").is_file()
        require(
            is_policy, "checkpoint", "be a folder of a stage's checkpoints, or its pretrained_model", str(checkpoint)
        )
        # `absolute`, not `resolve`: run folders may be reached through a link of the user's own
        stage = next((up for up in folder.absolute().parents if (up / "config.yaml").is_file()), None)
        require(stage is not None, "checkpoint", "lie in a stage's folder, with its config.yaml above", str(checkpoint))
        assert stage is not None
        config = resolve(OmegaConf.load(stage / "config.yaml"))  # type: ignore[arg-type]
        return cls(folder, stage, config, Normalization.load(stage.parent / "normalization.json"))

    def stage_of(self, task: str) -> StageConfig:
        """The recipe of a task of this run: the one it was learnt with, or what run.json says of its data."""
        known = {
            entry["name"]: entry for entry in json.loads((self.stage_folder.parent / "run.json").read_text())["tasks"]
        }
        require(task in known, "task", f"be one of the run's ({', '.join(known)})", task)
        entry = known[task]
        learnt = self.stage_folder.parent / f"stage{entry['index']}_{task}" / "config.yaml"
        if learnt.is_file():
            return resolve(OmegaConf.load(learnt)).stage  # type: ignore[arg-type]
        about = {key: entry[key] for key in ("name", "index", "instruction")}
        return replace(self.config.stage, **about, root=entry["dataset"]["root"], replay={task: 1.0}, episodes=None)

    def load(self) -> tuple[Any, Any]:
        """The policy, on the CPU, and its preprocessor, as any LeRobot tool opens them."""
        config = PreTrainedConfig.from_pretrained(str(self.folder))
        config.device = "cpu"
        try:
            policy = get_policy_class(config.type).from_pretrained(str(self.folder), config=config, strict=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise ConfigError(f"checkpoint must load, got {self.folder}: {str(error)[:500]}") from error
        preprocessor, _ = make_pre_post_processors(
            config,
            pretrained_path=str(self.folder),
            preprocessor_overrides={"device_processor": {"device": "cpu"}},
        )
        return policy.eval(), preprocessor


def report(
    checkpoint: Path, task: str, *, data: Path | None = None, episodes: int | None = None, output: Path | None = None
) -> dict[str, Any]:
    """Write the report and return the content of memory.json. Raises `ConfigError`."""
    stored = StoredPolicy.find(checkpoint)
    stage = stored.stage_of(task)
    known = open_task(stage, stored.config.data)
    numbers: Sequence[int]
    asked, numbers = known, known.held_out_episodes
    if data is not None:
        asked = open_task(
            replace(stage, root=str(data), episodes=None), replace(stored.config.data, held_out_episodes=1)
        )
        numbers = tuple(range(len(asked.bounds)))
        require(asked.content_hash != known.content_hash, "data", "be another dataset than the run's own", str(data))
    if episodes is not None:
        require(1 <= episodes <= len(numbers), "episodes", f"be in [1, {len(numbers)}], those there are", episodes)
        numbers = numbers[:episodes]
    stored.normalization.check_covers(asked)
    policy, preprocessor = stored.load()
    sources = [open_frames(each, stored.config.data) for each in (asked, known)]
    dataset = MixedDataset([asked, known], sources, stored.normalization, chunk_size=policy.config.chunk_size)
    probe = MemoryProbe(policy, dataset, preprocessor)
    cues = cues_of(asked)
    found: dict[str, Any] = {
        "run": stored.config.run,
        "checkpoint": str(stored.folder.resolve().parent.name),
        "stage": stored.config.stage.name,
        "task": task,
        "data": str(asked.root),
        "episodes": list(numbers),
        "memory": {
            key: getattr(policy.config, key, None)
            for key in ("num_mem_tokens", "mem_at_start", "mem_at_end", "mem_update", "mem_backprop_depth")
        },
    }
    walk = probe.walk([probe.queries_of(0, episode) for episode in numbers])
    if probe.has_memory:
        found["trace"] = trace_of(walk, 0)
    questions = []
    if any(cues.get(episode, {}).get("cue") is not None for episode in numbers):
        stride = policy.config.n_action_steps
        questions = [_question(asked, stored.normalization, cues, episode, stride) for episode in numbers]
        found["decision"] = answer_questions(probe, walk, questions)
        if probe.has_memory:
            fitted = list(known.train_episodes[:CURVE_EPISODES])
            fit_walk = probe.walk([probe.queries_of(1, episode) for episode in fitted])
            labels = [(cues_of(known)[e]["cue"], cues_of(known)[e]["decision_frames"][0] // stride) for e in fitted]
            found["probe"] = probe_over_time(fit_walk, labels, walk, [(q.cue, q.query) for q in questions])
    at = [q.query for q in questions] or [len(draws) // 2 for draws in walk.episodes]
    noise = seeded_noise(policy, [[episode, query] for episode, query in zip(numbers, at, strict=True)])
    found["attention"] = attention_at(probe, walk, at, noise)
    output = output or stored.stage_folder / f"memory_{task}"
    output.mkdir(parents=True, exist_ok=True)
    (output / "memory.json").write_text(json.dumps(found, indent=1))
    _draw(output, found, questions, dataset, walk)
    return found


def cues_of(task: Task) -> dict[int, dict[str, Any]]:
    """Episode → what kuavo_sim recorded beside it; empty for other datasets."""
    path = task.root / "kuavo_sim_episodes.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return {entry["episode_index"]: entry for entry in map(json.loads, lines)}


def _question(
    task: Task, normalization: Normalization, cues: dict[int, dict[str, Any]], episode: int, stride: int
) -> Question:
    """What is asked of an episode: the first query whose executed actions depend on the cue.

    Raises:
        ConfigError: the simulation does not repeat the recorded episode.
    """
    entry = cues[episode]
    settings = json.loads((task.root / "recording.json").read_text())["settings"]
    keep = ("image_size", "renderer", "phase_visible")
    env = KuavoEnv(settings["task"], **{key: settings[key] for key in keep})
    shown = [
        demonstrate(env, entry["seed"], cue=cue, action_noise=settings["action_noise"])
        for cue in range(len(env.task.cues))
    ]
    recorded = task.action[slice(*task.bounds[episode])]
    same = shown[entry["cue"]].actions
    if same.shape != recorded.shape or not np.allclose(same, recorded, atol=1e-4):
        raise ConfigError(
            f"data: kuavo_sim must repeat episode {episode} of {task.root} (seed {entry['seed']}), got other actions; "
            "it was recorded by another version of the simulation, record it again"
        )
    decision = entry["decision_frames"][0]
    query = decision // stride
    until = slice(decision + 1)
    differs = np.zeros(decision + 1, bool)  # frames whose observation depends on the cue
    own = shown[entry["cue"]]
    for other in shown:
        differs |= (other.states[until] != own.states[until]).any(axis=1)
        for camera, pictures in other.pictures.items():
            differs |= (pictures[until] != own.pictures[camera][until]).any(axis=(1, 2, 3))
    visible = np.flatnonzero(differs[: query * stride + 1 : stride])
    mean, std = (normalization.array(ACTION, kind) for kind in ("mean", "std"))
    columns = normalization.space.action_columns(task)
    actions = []
    for demonstration in shown:
        normalized = np.zeros((len(demonstration.actions), len(mean)), np.float32)
        normalized[:, columns] = (demonstration.actions - mean[columns]) / std[columns]
        actions.append(normalized)
    return Question(
        episode=episode,
        cue=entry["cue"],
        query=query,
        frame=query * stride,
        decision_frame=decision,
        cue_seen=int(visible.max()) if len(visible) else 0,
        identical=not differs[query * stride],
        actions=actions,
        columns=columns,
    )


def _draw(output: Path, found: dict[str, Any], questions: Sequence[Question], dataset: MixedDataset, walk: Any) -> None:
    from kuavo_train.evaluation.memory_figures import draw_cue, draw_trace  # matplotlib: slow to import

    if "trace" in found:
        camera = next(iter(dataset.tasks[0].cameras))
        rows = np.array([draw.row for draw in walk.episodes[0]])
        pictures = dataset.images[0](camera, rows).permute(0, 2, 3, 1).numpy()
        draw_trace(output / "memory_trace.png", found, pictures, questions[0] if questions else None)
    if "decision" in found:
        draw_cue(output / "memory_cue.png", found)


def summary(found: dict[str, Any]) -> str:
    """The report in a few lines for a terminal."""
    memory = found["memory"]
    lines = [f"{found['task']}: {len(found['episodes'])} episodes, {memory['num_mem_tokens'] or 0} memory tokens"]
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


def main(words: Sequence[str]) -> int:
    """Command line: key=value arguments; 0, or 2 with the error on stderr."""
    if {"-h", "--help", "help"} & set(words):
        print(__doc__)
        return 0
    try:
        given = dict(_key_value(word) for word in words)
        for key in ("checkpoint", "task"):
            require(key in given, key, "be given", "nothing")
        episodes = given.get("episodes")
        require(episodes is None or episodes.isdigit(), "episodes", "be a whole number", episodes)
        found = report(
            Path(given["checkpoint"]),
            given["task"],
            data=Path(given["data"]) if "data" in given else None,
            episodes=int(episodes) if episodes is not None else None,
            output=Path(given["output"]) if "output" in given else None,
        )
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(summary(found))
    return 0


def _key_value(word: str) -> tuple[str, str]:
    key, equals, text = word.partition("=")
    require(bool(equals) and key in KEYS, "arguments", f"be key=value with a key of {', '.join(KEYS)}", word)
    return key, text


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
