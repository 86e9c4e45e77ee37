"""Record demonstrations of the scripted expert as LeRobot datasets (v3, video).

    python -m kuavo_sim.record task=all episodes=40 root=outputs/data
    python -m kuavo_sim.record task=weighing image_size=480x640 depth=true root=outputs/kuavo  # as on the robot

writes one dataset per task to <root>/<task>, and nothing where the same one is already there. Beside LeRobot's own
files a dataset holds

    recording.json              the settings, the simulation's version and a hash of the content
    kuavo_sim_episodes.jsonl    per episode: seed, cue, frames at which the cue is needed, frames of the sub-goals
    contact_sheet.png           the first episode to look at

A dataset is a function of its settings: episodes are written in the order of their seeds, whatever the number of
workers. It is written beside its place and renamed into it when whole, so what carries a dataset's name is complete.
"""

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
from collections import deque
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import numpy as np
from PIL import Image
from tqdm import tqdm

import kuavo_sim
from kuavo_sim.arguments import Arguments, Readers, boolean, parse_arguments
from kuavo_sim.children import STOP_SIGNALS, born_deaf, follow_parent
from kuavo_sim.cpus import usable_cpus
from kuavo_sim.env import KuavoEnv
from kuavo_sim.expert import Demonstration, demonstrate
from kuavo_sim.picture_size import ImageSize, height_and_width
from kuavo_sim.repertoire import REPERTOIRE
from kuavo_sim.robot import BASE_NAMES, CAMERAS, DEPTHS, FPS, STATE_NAMES
from kuavo_sim.sheet import contact_sheet
from kuavo_sim.tasks import TASKS

if TYPE_CHECKING:
    from multiprocessing.sharedctypes import Synchronized

    from lerobot.datasets.lerobot_dataset import LeRobotDataset

_SEEDS_PER_RECORDING = 100_000
_MAX_SEED = kuavo_sim.EVALUATION_SEED_START // _SEEDS_PER_RECORDING - 1
_RECORDING, _EPISODES, _SHEET = "recording.json", "kuavo_sim_episodes.jsonl", "contact_sheet.png"
_STATISTICS = Path("meta/stats.json")
_NOT_CONTENT = {_RECORDING, _SHEET}


@dataclass(frozen=True)
class RecordSettings:
    """All that a dataset depends on.

    `action_noise` is the standard deviation in rad of the joint noise under which the expert acts (the recorded
    actions are without it). Episode k is drawn from the seed `100_000 * seed + k`. `depth` adds what Kuavo recordings
    call observation.depth_h, _l and _r: videos of grey pictures, in cm (255: 2.55 m and farther).
    """

    task: str
    episodes: int
    seed: int = 0
    image_size: ImageSize = 64
    renderer: str = "rays"
    phase_visible: bool = True
    action_noise: float = 0.025
    fps: int = FPS
    depth: bool = False

    def __post_init__(self) -> None:
        sides = height_and_width(self.image_size)
        rules = (
            ("task", self.task in REPERTOIRE, f"be one of {', '.join(REPERTOIRE)}"),
            ("episodes", 1 <= self.episodes <= _SEEDS_PER_RECORDING // 2, f"be in [1, {_SEEDS_PER_RECORDING // 2}]"),
            ("seed", 0 <= self.seed <= _MAX_SEED, f"be in [0, {_MAX_SEED}]"),
            # Video in yuv420p needs even sides.
            ("image_size", all(16 <= side <= 1024 and side % 2 == 0 for side in sides), "be even and in [16, 1024]"),
            ("renderer", self.renderer in ("rays", "egl"), "be rays or egl"),
            ("renderer", not self.depth or self.renderer == "rays", "be rays with depth=true"),
            ("action_noise", 0 <= self.action_noise <= 0.1, "be in [0, 0.1] rad"),
            ("fps", self.fps == FPS, f"be {FPS}, at which the simulation is stepped"),
        )
        for key, holds, rule in rules:
            if not holds:
                raise ValueError(f"{key} must {rule}, got {getattr(self, key)!r}")


def ensure_all_recorded(wanted: Mapping[Path, RecordSettings], *, workers: int | None = None) -> list[Path]:
    """Record the datasets that are not there already; the folders of those.

    What is written to one dataset keeps one core busy. So several are recorded side by side, in processes of their own
    that share `workers`, by default the number of CPUs.

    Raises:
        ValueError, FileExistsError: as `ensure_recorded`; a dataset that is there is looked at before any is recorded.
        RuntimeError: the expert fails in more than half of the episodes.
    """
    for root, settings in wanted.items():
        if root.exists():
            ensure_recorded(settings, root)
    missing = {root: settings for root, settings in wanted.items() if not root.exists()}
    workers = workers or usable_cpus()
    at_once = min(len(missing), workers)
    if at_once < 2:
        return [root for root, settings in missing.items() if ensure_recorded(settings, root, workers=workers)]
    context = multiprocessing.get_context("spawn")
    count = context.Value("q", 0)  # of the episodes of all; −1: stop
    with born_deaf():
        pool = ProcessPoolExecutor(at_once, mp_context=context, initializer=_count_in, initargs=(count,))
    names = ", ".join(settings.task for settings in missing.values())
    try:
        with born_deaf():  # submitting is what starts them
            pending = {
                pool.submit(_ensure_recorded_and_counted, settings, root, workers // at_once)
                for root, settings in missing.items()
            }
        episodes = sum(settings.episodes for settings in missing.values())
        with tqdm(total=episodes, desc=f"recording {names}", unit="episode") as bar:
            while pending:
                done, pending = wait(pending, timeout=0.5, return_when=FIRST_EXCEPTION)
                bar.update(count.value - bar.n)
                for each in done:
                    each.result()
    finally:
        count.value = _STOP
        pool.shutdown(wait=True, cancel_futures=True)
    return list(missing)


_STOP = -1
_count: "Synchronized[int] | None" = None


def _count_in(count: "Synchronized[int]") -> None:
    """In a process of `ensure_all_recorded`."""
    global _count
    _count = count
    follow_parent()


def _ensure_recorded_and_counted(settings: RecordSettings, root: Path, workers: int) -> bool:
    return ensure_recorded(settings, root, workers=workers, progress=False)


def _advance() -> None:
    """Raises KeyboardInterrupt when the recordings side by side are to stop."""
    if _count is not None:
        with _count.get_lock():
            if _count.value == _STOP:
                raise KeyboardInterrupt
            _count.value += 1


def ensure_recorded(settings: RecordSettings, root: Path, *, workers: int | None = None, progress: bool = True) -> bool:
    """Record the dataset at `root` unless it is there already; True if it was recorded now.

    Raises:
        ValueError: the dataset at `root` was recorded under other settings, or was changed since.
        FileExistsError: something else than a recording is at `root`.
    """
    root = Path(root)
    with _lock(root):
        if not root.exists():
            _record(settings, root, workers=workers, progress=progress)
            return True
        _check_same(settings, root)
        return False


def record(settings: RecordSettings, root: Path, *, workers: int | None = None, progress: bool = True) -> Path:
    """Record a dataset to the new folder `root` and return it. `workers` defaults to the number of CPUs.

    Raises:
        FileExistsError: `root` exists.
        RuntimeError: the expert fails in more than half of the episodes.
    """
    root = Path(root)
    with _lock(root):
        if root.exists():
            raise FileExistsError(
                f"{root} exists already; remove it, or use ensure_recorded to keep a dataset that fits"
            )
        _record(settings, root, workers=workers, progress=progress)
    return root


def _record(settings: RecordSettings, root: Path, *, workers: int | None, progress: bool) -> None:
    partial = root.with_name(f".{root.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed: we hold the lock
    try:
        _write_dataset(settings, partial, workers=workers, progress=progress)
        recording = {
            "settings": asdict(settings),
            "kuavo_sim": kuavo_sim.__version__,
            "content": content_hash(partial),
            "made_with": {name: importlib.metadata.version(name) for name in ("mujoco", "numpy", "lerobot")},
        }
        (partial / _RECORDING).write_text(json.dumps(recording, indent=2) + "\n")
        _sync(partial)
        partial.rename(root)
        _sync_one(root.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_dataset(settings: RecordSettings, folder: Path, *, workers: int | None, progress: bool) -> None:
    import av
    import datasets
    from lerobot.configs.video import RGBEncoderConfig
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    av.logging.set_libav_level(av.logging.ERROR)  # x264 reports every episode otherwise
    datasets.disable_progress_bars()
    task = REPERTOIRE[settings.task]
    shape = (*height_and_width(settings.image_size), 3)
    picture = {"dtype": "video", "shape": shape, "names": ["height", "width", "channels"]}
    actions = STATE_NAMES + BASE_NAMES if task.mobile else STATE_NAMES
    features = {f"observation.images.{camera}": dict(picture) for camera in CAMERAS}
    if settings.depth:
        features |= {f"observation.{name}": dict(picture) for name in DEPTHS}
    features["observation.state"] = {"dtype": "float32", "shape": (len(STATE_NAMES),), "names": list(STATE_NAMES)}
    features["action"] = {"dtype": "float32", "shape": (len(actions),), "names": list(actions)}
    dataset = LeRobotDataset.create(
        f"kuavo_sim/{settings.task}",
        settings.fps,
        features,
        root=folder,
        robot_type="kuavo",
        # Intra frames of constant quality: what a frame decodes to depends on that frame alone. Anything else lets
        # traces of a cue that is gone linger in the compression, and random access costs more.
        rgb_encoder=RGBEncoderConfig(
            vcodec="h264", pix_fmt="yuv420p", g=1, crf=None, preset="veryfast", extra_options={"qp": 16}
        ),
        streaming_encoding=True,
        encoder_queue_maxsize=task.time_limit + 1,  # a full queue drops frames
        encoder_threads=1,  # what x264 writes depends on its number of threads
        video_backend="pyav",
    )
    dataset.meta.update_chunk_settings(video_files_size_in_mb=_video_megabytes(settings))
    try:
        side_data, sheet = _write_episodes(settings, dataset, workers=workers, progress=progress)
    except BaseException:
        dataset.clear_episode_buffer()  # stops the encoders, which would go on writing into the folder
        raise
    finally:
        dataset.finalize()
    # LeRobot leaves the order of its keys to the interpreter's hash seed; a recording is the same every time.
    statistics = json.loads((folder / _STATISTICS).read_text())
    (folder / _STATISTICS).write_text(json.dumps(statistics, indent=4, sort_keys=True))
    (folder / _EPISODES).write_text("".join(json.dumps(line) + "\n" for line in side_data))
    sheet.save(folder / _SHEET, optimize=True)


def _video_megabytes(settings: RecordSettings) -> int:
    """Of a file at most. LeRobot copies a file for every episode that it appends: some thirty are to share one."""
    height, width = height_and_width(settings.image_size)
    return max(1, height * width // 64**2)


def _write_episodes(
    settings: RecordSettings, dataset: "LeRobotDataset", *, workers: int | None, progress: bool
) -> tuple[list[dict], Image.Image]:
    """Fill `dataset`; what is to be known beside it: side data per episode, and a picture sheet of the first."""
    task = REPERTOIRE[settings.task]
    side_data: list[dict] = []
    bar = tqdm(total=settings.episodes, desc=f"recording {settings.task}", unit="episode", disable=not progress)
    with bar, contextlib.closing(_demonstrations(settings, workers)) as demonstrations:
        for demonstration in demonstrations:
            for t in range(len(demonstration.actions)):
                frame = {f"observation.images.{c}": p[t] for c, p in demonstration.pictures.items()}
                for name, depths in demonstration.depths.items():
                    frame[f"observation.{name}"] = np.repeat(depths[t][..., None], 3, axis=-1)
                frame["observation.state"] = demonstration.states[t]
                frame["action"] = demonstration.actions[t]
                dataset.add_frame({**frame, "task": demonstration.instruction})
            dataset.save_episode()
            if not side_data:
                sheet = contact_sheet(task, demonstration)
            side_data.append({"episode_index": len(side_data), **_side_data(demonstration)})
            bar.update()
            _advance()
    return side_data, sheet


def _side_data(demonstration: Demonstration) -> dict:
    return {
        "seed": demonstration.seed,
        "cue": demonstration.cue,
        "length": len(demonstration.actions),
        "decision_frames": demonstration.decision_frames,
        "subgoal_frames": demonstration.subgoal_frames,
    }


def _demonstrations(settings: RecordSettings, workers: int | None) -> Generator[Demonstration]:
    """The first `settings.episodes` successful demonstrations in the order of their seeds."""
    first = settings.seed * _SEEDS_PER_RECORDING
    done = 0
    with contextlib.closing(_in_seed_order(settings, first, workers or usable_cpus())) as attempts:
        for attempted, demonstration in enumerate(attempts, start=1):
            if demonstration.success:
                yield demonstration
                done += 1
            if done == settings.episodes:
                return
            if attempted >= 10 and done < attempted / 2:
                raise RuntimeError(f"the expert succeeded in only {done} of {attempted} episodes of {settings.task}")


def _in_seed_order(settings: RecordSettings, first: int, workers: int) -> Generator[Demonstration]:
    seeds = range(first, first + _SEEDS_PER_RECORDING)
    if workers == 1:
        yield from (demonstration_of(settings, seed) for seed in seeds)
        return
    # Workers are spawned, not forked: the parent may have threads (torch, video encoders).
    context = multiprocessing.get_context("spawn")
    with born_deaf():  # so is the process that keeps track of what this one and its workers share
        pool = ProcessPoolExecutor(workers, mp_context=context, initializer=follow_parent)
    pending: deque[Future[Demonstration]] = deque()
    try:
        for seed in seeds:
            with born_deaf():  # submitting is what starts them
                pending.append(pool.submit(demonstration_of, settings, seed))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def demonstration_of(settings: RecordSettings, seed: int) -> Demonstration:
    """The episode that a recording under these settings holds of a seed, if the expert succeeds."""
    task = REPERTOIRE[settings.task]
    env = KuavoEnv(
        settings.task,
        image_size=settings.image_size,
        renderer=settings.renderer,
        phase_visible=settings.phase_visible,
        depth=settings.depth,
    )
    try:
        # Cues take turns, so that a small dataset holds as many of one as of the other.
        cue = seed % len(task.cues) if task.cues else None
        return demonstrate(env, seed, cue=cue, action_noise=settings.action_noise)
    finally:
        env.close()


def content_hash(root: Path) -> str:
    """SHA-256 over the names and bytes of a dataset's files, recording.json and the contact sheet left out."""
    digest = hashlib.sha256()
    for path in sorted(p for p in root.rglob("*") if p.is_file() and p.name not in _NOT_CONTENT):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0")
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _check_same(settings: RecordSettings, root: Path) -> None:
    remedy = f"Remove {root} to record it anew, or choose another root."
    try:
        recording = json.loads((root / _RECORDING).read_text())
        recorded, version, content = recording["settings"], recording["kuavo_sim"], recording["content"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FileExistsError(f"{root} holds no recording of kuavo_sim ({error!r}). {remedy}") from error
    for field in fields(settings):
        # A setting that is newer than the recording had its default then.
        found, wanted = recorded.get(field.name, field.default), getattr(settings, field.name)
        if found != (list(wanted) if isinstance(wanted, tuple) else wanted):
            raise ValueError(f"{root} was recorded with {field.name}={found!r}, wanted is {wanted!r}. {remedy}")
    if version != kuavo_sim.__version__:
        raise ValueError(f"{root} was recorded by kuavo_sim {version}, this is {kuavo_sim.__version__}. {remedy}")
    if (found := content_hash(root)) != content:
        raise ValueError(f"{root} was changed since it was recorded: content hash {content}, found {found}. {remedy}")


@contextlib.contextmanager
def _lock(root: Path) -> Iterator[None]:
    """One recorder per dataset at a time; the operating system frees the lock of a process that dies."""
    root.parent.mkdir(parents=True, exist_ok=True)
    with open(root.with_name(f".{root.name}.lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another process records {root}; this one waits for it", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sync(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        _sync_one(path)


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _image_size(text: str) -> ImageSize:
    """64, or 480x640: height and width."""
    if not re.fullmatch(r"\d+(x\d+)?", text):
        raise ValueError("must be a number of pixels, or HEIGHTxWIDTH as in 480x640")
    sides = tuple(int(side) for side in text.split("x"))
    return sides[0] if len(sides) == 1 else sides


def main(words: list[str]) -> int:
    types: Readers = {
        "task": str,
        "episodes": int,
        "root": Path,
        "seed": int,
        "image_size": _image_size,
        "renderer": str,
        "phase_visible": boolean,
        "action_noise": float,
        "depth": boolean,
        "workers": int,
    }
    for number in STOP_SIGNALS - {signal.SIGINT}:
        signal.signal(number, lambda number, _frame: sys.exit(128 + number))
    try:
        arguments: Arguments = {"task": "all", "episodes": 40, "root": Path("outputs/data")}
        arguments |= parse_arguments(words, types, f"{__doc__}\nArguments: {', '.join(f'{key}=…' for key in types)}")
        root, workers, task = arguments.pop("root"), arguments.pop("workers", None), arguments.pop("task")
        if workers is not None and workers < 1:
            raise ValueError(f"workers must be at least 1, got {workers}")
        names = list(TASKS) if task == "all" else [task]
        wanted = {root / name: RecordSettings(task=name, **arguments) for name in names}
        new = ensure_all_recorded(wanted, workers=workers)
        for folder, settings in wanted.items():
            print(f"{folder}: {settings.episodes} episodes, {'recorded' if folder in new else 'there already'}")
    except (ValueError, FileExistsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the dataset in the making was discarded", file=sys.stderr)
        return 130
    return 0


def command() -> NoReturn:
    sys.exit(main(sys.argv[1:]))


if __name__ == "__main__":
    command()
