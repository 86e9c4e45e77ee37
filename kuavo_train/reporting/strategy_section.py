"""What a strategy, the gate and the probes left in a run folder beside the losses, for matrix.json."""

from kuavo_train.reading import Json
from kuavo_train.runs.stored_run import StoredRun


def strategy_facts(run: StoredRun) -> Json:
    """Settings, and per stage what was merged, what elastic weight consolidation charged, and why it ended early."""
    penalties = {
        stage.index: [line.penalty for line in stage.metrics if line.penalty is not None] for stage in run.stages
    }
    return {
        "settings": {key: value for key, value in run.record.strategy_settings.items() if value},
        "merges": [{"stage": stage.index, **stage.merge} for stage in run.stages if stage.merge],
        "penalties": [
            {"stage": stage, "highest": max(charged), "last": charged[-1]}
            for stage, charged in penalties.items()
            if charged
        ],
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


def gate_readings(run: StoredRun) -> list[Json]:
    """Every reading of the gate, in order: task, change since learnt, budget, and what followed."""
    return [{**line.to_json(), "stage": stage.index} for stage in run.stages for line in stage.gate]


def probe_records(run: StoredRun) -> Json:
    """Name → what a probe found; `current` is False where the run has been trained on since."""
    last = run.finished[-1].record.checkpoint_hash if run.finished else None
    return {name: {**record, "current": record.get("checkpoint_hash") == last} for name, record in run.probes.items()}
