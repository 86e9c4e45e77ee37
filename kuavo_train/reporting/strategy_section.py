"""What a strategy, the gate and the probes left in a run folder beside the losses, for matrix.json."""

from kuavo_train.reading import Json
from kuavo_train.runs.stored_run import StoredRun


def strategy_facts(run: StoredRun) -> Json:
    """Settings, and per stage what was merged, what a strategy added to the loss, and why it ended early."""
    return {
        "settings": {key: value for key, value in run.record.strategy_settings.items() if value},
        "merges": [
            {"stage": stage.index, **tried} for stage in run.stages if stage.merge for tried in _rounds(stage.merge)
        ],
        "choosing_episodes": {task.name: len(apart) for task in run.tasks if (apart := task.dataset.choosing_episodes)},
        "penalties": _charged(run, "penalty"),
        "distances": _charged(run, "distillation"),
        "stopped": [
            {"stage": stage.index, "why": stage.record.stopped} for stage in run.stages if stage.record.stopped
        ],
        "passes": [
            {"stage": stage.index, "task": task, "passes": passes}
            for stage in run.stages
            if stage.replay is not None
            for task, passes in stage.replay.passes.items()
        ],
    }


def _rounds(merge: Json) -> list[Json]:
    """Which modules were moved together, the coefficient chosen for them and those tried, one round after another."""
    earlier_version = "rounds" not in merge
    return [{"modules": "all", **merge}] if earlier_version else merge["rounds"]


def _charged(run: StoredRun, name: str) -> list[Json]:
    """Of what was logged under this name beside the loss: in each stage that has it, the most and the last."""
    logged = {
        stage.index: [value for line in stage.metrics if (value := getattr(line, name)) is not None]
        for stage in run.stages
    }
    return [{"stage": stage, "highest": max(each), "last": each[-1]} for stage, each in logged.items() if each]


def gate_readings(run: StoredRun) -> list[Json]:
    """Every reading of the gate, in order: task, change since learnt, budget, and what followed."""
    return [{**line.to_json(), "stage": stage.index} for stage in run.stages for line in stage.gate]


def probe_records(run: StoredRun) -> Json:
    """Name → what a probe found; `current` is False where the run has been trained on since."""
    last = run.finished[-1].record.checkpoint_hash if run.finished else None
    return {name: {**record, "current": record.get("checkpoint_hash") == last} for name, record in run.probes.items()}
