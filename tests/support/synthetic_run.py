"""Stored runs that no training made: the files of a run folder, from a few made-up learning curves.

python tests/evaluation/synthetic_run.py outputs/example && python -m kuavo_train.report run=outputs/example
"""

import hashlib
import json
import math
import sys
from pathlib import Path

import numpy as np

TASKS = {1: "moving_grasp", 2: "weighing", 3: "placement", 4: "sorting"}
INSTRUCTIONS = {
    "moving_grasp": "Grasp the object from the conveyor belt using visual guidance.",
    "weighing": "Pick up the package from the conveyor belt, weigh it on the electronic scale.",
    "placement": "Pick up a bottle from the cluttered daily chemical bottles.",
    "sorting": "Move from the starting point to the rack, pick up the workpiece.",
}
SHARES = {
    1: {1: 1.0},
    2: {1: 0.2, 2: 0.8},
    3: {1: 0.1, 2: 0.2, 3: 0.7},
    4: {1: 0.1, 2: 0.1, 3: 0.2, 4: 0.6},
}
RISE_A_STAGE = {"moving_grasp": 0.03, "weighing": 0.16, "placement": 0.60, "sorting": 0.0}
"""Relative rise of a task's loss in every stage after its own: kept, degraded, forgotten."""
FORGETS = {"replay": 1.0, "sequential": 4.0, "joint": 0.0}
"""How much of that rise a strategy lets happen. Joint training has one stage, which learns all tasks."""
FINAL_LIMITS = {1: 0.7, 2: 0.8, 3: 0.2, 4: 0.9}
GROUPS = {"vision": 86_433_024, "connector": 11_796_480, "vlm_text": 204_800_000, "expert": 98_214_912}
GROUPS |= {"state_proj": 31_680, "action_proj": 88_272, "memory": 3_840}
FROZEN = {"vision", "connector", "vlm_text"}
STEPS = 200
HELD_OUT = 12


def write_run(
    folder: Path,
    *,
    stages: tuple[int, ...] = (1, 2, 3, 4),
    finished: int | None = None,
    held_out: int = HELD_OUT,
    seed: int = 0,
    strategy: str = "replay",
) -> Path:
    """Write a run of the given task indices whose first `finished` stages finished and whose next one was cut short.

    Runs of several seeds share their data and its split.
    """
    data, random = np.random.default_rng(0), np.random.default_rng([seed, len(strategy)])
    names = [TASKS[stage] for stage in stages]
    all_tasks = stages
    if strategy == "joint":
        stages = stages[:1]
    finished = len(stages) if finished is None else finished
    difficulty = {name: data.uniform(0.8, 1.2, size=held_out) for name in names}
    episodes = {name: [int(e) for e in data.choice(60, size=held_out, replace=False)] for name in names}
    folder.mkdir(parents=True)
    _write(folder / "run.json", _run(folder.name, all_tasks, episodes, seed, strategy))

    def name_of(stage: int) -> str:
        return "joint" if strategy == "joint" else TASKS[stage]

    def seen_in(stage: int) -> list[str]:
        return names if strategy == "joint" else [TASKS[index] for index in stages if index <= stage]

    def loss(name: str, done: tuple[int, ...], stage: int | None, progress: float) -> float:
        """Loss of a task once the stages `done` are over and `progress` of `stage` is."""
        own = next(index for index, task in TASKS.items() if task == name)
        learnt = 0.10 + 0.03 * own
        if stage == own or (strategy == "joint" and stage is not None):
            return learnt + (1.1 - learnt) * math.exp(-5 * progress)
        if own not in done:
            return 1.1 - 0.05 * len(done)
        later = sum(1 for index in done if index > own) + (progress if stage is not None else 0)
        return learnt * (1 + FORGETS[strategy] * RISE_A_STAGE[name] * later)

    def validate(stage: int, kind: str, step: int, tasks: list[str], mean: dict[str, float]) -> list[dict]:
        seen = seen_in(stage) if kind != "start" else []
        lines = []
        for name in tasks:
            losses = mean[name] * difficulty[name] * random.normal(1, 0.03, size=held_out)
            errors = 0.55 * np.sqrt(losses)
            rows = [
                {"episode": episode, "frames": 12, "loss": float(one), "action_error": float(error)}
                for episode, one, error in zip(episodes[name], losses, errors, strict=True)
            ]
            error = float(errors.mean())
            groups = {"left_arm": 0.21 * error, "right_arm": 0.34 * error, "claws": 0.18 * error, "base_yaw": None}
            if name == "sorting":
                groups["base_yaw"] = 0.08 * error
            lines.append(
                {
                    "stage": stage,
                    "stage_name": name_of(stage),
                    "kind": kind,
                    "epoch": step // 40,
                    "step": step,
                    "task": name,
                    "seen": name in seen,
                    "loss": float(losses.mean()),
                    "action_error": error,
                    "action_error_by_group": groups,
                    "constant_error": 0.78,
                    "episodes": rows,
                    "draws": 4,
                    "seconds": 1.5,
                }
            )
        return lines

    for number, stage in enumerate(stages[: finished + 1]):
        done, complete = stages[:number], number < finished
        path = folder / f"stage{stage}_{name_of(stage)}"
        path.mkdir()
        last_step = STEPS if complete else STEPS // 2
        lines = []
        if number == 0:
            lines += validate(stage, "start", 0, names, {name: loss(name, (), None, 0.0) for name in names})
        seen = seen_in(stage)
        for step in range(40, last_step + 1, 40):
            means = {name: loss(name, done, stage, step / STEPS) for name in names}
            lines += validate(stage, "epoch", step, seen, means)
        if complete:
            means = {name: loss(name, (*done, stage), None, 0.0) for name in names}
            for name in names if strategy == "joint" else [TASKS[stage]]:
                means[name] = loss(name, done, stage, 1.0)
            lines += validate(stage, "end", STEPS, names, means)
        _write_lines(path / "validation.jsonl", lines)
        _write_lines(path / "metrics.jsonl", _metrics(stage, last_step, random))
        (path / "config.yaml").write_text(f"task: {TASKS[stage]}\nseed: {seed}\n", encoding="utf-8")
        record = {
            "name": name_of(stage),
            "index": stage,
            "status": "finished" if complete else "interrupted",
            "steps": last_step,
            "epochs": last_step // 40,
            "seconds": 171.0 + stage,
            "best": {"step": last_step - 40, "loss": 0.2},
            "checkpoint": f"checkpoints/{last_step:06d}",
            "checkpoint_hash": _hash(f"checkpoint {stage}"),
            "started": "2026-05-01T10:00:00",
            "finished": "2026-05-01T10:03:00" if complete else None,
        }
        _write(path / "stage.json", record)
        if complete:
            _write(path / "replay_audit.json", _audit(stage, all_tasks, strategy))
            _write(path / "parameters.json", {"groups": _groups(stage)})
    return folder


def _run(name: str, stages: tuple[int, ...], episodes: dict[str, list[int]], seed: int, strategy: str) -> dict:
    return {
        "run": name,
        "created": "2026-05-01T09:58:00",
        "seed": seed,
        "profile": "embedded",
        "strategy": strategy,
        "git_commit": "0f3c9a1d2b4e",
        "versions": {"python": "3.12", "torch": "2.11.0", "lerobot": "0.6.1"},
        "config_hash": _hash("config"),
        "tasks": [
            {
                "name": TASKS[stage],
                "index": stage,
                "instruction": INSTRUCTIONS[TASKS[stage]],
                "loss_target": 0.5,
                "final_loss_limit": FINAL_LIMITS[stage],
                "dataset": {
                    "root": f"data/{TASKS[stage]}",
                    "hash": _hash(TASKS[stage]),
                    "episodes": 60,
                    "frames": 5400,
                    "train_episodes": [e for e in range(60) if e not in episodes[TASKS[stage]]],
                    "held_out_episodes": sorted(episodes[TASKS[stage]]),
                },
            }
            for stage in stages
        ],
        "normalization": {"source": "joint", "hash": _hash("normalization")},
    }


def _metrics(stage: int, steps: int, random: np.random.Generator) -> list[dict]:
    lines = []
    for step in range(5, steps + 1, 5):
        base = 0.10 + 0.03 * stage + (0.9 if stage == 1 else 0.5) * math.exp(-5 * step / STEPS)
        warm = min(1.0, step / 20)
        lines.append(
            {
                "step": step,
                "epoch": step // 40,
                "loss": base * float(random.lognormal(0, 0.12)),
                "lr": 5e-5 / stage**0.6 * warm * (0.5 + 0.5 * math.cos(math.pi * step / STEPS)),
                "grad_norm": float(random.lognormal(0, 0.2)),
                "samples_per_s": 210.0 + float(random.normal(0, 5)),
                "task_frames": {TASKS[stage]: step * 32},
                "seconds": step * 0.15,
            }
        )
    return lines


def _audit(stage: int, stages: tuple[int, ...], strategy: str) -> dict:
    shares = {TASKS[index]: share for index, share in SHARES[stage].items() if index in stages}
    if strategy != "replay":
        shares = {TASKS[index]: 1.0 for index in (stages if strategy == "joint" else [stage])}
    shares = {name: share / sum(shares.values()) for name, share in shares.items()}
    total = STEPS * 32
    frames = {name: round(share * total) for name, share in shares.items()}
    return {
        "stage": stage,
        "declared": shares,
        "drawn": {name: {"frames": n, "share": n / sum(frames.values())} for name, n in frames.items()},
        "total_frames": sum(frames.values()),
        "passes": {name: n / 4800 for name, n in frames.items()},
        "held_out_frames_drawn": 0,
    }


def _groups(stage: int) -> list[dict]:
    groups = []
    for group, parameters in GROUPS.items():
        frozen = group in FROZEN and stage > 1
        before = _hash(f"{group} {1 if frozen else stage - 1}")
        after = before if frozen else _hash(f"{group} {stage}")
        groups.append(
            {
                "group": group,
                "parameters": parameters,
                "trainable": not frozen,
                "fingerprint_before": before,
                "fingerprint_after": after,
                "changed": before != after,
            }
        )
    return groups


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _write(path: Path, record: dict) -> None:
    path.write_text(json.dumps(record, indent=1), encoding="utf-8")


def _write_lines(path: Path, lines: list[dict]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def roll_out(folder: Path, outcome, *, trials: int = 20) -> None:
    """Give a run closed-loop results at the end of its stages.

    Args:
        outcome: (task, place in the order of stages, layout) → whether the episode succeeds.
    """
    for place, stage in enumerate(sorted(folder.glob("stage*"))):
        lines = [json.loads(line) for line in (stage / "validation.jsonl").read_text().splitlines()]
        rolled = []
        for line in lines:
            if line["kind"] == "end" and line["seen"]:
                played = [{"seed": 10**9 + n, "success": bool(outcome(line["task"], place, n))} for n in range(trials)]
                played = [episode | {"progress": float(episode["success"]), "error": None} for episode in played]
                line["success"] = {"successes": sum(e["success"] for e in played), "trials": trials}
                about = {key: line[key] for key in ("kind", "step", "task")}
                rolled.append(about | {"episodes": played})
        _write_lines(stage / "validation.jsonl", lines)
        _write_lines(stage / "rollouts.jsonl", rolled)


def edit(path: Path, change) -> None:
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def edit_lines(path: Path, change) -> None:
    """Rewrite a jsonl; `change` returns the new line or None to drop it."""
    lines = [change(json.loads(line)) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines if line is not None))


if __name__ == "__main__":
    print(write_run(Path(sys.argv[1])))
