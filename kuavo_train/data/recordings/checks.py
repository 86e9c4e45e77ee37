"""What can be wrong with a recording: rows, segments of videos, and values that are not what they are taken for."""

from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import av
import numpy as np

from kuavo_train.data.recordings.joint_groups import columns_by_group
from kuavo_train.data.recordings.recording import Recording, episode_list
from kuavo_train.errors import ConfigError

FULL_TURN = 2 * np.pi  # rad; no joint of an arm turns so far
HALF_TURN = np.pi  # rad; about what a joint of a Kuavo's arm may move through
DEGREE = np.pi / 180
CLAW_MARGIN = 0.05  # of the limits' distance: sensors overshoot
CLAW_SCALES = (1, 100, 140, 255)  # what converters of Kuavo recordings are known to scale the claws to
FITS = 0.9  # a known scale is the recording's when the claws come at least so far
LITTLE = 0.1  # of its limits; what moves by less is worth a look
OPENED_AT_ONCE = 8  # videos

_AGAIN = "record or convert it again, or use the others, episodes: [first, last] in the task's file"


# --------------------------------------------------------------------------------------------- rows and their episodes


def check_rows(recording: Recording, rows: Mapping[str, np.ndarray], where: str) -> None:
    """Bounds of the episodes, and the rows' own numbers, must agree.

    Args:
        rows: episode_index, frame_index and index of all rows, [N] each.

    Raises:
        ConfigError: names the first episode that does not agree, and how many do not.
    """
    (first, end), lengths = recording.bounds.T, recording.lengths
    before = np.concatenate([[0], end[:-1]])
    where, found = f"{where}: rows", len(rows["index"])
    _refuse(where, lengths < 1, lambda e: f"have frames, got a length of {lengths[e]}")
    _refuse(where, first != before, lambda e: f"begin at {before[e]}, got {first[e]} (dataset_from_index)")
    _refuse(
        where,
        end - first != lengths,
        lambda e: f"be as many as its {lengths[e]} frames, got {first[e]} to {end[e]} (dataset_to_index)",
    )
    if found != end[-1]:
        raise ConfigError(f"{where} of all tables must be the {end[-1]:,} of meta/episodes, got {found:,}; {_AGAIN}")
    episode = np.repeat(np.arange(len(lengths)), lengths)
    counts = {"episode_index": episode, "index": np.arange(found), "frame_index": np.arange(found) - first[episode]}
    for key, expected in counts.items():
        _refuse_rows(where, key, rows[key], expected, episode)


def _refuse_rows(where: str, key: str, found: np.ndarray, expected: np.ndarray, episode: np.ndarray) -> None:
    """As `_refuse`, where a number of the rows [N] is not the expected one; `episode` [N] is what each is of."""
    bad = np.flatnonzero(found != expected)
    wrong = np.isin(np.arange(episode.max(initial=0) + 1), episode[bad])
    _refuse(where, wrong, lambda _: f"have {key} {expected[bad[0]]} at row {bad[0]}, got {found[bad[0]]}")


def _refuse(where: str, wrong: np.ndarray, rule: Callable[[int], str]) -> None:
    """Raise `ConfigError` where episodes are `wrong` [E], with the rule for the first."""
    episodes = np.flatnonzero(wrong)
    if len(episodes):
        others = f" (and {episode_list(episodes[1:])})" if len(episodes) > 1 else ""
        raise ConfigError(f"{where} of episode {episodes[0]} must {rule(int(episodes[0]))}{others}; {_AGAIN}")


def check_clock(recording: Recording, rows: Mapping[str, np.ndarray], used: Sequence[int], where: str) -> None:
    """Timestamps may be uneven, as `clock_notes` reports, but not those of another clock, or of one that stands still.

    Raises:
        ConfigError: names the first episode in use that does not last as long as its frames, give or take a half.
    """
    times, frame = rows.get("timestamp"), rows["frame_index"]
    if times is None:
        return
    episodes, first = np.unique(rows["episode_index"], return_index=True)
    last = np.append(first[1:], len(times)) - 1
    seconds, expected = times[last] - times[first], (last - first) / recording.fps
    wrong = np.flatnonzero(~(np.abs(seconds - expected) <= expected / 2) & np.isin(episodes, used))
    if len(wrong):
        e, others = wrong[0], f" (and {episode_list(episodes[wrong[1:]])})" if len(wrong) > 1 else ""
        raise ConfigError(
            f"{where}: timestamps of episode {episodes[e]} must span the {expected[e]:.2f} s from its frame "
            f"{frame[first[e]]} to frame {frame[last[e]]}, got {times[first[e]]:g} and {times[last[e]]:g} s{others}; "
            f"{_AGAIN}"
        )


def clock_notes(recording: Recording, rows: Mapping[str, np.ndarray], used: Sequence[int]) -> list[str]:
    """Timestamps that are not those of even frames: nothing here reads them, but LeRobot's own tools do."""
    times, even = rows.get("timestamp"), rows["frame_index"] / recording.fps
    if times is None:
        return []
    off = ~(np.abs(times - even) <= 0.5 / recording.fps) & np.isin(rows["episode_index"], used)
    if not off.any():
        return []
    row = int(np.flatnonzero(off)[0])
    return [
        f"timestamps of {episode_list(np.unique(rows['episode_index'][off]))} are not frame_index / fps (frame "
        f"{rows['frame_index'][row]} at {times[row]:.2f} s, expected {even[row]:.2f} s): frames are taken to be "
        f"1/{recording.fps:g} s apart all the same"
    ]


# ------------------------------------------------------------------------------------------------------------ cameras


def check_cameras(recording: Recording, keys: Sequence[str], where: str) -> None:
    """Cameras must be pictures in colour, one for each row.

    Args:
        keys: of the dataset's features, those that are used as cameras.

    Raises:
        ConfigError: names those that are depth, or have another rate than the dataset.
    """
    wrong = {key: reasons for key in keys if (reasons := unfit(recording, key))}
    if wrong:
        found = "; ".join(f"{key}: {', '.join(reasons)}" for key, reasons in wrong.items())
        them, rate = "it" if len(wrong) == 1 else "them", f"{recording.fps:g} fps"
        raise ConfigError(
            f"{where}: cameras must be 8-bit pictures of three channels at the dataset's {rate}, by meta/info.json, "
            f"got {found}; leave {them} out of data.cameras, or convert the recording again, depth as 8-bit pictures "
            f"of three channels, every camera at {rate}"
        )


def unfit(recording: Recording, key: str) -> list[str]:
    """Why a feature cannot be a camera."""
    feature, about, reasons = recording.features[key], recording.about_video(key), []
    if key not in recording.camera_keys:
        return [f"numbers of dtype {feature.get('dtype')}"]
    shape, rate, pixels = feature.get("shape"), about.get("video.fps"), str(about.get("video.pix_fmt"))
    if not isinstance(shape, list) or len(shape) != 3:
        return [f"shape {shape}, not [height, width, channels]"]
    channels = shape[0] if shape[0] in (1, 3) else shape[-1]  # either order is found in datasets
    if key in recording.depth_keys:
        reasons.append("a depth map")
    if channels != 3:
        reasons.append(f"shape {shape}")
    if pixels.startswith("gray") and pixels not in ("gray", "gray8"):
        reasons.append(f"more than 8 bits ({pixels})")
    # LeRobot rounds the rate of a video down to whole numbers.
    if isinstance(rate, int | float) and abs(rate - recording.fps) >= 1:
        reasons.append(f"{rate:g} fps")
    return reasons


# ------------------------------------------------------------------------------------------------- segments of videos


def check_segments(recording: Recording, key: str, used: Sequence[int], where: str) -> None:
    """The part of a video that each episode claims must be as long as it is, in the file, and its own.

    Raises:
        ConfigError: names the first episode of which that is not so, and how many there are.
    """
    segments, half = recording.segments(key), 0.5 / recording.fps
    start, end = segments.T
    lengths, seconds = recording.lengths, recording.lengths / recording.fps
    files = np.array(recording.video_files(key, range(len(segments))))
    where, in_use = f"{where}: segment in {key}", np.isin(np.arange(len(segments)), used)

    def got(e: int) -> str:
        return f"got {start[e]:.2f} to {end[e]:.2f} s of {files[e]} (from_timestamp, to_timestamp)"

    wrong = in_use & ~(np.abs(end - start - seconds) <= half)
    _refuse(where, wrong, lambda e: f"be as long as its {lengths[e]} frames, {seconds[e]:.2f} s, {got(e)}")
    claimed = _claimed_twice(files, segments, half)
    wrong = in_use & np.isin(np.arange(len(segments)), list(claimed))
    _refuse(where, wrong, lambda e: f"be its own, {got(e)}, where that of episode {claimed[e]} is")
    durations = _durations(recording.root, np.unique(files[in_use]).tolist())
    there = np.array([durations.get(file, np.inf) for file in files])
    wrong = in_use & ~((start >= -half) & (end <= there + half))
    _refuse(where, wrong, lambda e: f"lie in its file, of {there[e]:.2f} s, {got(e)}")


def segment_notes(recording: Recording, key: str, used: Sequence[int]) -> list[str]:
    """Segments that do not follow each other as their episodes do: no writer leaves them so, and nothing forbids it."""
    numbers = np.asarray(sorted(used))
    starts, files = recording.segments(key)[numbers, 0], np.array(recording.video_files(key, numbers.tolist()))
    late = np.flatnonzero((files[1:] == files[:-1]) & (starts[1:] < starts[:-1]))
    if not len(late):
        return []
    before, after = numbers[late[0]], numbers[late[0] + 1]
    return [
        f"in {files[late[0]]} the pictures of episode {after} lie before those of episode {before}, as meta/episodes "
        "says; look whether they are theirs: python -m kuavo_train.inspect_data"
    ]


def _claimed_twice(files: np.ndarray, segments: np.ndarray, half: float) -> dict[int, int]:
    """Episode → another one that claims the same part of a file, for more than `half` a frame."""
    claimed: dict[int, int] = {}
    order = np.lexsort((segments[:, 0], files))
    longest = int(order[0])  # of the segments so far in this file, the one that ends last
    for episode in map(int, order[1:]):
        if files[episode] == files[longest] and segments[episode, 0] < segments[longest, 1] - half:
            claimed.setdefault(episode, longest)
            claimed.setdefault(longest, episode)
        if files[episode] != files[longest] or segments[episode, 1] > segments[longest, 1]:
            longest = episode
    return claimed


def _durations(root: Path, videos: Sequence[str]) -> dict[str, float]:
    """Seconds of each video, by its header; infinite where it does not, or where it does not open at all.

    Decoding the last frame, as preflight does next, then says more of such a file than its header could.
    """

    def duration(video: str) -> float:
        seconds = np.inf
        with suppress(OSError, IndexError, av.FFmpegError), av.open(str(root / video)) as container:
            stream = container.streams.video[0]
            if stream.duration is not None and stream.time_base is not None:
                seconds = float(stream.duration * stream.time_base)
        return seconds

    with ThreadPoolExecutor(OPENED_AT_ONCE) as threads:
        return dict(zip(videos, threads.map(duration, videos), strict=True))


# ------------------------------------------------------------------------------------------------------------- values


def check_finite(
    key: str, names: Sequence[str], values: np.ndarray, episode: np.ndarray, frame: np.ndarray, where: str
) -> None:
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        row, column = bad[0]
        raise ConfigError(
            f"{where}: {key} must be finite, got {values[row, column]} for {names[column]} in episode "
            f"{episode[row]}, frame {frame[row]} ({len(bad):,} in episodes "
            f"{', '.join(map(str, np.unique(episode[bad[:, 0]])))}); correct the recording, or use a part of it, "
            "episodes: [first, last] in the task's file"
        )


def check_arms(key: str, names: Sequence[str], values: np.ndarray, where: str) -> None:
    """Degrees, or a number that some recorder writes for "nothing", would stretch the scale of a joint."""
    kind, groups = key.removeprefix("observation."), columns_by_group(names)
    wrong = []
    for column in np.concatenate([groups.get(group, []) for group in ("left_arm", "right_arm")]).astype(int):
        least, most = _span(values[:, column])
        if max(-least, most) > FULL_TURN:
            wrong.append((f"{kind}.{names[column]}", least, most))
    if wrong:
        found = ", ".join(f"{name} from {least:g} to {most:g}" for name, least, most in wrong)
        fix = ", ".join(f"{name}: {DEGREE:.6g}" for name, *_ in wrong)
        raise ConfigError(
            f"{where}: joints of the arms must be in rad, within a full turn, got {found}; if these are degrees, set "
            f"scale: {{{fix}}} in the task's file, else correct the recording"
        )


def check_claws(key: str, names: Sequence[str], values: np.ndarray, limits: Sequence[float] | None, where: str) -> None:
    """Recordings of different age scale the claws differently; mixed, they would teach two meanings of one number."""
    if limits is None:
        return
    margin, kind = CLAW_MARGIN * (limits[1] - limits[0]), key.removeprefix("observation.")
    wrong = []
    for column in columns_by_group(names).get("claws", ()):
        least, most = _span(values[:, column])
        if least < limits[0] - margin or most > limits[1] + margin:
            wrong.append((f"{kind}.{names[column]}", least, most))
    if not wrong:
        return
    found = ", ".join(f"{name} from {least:g} to {most:g}" for name, least, most in wrong)
    factor = claw_factor(min(least for _, least, _ in wrong), max(most for *_, most in wrong), limits)
    scaled = "{" + ", ".join(f"{name}: {factor:.6g}" for name, *_ in wrong) + "}" if factor is not None else ""
    fix = (
        f"if the recording scales them, set scale: {scaled} in the task's file"
        if scaled
        else "a factor (scale) does not bring them there: correct the recording"
    )
    raise ConfigError(
        f"{where}: claws must be in {list(limits)} (open to closed), got {found}; {fix}, or data.claw_limits=null to "
        "take claws as they are in all tasks"
    )


def claw_factor(least: float, most: float, limits: Sequence[float]) -> float | None:
    """What brings values from `least` to `most` into `limits`: of a known scale that they fill, else of their own.

    None where no factor does, as for −1 to 1 into 0 to 1.
    """
    lower, upper = limits
    farthest = max(most, -least)
    if farthest == 0:
        return None
    digit = 10.0 ** (np.floor(np.log10(farthest)) - 1)
    own = float(f"{np.ceil(farthest / digit - 1e-6) * digit:.6g}")  # to two digits, upwards: 1.93 is of 2
    scale = next((known for known in CLAW_SCALES if FITS * known <= farthest <= known * (1 + CLAW_MARGIN)), own)
    reach, margin = max(abs(lower), abs(upper)), CLAW_MARGIN * (upper - lower)
    for factor in (reach / scale, -reach / scale):
        ends = sorted((least * factor, most * factor))
        if ends[0] >= lower - margin and ends[1] <= upper + margin:
            return factor
    return None


def little_used(
    kind: str,
    names: Sequence[str],
    values: np.ndarray,
    claw_limits: Sequence[float] | None,
    *,
    resting: Collection[str] = (),
) -> list[str]:
    """Notes on claws, and arms, that move but hardly: another unit looks like that.

    A claw by its limits; an arm when none of its joints does a tenth of half a turn, since one joint alone rests in
    many a good demonstration.

    Args:
        kind: state or action.
        values: [N, D] of the frames that are trained on.
        resting: names of what no action moves: it trembles, and that is right.
    """
    notes, ranges = [], np.ptp(values, axis=0)
    ranges[[name in resting for name in names]] = 0
    groups = columns_by_group(names)
    if claw_limits is not None:
        whole = claw_limits[1] - claw_limits[0]
        for column in groups.get("claws", ()):
            if 0 < ranges[column] < LITTLE * whole:
                notes.append(
                    f"{kind} of {names[column]} uses {ranges[column] / whole:.1%} of {list(claw_limits)}; is its scale "
                    "right?"
                )
    for group in ("left_arm", "right_arm"):
        most = ranges[groups[group]].max() if group in groups else 0
        if 0 < most < LITTLE * HALF_TURN:
            notes.append(f"{kind} of the {group} moves by {most:.3g} rad at most; is its unit right?")
    return notes


def _span(values: np.ndarray) -> tuple[float, float]:
    """Least and most of the values that are finite."""
    finite = values[np.isfinite(values)]
    return (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 0.0)


def listed_counts(counts: Mapping[str, int], unit: str, shown: int = 3) -> str:
    """Texts with how often each is found: "pick the red one" (12 episodes), …"""
    listed = [f'"{text}" ({n} {unit}{"s" * (n != 1)})' for text, n in counts.items()]
    return ", ".join(listed[:shown]) + (f" and {len(listed) - shown} more" if len(listed) > shown else "")
