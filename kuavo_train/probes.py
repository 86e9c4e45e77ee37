"""Questions to a trained run that its losses do not answer: three probes, each a section of its report.

    python -m kuavo_train.probes run=outputs/<run>                         # all three; no run: the one modified last
    python -m kuavo_train.probes run=outputs/<run> probe=recovery steps=50 # is what was forgotten lost, or suppressed?
    python -m kuavo_train.probes run=outputs/<run> probe=instruction_swap  # does it listen to language?
    python -m kuavo_train.probes run=outputs/<run> probe=memory            # what is the memory worth, stage by stage?

Writes outputs/<run>/report/probes/<probe>.json and the report anew. The same run gives the same numbers again: noise
and order of samples are functions of the run's seed.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tqdm import tqdm

from kuavo_train.command_line import key_values
from kuavo_train.data.dataset import MixedDataset
from kuavo_train.data.task import Task
from kuavo_train.errors import ConfigError, RunFolderError, one_of, require
from kuavo_train.evaluation.cues import cues_of, has_cues, question_of
from kuavo_train.evaluation.instruction_probe import swap_instructions
from kuavo_train.evaluation.memory_matrix import INTERVENTIONS, donors_among, memory_evidence, validate_with
from kuavo_train.evaluation.memory_probe import MemoryProbe
from kuavo_train.evaluation.memory_questions import Question, answer_questions
from kuavo_train.evaluation.recovery import recovery_record
from kuavo_train.evaluation.stored_run import StoredStage, newest_run
from kuavo_train.evaluation.validation import Validator
from kuavo_train.findings import Findings
from kuavo_train.interruption import main_ends_on_signals
from kuavo_train.learning.checkpoint import Checkpoint
from kuavo_train.learning.ema import NoAverage
from kuavo_train.learning.extra_loss import NoExtraLoss
from kuavo_train.learning.policy_factory import build_optimizer
from kuavo_train.learning.timetable import Timetable
from kuavo_train.learning.trainer import Progress, Trainer, Validated
from kuavo_train.metrics.intervals import Scores
from kuavo_train.metrics.verdict import RetentionLimits
from kuavo_train.opened_stage import fresh_memory, open_stage
from kuavo_train.report import OUTPUTS
from kuavo_train.reporting.run_analysis import stored_limits
from kuavo_train.reporting.run_metrics import end_line, episode_scores
from kuavo_train.reporting.write_report import write_report
from kuavo_train.run_folder import write_json
from kuavo_train.trained_run import TrainedRun

CURVE_POINTS = 10  # validations while an old task is learnt again, beside the one before
Record = dict[str, Any]


class NothingToProbe(ConfigError):
    """The run has nothing that the probe could ask about."""


def recovery(run: TrainedRun, *, steps: int = 100) -> Record:
    """Each earlier task's stage in a few steps, alone: from the final policy, and from before the task was learnt.

    Raises:
        NothingToProbe: no task was learnt before the last stage.
    """
    last, learnt_in = run.stored.finished[-1], run.stored.learnt_in()
    earlier = [task for task in run.learnt if learnt_in[task.name] < last.index]
    if not earlier:
        raise NothingToProbe(f"recovery needs a task learnt before the last stage, got none in {run.folder}")
    require(steps >= 1, "steps", "be at least 1", steps)
    limits = stored_limits(run.folder) or RetentionLimits()
    found = []
    for task in earlier:
        own = next(stage for stage in run.stages if stage.index == learnt_in[task.name])
        place = run.stages.index(own)
        previous = run.stages[place - 1] if place else None
        line = end_line(run.stored, own.index, task.name)
        assert line is not None  # read_run has seen to it
        found.append(
            recovery_record(
                task.name,
                learnt=episode_scores(line, "loss"),
                final=_relearn(run, own, task, run.checkpoint(last), steps),
                before=_relearn(run, own, task, run.checkpoint(previous) if previous else None, steps),
                before_is=f"the weights after stage {previous.index}" if previous else "the weights before training",
                limits=limits,
            )
        )
    return {"steps": steps, "tasks": found}


def _relearn(
    run: TrainedRun, own: StoredStage, task: Task, start: Checkpoint | None, steps: int
) -> list[tuple[int, Scores]]:
    """Held-out losses of the task while its own stage is run once more from `start`, in `steps` steps.

    The schedule of the learning rate is shortened to these steps: in the stage's own, a few steps would be its warm-up
    alone. All other tasks are left out; frozen groups and order of samples are the stage's. Nothing is written.
    """
    every = max(1, steps // CURVE_POINTS)
    recipe = run.config(own)
    training = replace(recipe.training, log_every=steps, save_every=steps)
    alone = replace(
        recipe, strategy="sequential", mixture="own_task", ewc=None, merge=None, tracking="off", training=training
    )
    accelerator = Accelerator(mixed_precision=training.mixed_precision, cpu=run.device.type == "cpu")
    findings = Findings()
    stage = open_stage(alone, run.curriculum, start, accelerator, findings)
    findings.raise_problems()
    assert stage is not None
    optimizer, scheduler = build_optimizer(stage.built.policy.parameters(), training, steps=steps)
    policy, optimizer = accelerator.prepare(stage.built.policy, optimizer)
    dataset = run.dataset(stage.order.tasks, stage.built.policy.config)
    validator = Validator(**_validation(run, dataset, stage.built.preprocessor))
    curve: list[tuple[int, Scores]] = []

    def validate(step: int, _epoch: int = 0) -> Validated:
        (record,) = validator.validate_all_tasks(accelerator.unwrap_model(policy), [task.name])
        curve.append((step, episode_scores(record, "loss")))
        return Validated(record["loss"])

    validate(0)
    trainer = Trainer(
        accelerator=accelerator,
        policy=policy,
        preprocessor=stage.built.preprocessor,
        optimizer=optimizer,
        scheduler=scheduler,
        dataset=dataset,
        order=stage.order,
        recurrence=fresh_memory(stage.order, stage.built.policy),
        extra_loss=NoExtraLoss(),
        average=NoAverage(),
        config=training,
        timetable=Timetable(epochs=-(-steps // every), steps_per_epoch=every, max_steps=steps),
        current=task.name,
        validate_every=1,
        result="last",
        num_workers=0,
        log=lambda values, step: None,
        validate=validate,
        save=lambda progress: None,
        stop_signal=lambda: None,
        description=f"{task.name} from {start.folder.parent.parent.name if start else 'the beginning'}",
    )
    trainer.run(Progress())
    return curve


def instruction_swap(run: TrainedRun) -> Record:
    """The final policy on held-out frames of every task it has learnt, told to do another of them.

    Raises:
        NothingToProbe: the policy reads no instruction.
    """
    policy = run.settings.policy
    if "tokenizer_max_length" not in policy:
        raise NothingToProbe(f"instruction_swap needs a policy that reads instructions, got {policy['type']}")
    probe = _probe(run, run.stored.finished[-1])
    with run.autocast(), tqdm(desc="instruction swap", unit="query") as bar:
        return {"tasks": swap_instructions(probe, [task.name for task in run.learnt], advance=bar.update)}


def memory(run: TrainedRun) -> Record:
    """Every task after every stage, with the memory on, reset at every query, and of another episode.

    Raises:
        NothingToProbe: the policy has no memory.
    """
    if not run.settings.policy.get("num_mem_tokens", 0):
        raise NothingToProbe(f"memory needs policy.num_mem_tokens of at least 1, got 0 in {run.folder}")
    cues = {task.name: cues_of(task) for task in run.tasks}
    donors = {
        task.name: donors_among([cues[task.name].get(e, {}).get("cue") for e in task.held_out_episodes])
        for task in run.tasks
    }
    questions = {task.name: _questions(run, task, cues[task.name]) for task in run.tasks if has_cues(task)}
    stages = []
    with run.autocast(), tqdm(run.stored.finished, desc="memory", unit="stage") as bar:
        for stage in bar:
            bar.set_postfix_str(stage.name)
            probe = _probe(run, stage)
            found = validate_with(probe, _validation(run, probe.dataset, probe.preprocessor), donors)
            for place, record in enumerate(found):
                asked = questions.get(record["task"])
                record["decision"] = _decide(probe, place, asked) if asked else None
            stages.append({"stage": stage.index, "name": stage.name, "tasks": found})
    evidence = [{"task": record["task"], "evidence": memory_evidence(record)} for record in stages[-1]["tasks"]]
    return {"interventions": list(INTERVENTIONS), "stages": stages, "tasks": evidence}


def _questions(run: TrainedRun, task: Task, cues: Mapping[int, Record]) -> list[Question]:
    stride = run.settings.policy["n_action_steps"]
    with tqdm(task.held_out_episodes, desc=f"cues of {task.name}", unit="episode", leave=False) as bar:
        return [question_of(task, run.normalization, dict(cues), episode, stride) for episode in bar]


def _decide(probe: MemoryProbe, place: int, questions: Sequence[Question]) -> Record:
    walk = probe.walk([probe.queries_of(place, question.episode) for question in questions])
    return answer_questions(probe, walk, questions)


def _probe(run: TrainedRun, stage: StoredStage) -> MemoryProbe:
    """The policy that the stage hands on, with the data to ask it about."""
    policy, preprocessor = run.policy(run.checkpoint(stage))
    return MemoryProbe(policy, run.dataset(run.tasks, policy.config), preprocessor)


def _validation(run: TrainedRun, dataset: MixedDataset, preprocessor: Any) -> Record:
    """The fields of a `Validator` that asks as every validation of the run did."""
    settings = run.settings.validation
    return {
        "dataset": dataset,
        "normalization": run.normalization,
        "preprocessor": preprocessor,
        "draws": settings.draws,
        "batch_size": settings.batch_size,
        "autocast": run.autocast,
    }


PROBES: dict[str, Callable[..., Record]] = {
    "recovery": recovery,
    "instruction_swap": instruction_swap,
    "memory": memory,
}


def run_probe(name: str, folder: Path, **settings: Any) -> Path:
    """Run a probe and write report/probes/<name>.json; returns its path.

    Args:
        settings: the probe's own, such as `steps` of recovery.

    Raises:
        RunFolderError, ConfigError: the run or what it was trained on cannot be opened, or has nothing to ask.
    """
    run = TrainedRun.open(folder)
    if not run.stored.finished:
        raise RunFolderError(f"{folder} has no finished stage to probe: finish one with resume=true")
    last = run.stored.finished[-1]
    checkpoint = run.checkpoint(last)
    record = {
        "probe": name,
        "run": run.stored.record["run"],
        "stage": last.index,
        "checkpoint": f"{last.folder.name}/{last.record['checkpoint']}",
        "checkpoint_hash": checkpoint.hash,
        **PROBES[name](run, **settings),
    }
    path = folder / "report" / "probes" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, record)
    return path


def main(words: Sequence[str]) -> int:
    """Command line: key=value arguments; 0, or 2 with the error on stderr."""
    if {"-h", "--help", "help"} & set(words):
        print(__doc__)
        return 0
    try:
        given = key_values(words, ("run", "probe", "steps"))
        folder = Path(given["run"]) if "run" in given else newest_run(OUTPUTS)
        one_of("probe", given.get("probe", "recovery"), PROBES)
        names = [given["probe"]] if "probe" in given else list(PROBES)
        settings = {"recovery": {"steps": _whole("steps", given["steps"])} if "steps" in given else {}}
        require("steps" not in given or "recovery" in names, "steps", "go with probe=recovery", given.get("steps"))
        for name in names:
            try:
                print(f"{name}: {run_probe(name, folder, **settings.get(name, {}))}")
            except NothingToProbe as nothing:
                if "probe" in given:
                    raise
                print(f"{name}: left out: {nothing}")
        print(f"report: {write_report(folder)}")
    except (ConfigError, RunFolderError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _whole(key: str, text: str) -> int:
    require(text.isdigit(), key, "be a whole number", text)
    return int(text)


if __name__ == "__main__":
    main_ends_on_signals(main)
