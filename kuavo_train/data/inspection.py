"""What a recording is like: statistics per joint, jumps, idle frames, episodes recorded twice, and a picture of one."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np

from kuavo_train.data.images.frames import DecodedFrames
from kuavo_train.data.recordings.checks import listed_counts
from kuavo_train.data.recordings.joint_groups import columns_by_group, joint_group
from kuavo_train.data.task import Task

UNITS = {"left_arm": "rad", "right_arm": "rad", "base_position": "m", "base_yaw": "rad"}
MOMENTS = 6
"""Pictures of each camera on the sheet of an episode."""

JUMP_OF_RANGE, JUMP_SPEED = 0.2, 5.0
"""A step between two frames is a jump when it is more than this part of the joint's own range and faster, in rad/s."""
SAID_JUMPS = 5
"""Jumps whose places are listed; all are counted."""
STILL = 1e-3
"""A dimension stands still while it changes by no more than this between two frames, in rad, m or claw units."""


@dataclass(frozen=True)
class JointStatistics:
    """One named dimension over the episodes in use, in robot units.

    Attributes:
        largest_step: between two frames of an episode.
        jumps: (episode, frame) that a jump leads to; None for claws, which may open at once, and the base.
    """

    name: str
    mean: float
    std: float
    min: float
    max: float
    largest_step: float
    jumps: list[tuple[int, int]] | None


@dataclass(frozen=True)
class IdleFrames:
    """Frames in which neither state nor action differs from the frame before.

    Attributes:
        total: of `frames`, those of the episodes in use.
        leading, trailing: mean over episodes of the idle frames before the first and after the last movement.
    """

    total: int
    frames: int
    leading: float
    trailing: float


def episodes_in_use(task: Task) -> list[int]:
    return sorted([*task.train_episodes, *task.held_out_episodes])


def joint_statistics(task: Task, names: Sequence[str], values: np.ndarray) -> list[JointStatistics]:
    """`values` [N, D] are the task's state or action, `names` its dimensions."""
    episodes = episodes_in_use(task)
    used = values[task.rows_of(episodes)].astype(np.float64)
    rows = np.concatenate([np.arange(*task.bounds[episode])[1:] for episode in episodes])  # that have one before
    steps = np.abs(values[rows].astype(np.float64) - values[rows - 1])
    least, most = used.min(axis=0), used.max(axis=0)
    jumps = steps > np.maximum(JUMP_OF_RANGE * (most - least), JUMP_SPEED / task.recording.fps)
    places = np.stack([task.episode[rows], task.frame[rows]], axis=1)
    return [
        JointStatistics(
            name=name,
            mean=float(used[:, column].mean()),
            std=float(used[:, column].std()),
            min=float(least[column]),
            max=float(most[column]),
            largest_step=float(steps[:, column].max(initial=0)),
            jumps=[(int(episode), int(frame)) for episode, frame in places[jumps[:, column]]]
            if joint_group(name) in ("left_arm", "right_arm")
            else None,
        )
        for column, name in enumerate(names)
    ]


def duplicate_episodes(task: Task) -> list[list[int]]:
    """Groups of episodes whose states and actions are the same to the last bit."""
    same: dict[bytes, list[int]] = {}
    for episode in episodes_in_use(task):
        rows = slice(*task.bounds[episode])
        digest = hashlib.sha256(task.state[rows].tobytes() + task.action[rows].tobytes()).digest()
        same.setdefault(digest, []).append(episode)
    return [group for group in same.values() if len(group) > 1]


def idle_frames(task: Task) -> IdleFrames:
    moving = []  # per episode, [T − 1] bool: does the frame differ from the one before
    for episode in episodes_in_use(task):
        rows = slice(*task.bounds[episode])
        both = np.concatenate([task.state[rows], task.action[rows]], axis=1)
        moving.append((np.abs(np.diff(both, axis=0)) > STILL).any(axis=1))
    leading = [int(np.argmax(moves)) if moves.any() else len(moves) for moves in moving]
    trailing = [int(np.argmax(moves[::-1])) if moves.any() else len(moves) for moves in moving]
    return IdleFrames(
        total=sum(int((~moves).sum()) for moves in moving),
        frames=sum(len(moves) + 1 for moves in moving),
        leading=float(np.mean(leading)),
        trailing=float(np.mean(trailing)),
    )


def overview(task: Task) -> str:
    """All numbers, as lines of text."""
    episodes = episodes_in_use(task)
    seconds = np.diff(task.bounds[episodes], axis=1) / task.recording.fps
    idle, twice = idle_frames(task), duplicate_episodes(task)
    states = joint_statistics(task, task.state_names, task.state)
    actions = joint_statistics(task, task.action_names, task.action)
    instructions = task.instructions
    lines = [
        f"{task.name}: {len(episodes)} episodes of {seconds.min():.1f} to {seconds.max():.1f} s, median "
        f"{np.median(seconds):.1f} s, {task.recording.fps} Hz",
        f"the dataset says {listed_counts(instructions.recorded, 'episode') or 'nothing of what is done'}",
        f"the policy reads {listed_counts(instructions.counts(task.episode, episodes), 'episode')}",
        *_table("state", states),
        *_table("action", actions),
        f"jumps, steps of more than {JUMP_OF_RANGE:.0%} of a joint's range and {JUMP_SPEED:g} rad/s: "
        + (_jumps_text({"state": states, "action": actions}) or "none"),
        f"idle: {idle.total:,} of {idle.frames:,} frames ({idle.total / idle.frames:.1%}) do not differ from the one "
        f"before; {idle.leading:.1f} of them before an episode's first movement, {idle.trailing:.1f} after its last",
        "episodes recorded twice: " + ("; ".join(" = ".join(map(str, group)) for group in twice) or "none"),
    ]
    return "\n".join(lines)


def _table(kind: str, rows: Sequence[JointStatistics]) -> list[str]:
    head = f"  {kind:<18}" + "".join(f"{name:>10}" for name in ("mean", "std", "min", "max", "step", "jumps"))
    return [
        head,
        *(
            f"  {row.name:<18}"
            + "".join(f"{value:>10.3f}" for value in (row.mean, row.std, row.min, row.max, row.largest_step))
            + f"{'–' if row.jumps is None else len(row.jumps):>10}"
            for row in rows
        ),
    ]


def _jumps_text(of_kinds: dict[str, list[JointStatistics]]) -> str:
    """Where to look: the first few."""
    listed = [
        f"{kind} {row.name} in episode {episode}, frame {frame}"
        for kind, rows in of_kinds.items()
        for row in rows
        for episode, frame in row.jumps or ()
    ]
    more = f"; and {len(listed) - SAID_JUMPS} more" if len(listed) > SAID_JUMPS else ""
    return "; ".join(listed[:SAID_JUMPS]) + more


def save_sheet(task: Task, frames: DecodedFrames, episode: int, path: Path) -> Path:
    """Rows of pictures, one per camera, over the curves of every joint group: states drawn through, actions dashed."""
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    rows = np.arange(*task.bounds[episode])
    moments = rows[np.linspace(0, len(rows) - 1, min(MOMENTS, len(rows))).round().astype(int)]
    groups = columns_by_group(task.action_names)
    heights = [1.0] * len(task.cameras) + [1.4] * len(groups)
    figure = plt.figure(figsize=(13, 1.7 * sum(heights)), layout="constrained")
    title = f"{task.name}, episode {episode}: {task.instruction_at(rows[0])}\nstates drawn through, actions dashed"
    figure.suptitle(title, fontsize=9, wrap=True)
    grid = figure.add_gridspec(len(heights), len(moments), height_ratios=heights)
    for place, camera in enumerate(task.cameras):
        for column, picture in enumerate(frames(camera, moments)):
            axes = figure.add_subplot(grid[place, column])
            axes.imshow(picture.permute(1, 2, 0).numpy())
            axes.set(xticks=[], yticks=[])
            if place == 0:
                axes.set_title(f"{task.frame[moments[column]] / task.recording.fps:.1f} s", fontsize=8)
            if column == 0:
                axes.set_ylabel(camera.rsplit(".", 1)[-1], fontsize=8)
    times = task.frame[rows] / task.recording.fps
    for place, (group, columns) in enumerate(groups.items(), start=len(task.cameras)):
        axes = figure.add_subplot(grid[place, :])
        for number, column in enumerate(columns):
            name = task.action_names[column]
            colour = f"C{number}"
            axes.plot(times, task.action[rows, column], "--", color=colour, linewidth=0.9)
            if name in task.state_names:
                axes.plot(times, task.state[rows, task.state_names.index(name)], color=colour, linewidth=1.2)
            axes.plot([], [], color=colour, label=name)
        axes.set_ylabel(f"{group} [{UNITS[group]}]" if group in UNITS else group, fontsize=8)
        axes.tick_params(labelsize=7)
        axes.legend(fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.set_xlabel("s", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
