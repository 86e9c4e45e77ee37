"""What a checkpoint's memory does, in numbers and pictures."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from kuavo_train.command_line import option
from kuavo_train.data.dataset import MixedDataset
from kuavo_train.data.task import Task, open_task
from kuavo_train.errors import require
from kuavo_train.metrics.number_format import number
from kuavo_train.probing.cue_source import CueSource
from kuavo_train.probing.memory_decisions import Question, answer_rounds, attention_at, probe_over_time, trace_of
from kuavo_train.probing.memory_interventions import donors_among, loss_sentences, validate_with
from kuavo_train.probing.memory_record import MemoryReport
from kuavo_train.probing.memory_walk import Draws, MemoryProbe, Walk, seeded_noise
from kuavo_train.probing.sources import cue_source
from kuavo_train.probing.validated_run import validator_of
from kuavo_train.reading import Json
from kuavo_train.runs.files import write_json
from kuavo_train.runs.trained_run import TrainedRun, checkpoint_name, load_policy, stage_folder_above

MEMORY_FIELDS = (
    "num_mem_tokens",
    "mem_at_start",
    "mem_at_end",
    "mem_update",
    "mem_frames",
    "mem_frame_tokens",
    "mem_frame_sampling",
    "mem_backprop_depth",
)
CURVE_EPISODES = 64  # training episodes that the linear probe is fitted on, at most


def find_policy(checkpoint: Path) -> tuple[Path, Path]:
    """(pretrained_model, stage folder) of checkpoints/<step>, best or last, or its pretrained_model.

    Raises:
        ConfigError: it is none of these, or lies outside a stage's folder.
    """
    folder = checkpoint / "pretrained_model" if (checkpoint / "pretrained_model").is_dir() else checkpoint
    is_policy = (folder / "config.json").is_file() and (folder / "model.safetensors").is_file()
    require(is_policy, "checkpoint", "be a folder of a stage's checkpoints, or its pretrained_model", str(checkpoint))
    stage = stage_folder_above(folder)
    require(stage is not None, "checkpoint", "lie in a stage's folder, with its config.yaml above", str(checkpoint))
    assert stage is not None
    return folder, stage


@dataclass(frozen=True)
class Options:
    checkpoint: Path = option("checkpoints/<step>, best or last of a stage, or its pretrained_model")
    task: str = option("name of a task of the run")
    data: Path | None = option("dataset that was never trained on; none: the run's held-out episodes", None)
    episodes: int | None = option("how many of them; none: all", None)
    cue_column: str | None = option("column that says what memory must provide; none: the task's own, or cue", None)
    cue_visible_column: str | None = option("column that is true where the cue shows", None)
    decision_column: str | None = option("column that is true where the cue must be acted on", None)
    output: Path | None = option("folder for the report; none: <stage folder>/memory_<task>", None)

    @property
    def columns(self) -> Json:
        named = {key: getattr(self, key) for key in ("cue_column", "cue_visible_column", "decision_column")}
        return {key: value for key, value in named.items() if value is not None}


def report(options: Options) -> Json:
    """Write the report and return the content of memory.json. Raises `ConfigError`."""
    folder, stage_folder = find_policy(options.checkpoint)
    run = TrainedRun.open(stage_folder.parent)
    known = run.task(options.task, options.columns)
    examined = _examined(run, known, options)
    numbers = examined.held_out_episodes
    run.normalization.check_covers(examined)
    policy, preprocessor = load_policy(folder, torch.device("cpu"))
    dataset = run.dataset([examined, known], policy.config)
    probe = MemoryProbe(policy, dataset, preprocessor)
    source = cue_source(examined, known, run.normalization, policy.config.n_action_steps)
    asked = source.ask(numbers)
    walk = probe.walk([probe.queries_of(0, episode) for episode in numbers])
    at = [_query_of(asked.first_of(episode), walk.episodes[place]) for place, episode in enumerate(numbers)]
    noise = seeded_noise(policy, [[episode, query] for episode, query in zip(numbers, at, strict=True)])
    found = MemoryReport(
        run=run.stored.record.run,
        checkpoint=checkpoint_name(folder),
        stage=next(stage.name for stage in run.stages if stage.folder.name == stage_folder.name),
        task=options.task,
        data=str(examined.root),
        episodes=list(numbers),
        memory={key: getattr(policy.config, key, None) for key in MEMORY_FIELDS},
        cue_columns=examined.cues.columns if examined.cues else (),
        trace=trace_of(walk, 0) if probe.has_memory else None,
        held_out=_held_out(run, probe, examined, source) if probe.has_memory else None,
        decision=answer_rounds(probe, walk, numbers, asked.rounds) if asked.rounds else None,
        decisions_left_out=asked.left_out,
        no_decision=asked.nothing,
        probe=_read_by_probe(run, probe, known, source, walk, numbers) if asked.rounds and probe.has_memory else None,
        attention=attention_at(probe, walk, at, noise),
    ).to_json()
    output = options.output or stage_folder / f"memory_{options.task}"
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "memory.json", found)
    _draw(output, found, asked.first_of(numbers[0]), dataset, walk)
    return found


def _examined(run: TrainedRun, known: Task, options: Options) -> Task:
    """The task with the episodes that are to be looked at as its held-out ones."""
    examined, numbers = known, known.held_out_episodes
    if options.data is not None:
        recipe = replace(run.recipe(options.task), root=str(options.data), episodes=None, **options.columns)
        examined = open_task(recipe, replace(run.settings.data, held_out_episodes=1))
        numbers = tuple(range(len(examined.bounds)))
        other = examined.content_hash != known.content_hash
        require(other, "data", "be another dataset than the run's own", str(options.data))
    count = options.episodes
    if count is not None:
        require(1 <= count <= len(numbers), "episodes", f"be in [1, {len(numbers)}], those there are", count)
        numbers = numbers[:count]
    return replace(examined, held_out_episodes=numbers)


def _query_of(question: Question | None, draws: Draws) -> int:
    """That of the question, or the middle one of the episode."""
    return len(draws) // 2 if question is None else question.query


def _held_out(run: TrainedRun, probe: MemoryProbe, examined: Task, source: CueSource) -> Json:
    """The loss of the episodes with memory on, reset and swapped."""
    alone = replace(probe, dataset=run.dataset([examined], probe.policy.config))
    donors = donors_among([source.cue_of(episode) for episode in examined.held_out_episodes])
    validator = validator_of(run, alone.dataset, alone.preprocessor)
    (effect,) = validate_with(alone, validator, {examined.name: donors})
    return effect.to_json()


def _read_by_probe(
    run: TrainedRun, probe: MemoryProbe, known: Task, source: CueSource, walk: Walk, numbers: Sequence[int]
) -> list[Json]:
    """What a linear classifier reads from the memory, fitted on episodes that were trained on."""
    labels = source.labels(numbers)
    taught = cue_source(known, known, run.normalization, probe.policy.config.n_action_steps)
    fitted = taught.labels(known.train_episodes[:CURVE_EPISODES])
    if not fitted or not labels:
        return []
    fit_walk = probe.walk([probe.queries_of(1, episode) for episode in fitted])
    read_at = walk.select([numbers.index(episode) for episode in labels])
    return probe_over_time(fit_walk, list(fitted.values()), read_at, list(labels.values()))


def _draw(output: Path, found: Json, question: Question | None, dataset: MixedDataset, walk: Walk) -> None:
    from kuavo_train.probing.memory_figures import draw_cue, draw_loss, draw_trace  # matplotlib: slow to import

    if "trace" in found:
        camera = next(iter(dataset.tasks[0].cameras))
        rows = np.array([draw.row for draw in walk.episodes[0]])
        pictures = dataset.images[0](camera, rows).permute(0, 2, 3, 1).numpy()
        draw_trace(output / "memory_trace.png", found, pictures, question)
        draw_loss(output / "memory_loss.png", found)
    if "decision" in found:
        draw_cue(output / "memory_cue.png", found)


def summary(found: Json) -> str:
    """The report in a few lines for a terminal."""
    memory = found["memory"]
    held = f"{memory['num_mem_tokens'] or 0} memory tokens, {memory['mem_frames'] or 0} past frames"
    lines = [f"{found['task']}: {len(found['episodes'])} episodes, {held}"]
    if "held_out" in found:
        losses = found["held_out"]["loss"]
        lines.append("held-out loss: " + ", ".join(f"{name} {number(loss)}" for name, loss in losses.items()))
        lines += [f"  {sentence}" for sentence in loss_sentences(found["held_out"])]
    decision = found.get("decision")
    lines += [found["no_decision"]] if decision is None else _decision_lines(found, decision)
    shares = ", ".join(f"{kind} {share:.3f}" for kind, share in found["attention"].items())
    return "\n".join([*lines, f"attention of the action tokens: {shares}"])


def _decision_lines(found: Json, decision: Json) -> list[str]:
    if decision["chance"] is None:
        known = (
            f"cues from column {found['cue_columns'][0]}; pictures may tell them too, so compare with reset; "
            f"demonstrations are distinguished in {decision['distinguished']}"
        )
    else:
        known = (
            f"chance {decision['chance']:.2f}, observation independent of the cue in "
            f"{decision['identical_observations']}"
        )
    left = found["decisions_left_out"]
    without = f", {left} more that no training episodes can be compared with" if left else ""
    lines = [f"decision: {decision['n']} in {decision['episodes']} episodes{without}, {known}"]
    for name, row in decision["interventions"].items():
        what = "follows the donor" if name == "swapped" else "right"
        lines.append(
            f"  {name:8} {what}: {row['correct']}/{row['n']} = {row['accuracy']:.2f} "
            f"[{row['low']:.2f}, {row['high']:.2f}], action error {row['action_error']:.3f}"
        )
    for name, taken in decision["takes_away"].items():
        low, high = taken["low"], taken["high"]
        if low is not None:
            shown = ": no effect shown" if low <= 0 <= high else ""
            lines.append(
                f"  {name:8} takes away {taken['estimate']:+.2f} [{low:+.2f}, {high:+.2f}] of right ones{shown}"
            )
    return lines
