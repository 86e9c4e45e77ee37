"""What a run promises about itself, checked from what it wrote: the proofs at the end of a report.

Each check passes, fails, or (None) could not be made because the run did not write what it needs.
"""

from collections.abc import Callable

from kuavo_train.metrics.number_format import integer
from kuavo_train.reading import Json
from kuavo_train.runs.records import GroupRecord, ReplayAudit
from kuavo_train.runs.stored_run import StoredRun

Outcome = tuple[bool | None, str]


def run_checks(run: StoredRun) -> list[Json]:
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
    if any(audit.kept for audit in _audits(run).values()):
        checks["Only what was kept of earlier tasks was replayed"] = _kept_alone_drawn
    entries = []
    for name, check in checks.items():
        passed, detail = check(run)
        entries.append({"name": name, "passed": passed, "detail": detail})
    return entries


def _audits(run: StoredRun) -> dict[int, ReplayAudit]:
    return {stage.index: stage.replay for stage in run.stages if stage.replay is not None}


def _held_out_never_drawn(run: StoredRun) -> Outcome:
    audits = {stage: audit for stage, audit in _audits(run).items() if audit.held_out_frames_drawn is not None}
    if not audits:
        return None, "no stage wrote replay_audit.json"
    drawn = {stage: audit.held_out_frames_drawn or 0 for stage, audit in audits.items()}
    total = sum(audit.total_frames or 0 for audit in audits.values())
    text = f"{integer(sum(drawn.values()))} of {integer(total)} frames drawn came from held-out episodes"
    guilty = [str(stage) for stage, frames in drawn.items() if frames]
    return not guilty, text + (f" (stage {', '.join(guilty)})" if guilty else "")


def _kept_alone_drawn(run: StoredRun) -> Outcome:
    audits = {stage: audit for stage, audit in _audits(run).items() if audit.kept}
    others = {stage: audit.frames_drawn_not_kept for stage, audit in audits.items() if audit.frames_drawn_not_kept != 0}
    if others:
        return False, f"frames that were not kept were drawn in stage {', '.join(map(str, others))}"
    last = audits[max(audits)].kept
    kept = ", ".join(f"{task} {integer(of['frames'])} of {integer(of['of_frames'])}" for task, of in last.items())
    return True, f"frames kept: {kept}"


def _splits_disjoint(run: StoredRun) -> Outcome:
    splits = {task.name: task.dataset for task in run.tasks}
    if not all(split.train_episodes and split.held_out_episodes for split in splits.values()):
        return None, "run.json does not list the episodes of every task"
    shared = {}
    for name, split in splits.items():
        apart = {*split.held_out_episodes, *split.choosing_episodes}
        both = {*split.held_out_episodes} & {*split.choosing_episodes}
        shared[name] = sorted(both | {*split.train_episodes} & apart)
    guilty = [f"{name}: episodes {episodes}" for name, episodes in shared.items() if episodes]
    held_out = ", ".join(f"{name} {len(split.held_out_episodes)}" for name, split in splits.items())
    return not guilty, "; ".join(guilty) or f"held out: {held_out}"


def _same_episodes(run: StoredRun) -> Outcome:
    used: dict[str, set[tuple[int, ...]]] = {}
    for stage in run.stages:
        for line in stage.validations:
            if line.kind == "end" or (line.kind == "start" and stage is run.stages[0]):
                episodes = tuple(sorted(each.episode for each in line.held_out.episodes))
                used.setdefault(line.task, set()).add(episodes)
    if not used or all(sets == {()} for sets in used.values()):
        return None, "no validation recorded its episodes"
    guilty = [task for task, sets in used.items() if len(sets) > 1]
    parts = {task.name: (len(task.dataset.validated), len(task.dataset.held_out_episodes)) for task in run.tasks}
    sampled = sorted({f"{part} of {held_out}" for part, held_out in parts.values() if part < held_out})
    of_those = f", {', '.join(sampled)} held-out episodes a task" if sampled else ""
    text = f"they differ for {', '.join(guilty)}" if guilty else f"in {len(used)} tasks, after every stage{of_those}"
    return not guilty, text


def _shares_as_declared(run: StoredRun) -> Outcome:
    """|frames − declared × total| < 1 for every task: a share is a quota, not a dice roll.

    Where memory recurs, frames are dealt in clips, and the count is exact to the clip: `dealt_together` frames.
    """
    worst, most, where, allowed = 0.0, 0.0, "", 1
    audits = _audits(run)
    for stage, audit in audits.items():
        for task in sorted({*audit.declared, *audit.drawn}):
            frames = audit.drawn[task].frames if task in audit.drawn else 0
            difference = abs(frames - audit.declared.get(task, 0.0) * (audit.total_frames or 0))
            if difference / audit.dealt_together > most:
                most, worst, allowed = difference / audit.dealt_together, difference, audit.dealt_together
                where = f" ({task} in stage {stage})"
    if not audits:
        return None, "no stage wrote replay_audit.json"
    rule = "less than 1 is exact" if allowed == 1 else f"frames are dealt in clips, less than {allowed} is exact"
    return most < 1, f"largest difference {worst:.2f} frames{where}; {rule}"


def _frozen_unchanged(run: StoredRun) -> Outcome:
    groups = _groups(run, trainable=False)
    if not any(stage.parameters for stage in run.stages):
        return None, "no stage wrote parameters.json"
    guilty = [f"{group.group} in stage {stage}" for stage, group in groups if group.has_changed]
    text = f"{len(groups)} fingerprints equal before and after" if groups else "no group was frozen"
    return not guilty, f"changed: {', '.join(guilty)}" if guilty else text


def _trained_changed(run: StoredRun) -> Outcome:
    groups = _groups(run, trainable=True)
    if not groups:
        return None, "no stage wrote the fingerprints of trained parameters"
    idle = [f"{group.group} in stage {stage}" for stage, group in groups if not group.has_changed]
    text = f"did not move: {', '.join(idle)}" if idle else f"{len(groups)} fingerprints differ from before"
    return not idle, text


def _beats_constant(run: StoredRun) -> Outcome:
    if not run.finished:
        return None, "no stage is finished"
    last, worse, margins = run.finished[-1], [], []
    for line in last.validations:
        error, constant = line.held_out.action_error, line.held_out.constant_error
        if line.kind != "end" or run.learnt_in[line.task] > last.index or error is None or not constant:
            continue
        margins.append(constant / error if error else float("inf"))
        if error >= constant:
            worse.append(line.task)
    if not margins:
        return None, "action errors were not measured"
    text = f"no better on {', '.join(worse)}" if worse else f"at least {min(margins):.1f} times better"
    return not worse, text


def _groups(run: StoredRun, *, trainable: bool) -> list[tuple[int, GroupRecord]]:
    """(stage, group) of the finished stages' non-empty groups: an unfinished one has no fingerprint after."""
    return [
        (stage.index, group)
        for stage in run.finished
        for group in stage.parameters or ()
        if group.trainable == trainable and group.parameters
    ]
