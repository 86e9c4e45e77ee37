"""What a run promises about itself, checked from what it wrote: the proofs at the end of a report.

Each check passes, fails, or (None) could not be made because the run did not write what it needs.
"""

from collections.abc import Callable

from kuavo_train.metrics.number_format import integer
from kuavo_train.runs.stored_run import Record, StoredRun

Outcome = tuple[bool | None, str]


def run_checks(run: StoredRun) -> list[Record]:
    """One entry for each promise: its name, whether it was kept, and the evidence in words."""
    checks: dict[str, Callable[[StoredRun], Outcome]] = {
        "Held-out episodes were never trained on": _held_out_never_drawn,
        "Training and held-out episodes are disjoint": _splits_disjoint,
        "Every validation used the same held-out episodes": _same_episodes,
        "Replay shares drawn are those declared": _shares_as_declared,
        "Frozen parameters did not change": _frozen_unchanged,
        "Trained parameters did change": _trained_changed,
        "The final policy beats a constant predictor on every task": _beats_constant,
    }
    entries = []
    for name, check in checks.items():
        passed, detail = check(run)
        entries.append({"name": name, "passed": passed, "detail": detail})
    return entries


def _held_out_never_drawn(run: StoredRun) -> Outcome:
    audits = [stage for stage in run.stages if stage.replay and "held_out_frames_drawn" in stage.replay]
    if not audits:
        return None, "no stage wrote replay_audit.json"
    drawn = {stage.index: stage.replay["held_out_frames_drawn"] for stage in audits if stage.replay}
    total = sum((stage.replay or {}).get("total_frames") or 0 for stage in audits)
    text = f"{integer(sum(drawn.values()))} of {integer(total)} frames drawn came from held-out episodes"
    guilty = [str(stage) for stage, frames in drawn.items() if frames]
    return not guilty, text + (f" (stage {', '.join(guilty)})" if guilty else "")


def _splits_disjoint(run: StoredRun) -> Outcome:
    splits = {task["name"]: task.get("dataset") or {} for task in run.tasks}
    if not all(split.get("train_episodes") and split.get("held_out_episodes") for split in splits.values()):
        return None, "run.json does not list the episodes of every task"
    shared = {
        name: sorted(set(split["train_episodes"]) & set(split["held_out_episodes"])) for name, split in splits.items()
    }
    guilty = [f"{name}: episodes {episodes}" for name, episodes in shared.items() if episodes]
    held_out = ", ".join(f"{name} {len(split['held_out_episodes'])}" for name, split in splits.items())
    return not guilty, "; ".join(guilty) or f"held out: {held_out}"


def _same_episodes(run: StoredRun) -> Outcome:
    used: dict[str, set[tuple[int, ...]]] = {}
    for stage in run.stages:
        for line in stage.validations:
            if line["kind"] == "end" or (line["kind"] == "start" and stage is run.stages[0]):
                episodes = tuple(sorted(episode["episode"] for episode in line.get("episodes") or ()))
                used.setdefault(line["task"], set()).add(episodes)
    if not used or all(sets == {()} for sets in used.values()):
        return None, "no validation recorded its episodes"
    guilty = [task for task, sets in used.items() if len(sets) > 1]
    text = f"they differ for {', '.join(guilty)}" if guilty else f"in {len(used)} tasks, after every stage"
    return not guilty, text


def _shares_as_declared(run: StoredRun) -> Outcome:
    """|frames − declared × total| < 1 for every task: a share is a quota, not a dice roll.

    Where memory recurs, frames are dealt in clips, and the count is exact to the clip: `dealt_together` frames.
    """
    worst, most, where, allowed = 0.0, 0.0, "", 1
    audits = [stage for stage in run.stages if stage.replay]
    for stage in audits:
        replay = stage.replay or {}
        declared, drawn = replay.get("declared") or {}, replay["drawn"]
        for task in sorted({*declared, *drawn}):
            frames = (drawn.get(task) or {}).get("frames", 0)
            difference = abs(frames - declared.get(task, 0.0) * (replay.get("total_frames") or 0))
            together = replay.get("dealt_together") or 1
            if difference / together > most:
                most, worst, allowed = difference / together, difference, together
                where = f" ({task} in stage {stage.index})"
    if not audits:
        return None, "no stage wrote replay_audit.json"
    rule = "less than 1 is exact" if allowed == 1 else f"frames are dealt in clips, less than {allowed} is exact"
    return most < 1, f"largest difference {worst:.2f} frames{where}; {rule}"


def _frozen_unchanged(run: StoredRun) -> Outcome:
    groups = _groups(run, trainable=False)
    if not any(stage.parameters for stage in run.stages):
        return None, "no stage wrote parameters.json"
    guilty = [f"{group['group']} in stage {stage}" for stage, group in groups if _changed(group)]
    text = f"{len(groups)} fingerprints equal before and after" if groups else "no group was frozen"
    return not guilty, f"changed: {', '.join(guilty)}" if guilty else text


def _trained_changed(run: StoredRun) -> Outcome:
    groups = _groups(run, trainable=True)
    if not groups:
        return None, "no stage wrote the fingerprints of trained parameters"
    idle = [f"{group['group']} in stage {stage}" for stage, group in groups if not _changed(group)]
    text = f"did not move: {', '.join(idle)}" if idle else f"{len(groups)} fingerprints differ from before"
    return not idle, text


def _beats_constant(run: StoredRun) -> Outcome:
    if not run.finished:
        return None, "no stage is finished"
    last, worse, margins = run.finished[-1], [], []
    learnt = run.learnt_in()
    for line in last.validations:
        error, constant = line.get("action_error"), line.get("constant_error")
        if line["kind"] != "end" or learnt[line["task"]] > last.index or error is None or not constant:
            continue
        margins.append(constant / error if error else float("inf"))
        if error >= constant:
            worse.append(line["task"])
    if not margins:
        return None, "action errors were not measured"
    text = f"no better on {', '.join(worse)}" if worse else f"at least {min(margins):.1f} times better"
    return not worse, text


def _groups(run: StoredRun, *, trainable: bool) -> list[tuple[int, Record]]:
    """(stage, group) of the finished stages' non-empty groups: an unfinished one has no fingerprint after."""
    return [
        (stage.index, group)
        for stage in run.finished
        for group in stage.parameters or ()
        if bool(group["trainable"]) == trainable and group["parameters"]
    ]


def _changed(group: Record) -> bool:
    """From the fingerprints themselves where both are there, not from what the run says about them."""
    before, after = group.get("fingerprint_before"), group.get("fingerprint_after")
    return bool(group.get("changed")) if before is None or after is None else before != after
