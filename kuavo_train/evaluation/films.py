"""Films of each job by the final policy, for the page of a run: the best and the typical of the episodes it counts.

    make_films(StoredRun.open(folder))      # writes <run>/report/films/

Every film is an episode that the last finished stage rolled out, played again from the actions recorded then and drawn
finer than the policy saw it. One that does not come out as it was counted is left out, and the page says so.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from kuavo_sim import ENVIRONMENT_IDS
from kuavo_sim.repertoire import REPERTOIRE
from kuavo_train.errors import RunError
from kuavo_train.evaluation.environment import Environment
from kuavo_train.evaluation.episodes import Episode
from kuavo_train.evaluation.replays import Kept, Recording, Replay, read_kept
from kuavo_train.evaluation.rollout import roll_out
from kuavo_train.evaluation.videos import Caption, write_video
from kuavo_train.reading import Json
from kuavo_train.reporting.films import FILMS, INLINED_BYTES, films_of, inlined
from kuavo_train.runs.files import read_lines, write_json
from kuavo_train.runs.run_folder import StageFolder
from kuavo_train.runs.stored_run import StoredRun

SIDE = 128  # pixels that pictures are drawn with at least
FINEST, COARSEST = 26, 46  # x264's constant rate factor; 6 more halve the size, roughly


@dataclass(frozen=True)
class _Shot:
    """An episode of `task` to be filmed, `entry` of rollouts.jsonl; `trials` were played with it."""

    task: str
    environment: Environment
    recording: Recording
    fps: float
    entry: Json
    trials: int

    @property
    def name(self) -> str:
        return f"{self.task}, layout {self.recording.seed}"


def ensure_films(run: StoredRun) -> None:
    """As `make_films`, where there are none of the policy yet. What goes wrong is said; the report goes on without."""
    if films_of(run) is not None:
        return
    try:
        make_films(run)
    except (RunError, OSError, ValueError, RuntimeError) as error:
        print(f"no films: {type(error).__name__}: {error}", file=sys.stderr)


def make_films(run: StoredRun, *, workers: int | None = None, progress: bool = True) -> Json:
    """Film the best and the typical episode of each job after the last finished stage, into report/films.

    Args:
        workers: processes that simulate; None for one per CPU.

    Returns:
        The content of films.json, which is written last; nothing, and no file, where nothing was rolled out.

    Raises:
        RunFolderError: a damaged file.
    """
    if not run.finished:
        return {}
    stage = run.finished[-1]
    lines = {line["task"]: line for line in read_lines(stage.folder / "rollouts.jsonl") if line["kind"] == "end"}
    if not lines:
        return {}
    shots, left_out = [], []
    for task in (task.name for task in run.tasks if task.name in lines):
        kept = read_kept(StageFolder(stage.folder).recordings(task))
        if not lines[task]["trials"]:
            left_out.append(f"{task}: no episode could be played")
        elif kept is None:
            left_out.append(f"{task}: what the robot did was not kept: roll it out again with this version")
        else:
            shots += _shots(task, kept, lines[task])
    folder = run.folder / FILMS
    folder.mkdir(parents=True, exist_ok=True)
    for old in (*folder.glob("*.mp4"), *folder.glob("*.png"), folder / "films.json"):
        old.unlink(missing_ok=True)
    films, crf = [], FINEST
    with tqdm(total=len(shots), desc="filming", unit="film", disable=not progress) as bar:
        for task in dict.fromkeys(shot.task for shot in shots):
            of_task = [shot for shot in shots if shot.task == task]
            for shot, episode in zip(of_task, _played_again(of_task, workers), strict=True):
                film = _film(folder, shot, episode, room=INLINED_BYTES // len(shots), crf=crf)
                if isinstance(film, str):
                    left_out.append(f"{shot.name}: {film}")
                else:
                    films.append(film)
                    crf = film["crf"]  # jobs are much alike: what this one needed, the next one needs too
                bar.update()
    about = {"stage": stage.index, "checkpoint_hash": stage.record.checkpoint_hash}
    content = {**about, "films": films, "left_out": left_out}
    write_json(folder / "films.json", content)
    return content


def _shots(task: str, kept: Kept, line: Json) -> list[_Shot]:
    environment = _finer(Environment(**line["environment"]))
    entries = {entry["seed"]: entry for entry in line["episodes"]}
    return [
        _Shot(task, environment, recording, kept.fps, entries[recording.seed], line["trials"])
        for recording in kept.recordings
        if recording.seed in entries
    ]


def _finer(environment: Environment) -> Environment:
    """kuavo_sim draws any size, and what happens does not depend on it; another environment is left as it is."""
    size = environment.settings.get("image_size")
    if size is None or not environment.id.startswith("kuavo_sim:"):
        return environment
    height, width = (size, size) if isinstance(size, int) else size
    factor = max(1.0, SIDE / height)
    return replace(
        environment, settings={**environment.settings, "image_size": [round(height * factor), round(width * factor)]}
    )


def _played_again(shots: Sequence[_Shot], workers: int | None) -> tuple[Episode, ...]:
    """Of one task."""
    recordings = [shot.recording for shot in shots]
    seeds = [recording.seed for recording in recordings]
    return roll_out(
        Replay(recordings), shots[0].environment, seeds, workers=workers, traces=True, progress=False
    ).episodes


def _film(folder: Path, shot: _Shot, episode: Episode, *, room: int, crf: int) -> Json | str:
    """What the page shows of a film, which is written; or why there is none.

    Args:
        room: bytes that it may take in the page.
        crf: where to begin; a film that is too large is written again, coarser.
    """
    if episode.error is not None:
        return f"played again, its environment failed: {episode.error}"
    outcome = episode.to_json()
    if other := [key for key in ("success", "steps", "subgoals", "choice") if outcome[key] != shot.entry[key]]:
        return f"played again it did not come out as it was counted ({', '.join(other)} differ), so it is not shown"
    assert episode.trace is not None
    instruction = episode.trace.instruction or shot.environment.task
    title, cues = shot.task.replace("_", " "), cues_in(shot.environment)
    caption = Caption(title, instruction, shot.fps, f"{shot.recording.rank} of {shot.trials}", cues)
    name = f"{shot.task}-{shot.recording.rank}.mp4"
    path = write_video(folder / name, episode, caption, crf=crf)
    while inlined(path) > room:
        if crf == COARSEST:
            return f"its film takes {inlined(path)} bytes at the lowest quality, more than the {room} there are for it"
        crf = min(COARSEST, crf + 1 + math.ceil(6 * math.log2(inlined(path) / room)))
        path = write_video(folder / name, episode, caption, crf=crf)
    return {
        "task": shot.task,
        "rank": shot.recording.rank,
        "seed": shot.recording.seed,
        **{key: shot.entry[key] for key in ("success", "steps", "progress")},
        "trials": shot.trials,
        "instruction": instruction,
        "file": name,
        "bytes": path.stat().st_size,
        "crf": crf,
    }


def cues_in(environment: Environment) -> Sequence[str]:
    """Names of the task's cues, by number; none of an environment that is not kuavo_sim's."""
    simulated: Mapping[str, str] = {f"kuavo_sim:{id}": name for name, id in ENVIRONMENT_IDS.items()}
    name = simulated.get(environment.id)
    return () if name is None else REPERTOIRE[name].cues
