"""The probes of a trained run by name, and what each writes."""

from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

from kuavo_train.data.policy_traits import remembers
from kuavo_train.errors import RunFolderError
from kuavo_train.probing.cue_source import Asked
from kuavo_train.probing.instruction_swap import swap_instructions
from kuavo_train.probing.memory_decisions import answer_rounds
from kuavo_train.probing.memory_interventions import INTERVENTIONS, donors_among, memory_evidence, validate_with
from kuavo_train.probing.memory_walk import MemoryProbe
from kuavo_train.probing.recovery import recovery
from kuavo_train.probing.sources import cue_source
from kuavo_train.probing.validated_run import NothingToProbe, validator_of
from kuavo_train.reading import Json
from kuavo_train.runs.files import write_json
from kuavo_train.runs.stored_run import StoredStage
from kuavo_train.runs.trained_run import TrainedRun


def instruction_swap(run: TrainedRun) -> Json:
    """The final policy on held-out frames of every task it has learnt, with the instruction of another.

    Raises:
        NothingToProbe: the policy reads no instruction.
    """
    policy = run.settings.policy
    if "tokenizer_max_length" not in policy:
        raise NothingToProbe(f"instruction_swap needs a policy that reads instructions, got {policy['type']}")
    probe = _probe(run, run.stored.finished[-1])
    with run.autocast(), tqdm(desc="instruction swap", unit="query") as bar:
        return {"tasks": swap_instructions(probe, [task.name for task in run.learnt], advance=bar.update)}


def memory(run: TrainedRun) -> Json:
    """Every task after every stage, with the memory on, reset at every query, and of another episode.

    Raises:
        NothingToProbe: the policy has no memory.
    """
    if not remembers(run.settings.policy):
        raise NothingToProbe(f"memory needs policy.num_mem_tokens or mem_frames of at least 1, got 0 in {run.folder}")
    stride = run.settings.policy["n_action_steps"]
    sources = {task.name: cue_source(task, task, run.normalization, stride) for task in run.tasks}
    held_out = {task.name: task.held_out_episodes for task in run.tasks}
    donors = {name: donors_among([sources[name].cue_of(each) for each in held_out[name]]) for name in sources}
    asked = {name: source.ask(held_out[name]) for name, source in sources.items()}
    stages = []
    with run.autocast(), tqdm(run.stored.finished, desc="memory", unit="stage") as bar:
        for stage in bar:
            bar.set_postfix_str(stage.name)
            probe = _probe(run, stage)
            effects = validate_with(probe, validator_of(run, probe.dataset, probe.preprocessor), donors)
            found = [
                {**effect.to_json(), "decision": _decide(probe, place, held_out[effect.task], asked[effect.task])}
                for place, effect in enumerate(effects)
            ]
            stages.append({"stage": stage.index, "name": stage.name, "tasks": found})
    evidence = [{"task": record["task"], "evidence": memory_evidence(record)} for record in found]
    return {"interventions": list(INTERVENTIONS), "stages": stages, "tasks": evidence}


def _decide(probe: MemoryProbe, place: int, episodes: Sequence[int], asked: Asked) -> Json | None:
    """The answers of the policy to what is asked of the task at `place`; None where that is nothing."""
    if not asked.rounds:
        return None
    walk = probe.walk([probe.queries_of(place, episode) for episode in episodes])
    return answer_rounds(probe, walk, episodes, asked.rounds)


def _probe(run: TrainedRun, stage: StoredStage) -> MemoryProbe:
    """The policy that the stage hands on, with the data to probe it on."""
    policy, preprocessor = run.policy(run.checkpoint(stage))
    return MemoryProbe(policy, run.dataset(run.tasks, policy.config), preprocessor)


PROBES: dict[str, Callable[..., Json]] = {
    "recovery": recovery,
    "instruction_swap": instruction_swap,
    "memory": memory,
}


def run_probe(name: str, folder: Path, **settings: int) -> Path:
    """Run a probe and write report/probes/<name>.json; returns its path.

    Args:
        settings: the probe's own, such as `steps` of recovery.

    Raises:
        RunFolderError, ConfigError: the run or what it was trained on cannot be opened, or has nothing to probe.
    """
    run = TrainedRun.open(folder)
    if not run.stored.finished:
        raise RunFolderError(f"{folder} has no finished stage to probe: finish one with resume=true")
    last = run.stored.finished[-1]
    checkpoint = run.checkpoint(last)
    record = {
        "probe": name,
        "run": run.stored.record.run,
        "stage": last.index,
        "checkpoint": f"{last.folder.name}/{last.record.checkpoint}",
        "checkpoint_hash": checkpoint.hash,
        **PROBES[name](run, **settings),
    }
    path = folder / "report" / "probes" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, record)
    return path
