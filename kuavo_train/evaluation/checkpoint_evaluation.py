"""Checkpoints play the same layouts: what `python -m kuavo_train.evaluate` does once its arguments are read.

A row is one variant of a checkpoint: as it is, at another horizon, or without something it has.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from kuavo_train.data.checkpoint_tasks import KnownTasks
from kuavo_train.data.images.frames import DecodedFrames
from kuavo_train.data.task import Task
from kuavo_train.errors import ConfigError, require
from kuavo_train.evaluation.checkpoints import Contestant, Row, rows_of
from kuavo_train.evaluation.environment import Environment, evaluation_seeds
from kuavo_train.evaluation.episodes import Episode, Rollouts, picked
from kuavo_train.evaluation.films import cues_in
from kuavo_train.evaluation.latency import PeakMemory, time_queries
from kuavo_train.evaluation.open_loop import Errors, judge_errors, walk
from kuavo_train.evaluation.options import Options
from kuavo_train.evaluation.paired_comparison import differ, judge
from kuavo_train.evaluation.robot_policy import Policy
from kuavo_train.evaluation.rollout import roll_out
from kuavo_train.evaluation.videos import Caption, write_video
from kuavo_train.reading import Json
from kuavo_train.reporting.html_page import write_page
from kuavo_train.runs.files import now, write_json

Played = tuple[str, int]  # task and seed of an episode
EPISODES = 50  # per task in simulation, unless said otherwise
VIDEO_BACKEND = "pyav"  # reads every dataset; speed does not matter here


def evaluate(options: Options) -> Json:
    """Let all checkpoints play, or walk demonstrations, and return the content of the JSON; writes videos beside it.

    Raises:
        ConfigError, RunFolderError: a checkpoint, a task, an environment or data that is not there.
    """
    contestants = [Contestant.open(name, path) for name, path in options.checkpoints.items()]
    tasks = options.tasks or _learnt_by_all(contestants)
    for contestant in contestants:
        rule = f"be at most {contestant.planned}, what {contestant.name} plans"
        longest = max(options.n_action_steps, default=1)
        require(longest <= contestant.planned, "n_action_steps", rule, longest)
    about = {
        "created": now(),
        "mode": "simulation" if options.data is None else "demonstrations",
        "reference": contestants[0].name,
        "tasks": list(tasks),
        "checkpoints": [_about(contestant) for contestant in contestants],
    }
    return {**about, **(_in_simulation if options.data is None else _on_demonstrations)(contestants, tasks, options)}


def _on_demonstrations(contestants: Sequence[Contestant], tasks: Sequence[str], options: Options) -> Json:
    assert options.data is not None
    opened = {(c.name, task): c.demonstrations(task, options.data) for c in contestants for task in tasks}
    episodes = {task: _unseen_by_all(contestants, [opened[c.name, task] for c in contestants]) for task in tasks}
    walked: dict[str, dict[str, dict[int, Errors]]] = {}
    rows: list[Json] = []
    for contestant in contestants:
        policy = contestant.policy(options)
        for row in rows_of(contestant.name, policy, options, contestants[0].name):
            evaluated, walked[row.name], of_tasks = row.of(policy), {}, []
            for name in tasks:
                task = opened[contestant.name, name]
                frames = DecodedFrames(task, image_size=None, video_backend=VIDEO_BACKEND)
                chosen = episodes[name][: options.n_episodes]
                try:
                    errors = walk(evaluated, task, chosen, frames, parallel=options.parallel)
                except ValueError as error:  # what the policy is shown does not fit it
                    raise ConfigError(f"{row.name} on {name}: {error}") from error
                walked[row.name][name] = errors
                reference = None if row.against is None else walked[row.against][name]
                of_tasks.append({"task": name, **judge_errors(errors, task.action_names, reference)})
            rows.append({**row.record(), "tasks": of_tasks})
    return {"data": str(options.data), "rows": rows}


def _unseen_by_all(contestants: Sequence[Contestant], opened: Sequence[Task]) -> list[int]:
    """Episodes of one dataset on which no checkpoint was trained, so that all get the same."""
    unseen = set.intersection(*(c.unseen(task) for c, task in zip(contestants, opened, strict=True)))
    require(bool(unseen), f"data of {opened[0].name}", "hold episodes that no checkpoint was trained on", "none")
    return sorted(unseen)


def _in_simulation(contestants: Sequence[Contestant], tasks: Sequence[str], options: Options) -> Json:
    places = {(c.name, task): c.environment(task, options) for c in contestants for task in tasks}
    seeds = evaluation_seeds(options.n_episodes or EPISODES, seed=options.seed)
    played: dict[str, dict[Played, Episode]] = {}
    rows: list[Json] = []
    for contestant in contestants:
        policy = contestant.policy(options)
        for row in rows_of(contestant.name, policy, options, contestants[0].name):
            evaluated, memory = row.driving(policy), PeakMemory()
            environments = {task: places[contestant.name, task] for task in tasks}
            rollouts, videos = _play(evaluated, environments, seeds, row, options, contestant.known)
            # With a hand-over a query is answered in another tick than it is made in; it costs what it costs without.
            cost = None if row.handover else time_queries(evaluated, environments[tasks[0]], seeds[0])
            played[row.name] = {(t, e.seed): e for t, rolled in rollouts.items() for e in rolled.episodes}
            reference = None if row.against is None else played[row.against]
            closed_loop = _summary_of(rollouts, played[row.name], reference)
            rows.append({**row.record(), **closed_loop, "videos": videos, "cost": cost, **memory.record()})
    return {"episodes": len(seeds), "seeds": [seeds[0], seeds[-1]], "rows": rows}


def _learnt_by_all(contestants: Sequence[Contestant]) -> tuple[str, ...]:
    first, *others = ([task.name for task in contestant.known.tasks] for contestant in contestants)
    common = tuple(name for name in first if all(name in other for other in others))
    require(bool(common), "tasks", "be learnt by all checkpoints", [first, *others])
    return common


def _play(
    policy: Policy,
    environments: Mapping[str, Environment],
    seeds: Sequence[int],
    row: Row,
    options: Options,
    known: KnownTasks,
) -> tuple[dict[str, Rollouts], dict[str, list[Json]]]:
    """Task → episodes, and task → videos of them; only a checkpoint as it is gets any."""
    found, videos = {}, {}
    filmed = options.videos > 0 and row.whole
    names = {task.name: task.action_names for task in known.tasks}
    for task, environment in environments.items():
        print(f"{row.name}: {task}", file=sys.stderr)
        try:
            rollouts = roll_out(
                policy,
                environment,
                seeds,
                parallel=options.parallel,
                workers=options.workers,
                names=names[task],
                traces=filmed,
            )
        except ValueError as error:  # an observation or instruction does not fit the policy
            raise ConfigError(f"{row.name} on {task} in {environment.name}: {error}") from error
        if rollouts.failures:
            print(rollouts.summary, file=sys.stderr)
        videos[task] = _film(rollouts, task, row, options, fps=known.fps) if filmed else []
        found[task] = rollouts.without_traces()
    return found, videos


def _film(rollouts: Rollouts, task: str, row: Row, options: Options, *, fps: float) -> list[Json]:
    """Videos below the folder named like the JSON, and what they show, at the rate the policy was trained at."""
    films = []
    for rank, episode in picked(rollouts.played, options.videos):
        caption = Caption(
            title=f"{row.name}, {task}",
            instruction=rollouts.environment.task,
            fps=fps,
            rank=f"{rank} of {rollouts.trials}",
            cues=cues_in(rollouts.environment),
        )
        name = f"{row.name}-{task}-{rank.replace(' ', '-')}.mp4"
        path = write_video(options.output.with_suffix("") / "videos" / name, episode, caption)
        film = {"rank": rank, "file": path.relative_to(options.output.parent).as_posix()}
        films.append({**film, "seed": episode.seed, "success": episode.success, "steps": episode.steps})
    return films


def _summary_of(
    rollouts: Mapping[str, Rollouts], episodes: Mapping[Played, Episode], reference: Mapping[Played, Episode] | None
) -> Json:
    """The numbers of a row: task by task, and over all of them."""
    tasks = []
    for name, rolled in rollouts.items():
        mine = {key: episode for key, episode in episodes.items() if key[0] == name}
        tasks.append(
            {
                "task": name,
                "environment": asdict(rolled.environment),
                **judge(mine),
                "difference": None if reference is None else differ(mine, reference),
                "episodes": [episode.to_json() for episode in rolled.episodes],
            }
        )
    difference = None if reference is None else differ(episodes, reference)
    return {"tasks": tasks, "all": {"task": "all", **judge(episodes), "difference": difference}}


def _about(contestant: Contestant) -> Json:
    return {
        "name": contestant.name,
        "folder": str(contestant.folder),
        "learnt": [task.name for task in contestant.known.tasks],
        "run": None if contestant.run is None else contestant.run.folder.name,
    }


def write_evaluation(options: Options) -> Json:
    """Evaluate, write the JSON and the page, and return what the JSON holds. Errors as `evaluate`."""
    from kuavo_train.reporting.figures.evaluation import demonstration_figures, evaluation_figures
    from kuavo_train.reporting.figures.style import save_figures

    found = evaluate(options)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.output, found)
    drawings, template = (
        (evaluation_figures, "evaluation.html.jinja")
        if options.data is None
        else (demonstration_figures, "demonstrations.html.jinja")
    )
    figures = save_figures(options.output.with_suffix(""), drawings(found))
    write_page(options.output.with_suffix(".html"), template, found, figures)
    return found
