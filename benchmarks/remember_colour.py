"""Remember the colour: shown in the first query, needed at the last, nothing but memory in between.

    python -m benchmarks.remember_colour                                     # the default memory, and the twin without
    python -m benchmarks.remember_colour depth=0,1,2,4,8 seed=0,1,2          # every combination of the values given
    python -m benchmarks.remember_colour layout=start,both,end update=overwrite,gated

An episode is a picture of one of four colours, `delay` grey pictures, and a white one at which the action must be
that of the colour (one of four corners of a square); before, it is 0. One frame is one query. Pictures carry noise
that belongs to the layout, not to the colour: at the decision the four episodes of a layout are identical, the
denoising noise included, so that without memory exactly one of the four can be right.

Trained with delays of 1 and 2 queries at first, then of 1 to 10; evaluated on held-out layouts, delays of 1 to 10 and
of 11 to 20. All of it goes through the project's own order of clips, carried memory, policy and trainer.
"""

import itertools
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from lerobot.policies.factory import make_pre_post_processors
from lerobot.utils.constants import ACTION, OBS_STATE

from benchmarks.models import LAYOUTS, features
from kuavo_train.config import TrainingConfig
from kuavo_train.data.clip_sampler import ClipOrder
from kuavo_train.data.dataset import MixedDataset
from kuavo_train.data.normalization import Normalization
from kuavo_train.data.recordings.instructions import Instructions
from kuavo_train.data.sampler import Order, SampleOrder
from kuavo_train.data.task import Task
from kuavo_train.metrics.intervals import wilson
from kuavo_train.probing.linear_probe import linear_probe, nearest
from kuavo_train.probing.memory_walk import MemoryProbe, seeded_noise
from kuavo_train.runs.files import write_json
from kuavo_train.training.carried_memory import CarriedMemory, NoRecurrence, Recurrence
from kuavo_train.training.epochs import Timetable
from kuavo_train.training.learner import Learner
from kuavo_train.training.parameter_groups import freeze
from kuavo_train.training.trainer import Batches, Decision, Limits, Progress, Trainer, TrainerHooks
from lerobot_policy_smolvla_memory import SmolVLAMemoryConfig, SmolVLAMemoryPolicy
from lerobot_policy_smolvla_memory.tiny_vlm import make_tiny_vlm

CAMERA = "observation.images.camera"
INSTRUCTION = "remember the colour"
SIZE = 32  # pixels
GREY, WHITE = (110, 110, 110), (250, 250, 250)
COLOURS = ((210, 40, 40), (40, 180, 60), (50, 70, 220), (220, 200, 40))
TARGETS = np.array([[1, 1], [1, -1], [-1, -1], [-1, 1]], dtype=np.float32)  # action of each colour
PICTURE_NOISE = 12  # of 255, standard deviation
SHORT_DELAY = 2  # queries
EVALUATE_EVERY = 25  # steps
FROZEN = ["vision", "connector", "vlm_text"]


@dataclass(frozen=True)
class Settings:
    """One run. `depth` 0 is the classic recipe, `tokens` 0 the twin without memory.

    twin_steps: of training without memory, before it is switched on and the run begins.
    stop_at: training ends once this share of the held-out decisions is right, evaluated every `EVALUATE_EVERY` steps.
    frozen_vlm: the (random) vision-language model learns nothing, as in later stages; else all of it learns.
    """

    tokens: int = 4
    depth: int = 8
    layout: str = "end"
    update: str = "gated"
    twin_steps: int = 0
    weight: float = 1.0  # mem_weight, of a memory that joins a twin
    growth: float = 1.05  # mem_growth, of that memory
    stop_at: float | None = None
    steps: int = 1500
    short_steps: int = 600  # of them, the first with delays of 1 and 2 only
    seed: int = 0
    frozen_vlm: bool = False
    batch_size: int = 64  # queries per step, whatever the depth
    lr: float = 1e-3
    longest_delay: int = 10  # in training
    training_layouts: int = 4
    held_out_layouts: int = 4
    hidden: int = 64
    layers: int = 4

    def __post_init__(self) -> None:
        rules = (
            ("layout", self.layout in LAYOUTS, f"be one of {', '.join(LAYOUTS)}"),
            ("update", self.update in ("overwrite", "gated"), "be overwrite or gated"),
            ("tokens", self.tokens >= 0, "not be negative"),
            ("depth", self.depth >= 0, "not be negative"),
            ("steps", self.steps >= 1, "be at least 1"),
            ("short_steps", 0 <= self.short_steps < self.steps, f"be in [0, steps = {self.steps})"),
            ("longest_delay", self.longest_delay >= 1, "be at least 1 query"),
        )
        for key, holds, rule in rules:
            if not holds:
                raise ValueError(f"{key} must {rule}, got {getattr(self, key)!r}")


@dataclass(frozen=True)
class ColourTask:
    """Episodes in memory, as the project's own `Task`, and their pictures."""

    task: Task
    pictures: torch.Tensor  # [N, 3, SIZE, SIZE] uint8
    colours: tuple[int, ...]  # of each episode
    delays: tuple[int, ...]
    layouts: tuple[int, ...]

    def frames(self, camera: str, rows: np.ndarray) -> torch.Tensor:
        return self.pictures[torch.from_numpy(np.asarray(rows))]

    def dataset(self) -> MixedDataset:
        return MixedDataset([self.task], [self.frames], normalization(), actions=range(1))


def colour_task(delays: Sequence[int], layouts: Sequence[int]) -> ColourTask:
    """Every layout with every delay in all four colours."""
    about = [(layout, delay, colour) for layout in layouts for delay in delays for colour in range(len(COLOURS))]
    pictures, actions, bounds = [], [], [0]
    for layout, delay, colour in about:
        random = np.random.default_rng([layout, delay])
        for shown in (COLOURS[colour], *[GREY] * delay, WHITE):
            noise = random.normal(0, PICTURE_NOISE, (3, SIZE, SIZE))
            pictures.append(np.clip(np.reshape(shown, (3, 1, 1)) + noise, 0, 255).astype(np.uint8))
        actions += [np.zeros(2, np.float32)] * (delay + 1) + [TARGETS[colour]]
        bounds.append(len(actions))
    lengths = np.diff(bounds)
    nowhere: Any = None  # there is no dataset on disk
    task = Task(
        name="remember_colour",
        index=1,
        instructions=Instructions.always(INSTRUCTION, len(actions)),
        recording=nowhere,
        state_names=("state",),
        action_names=("x", "y"),
        state=np.zeros((len(actions), 1), np.float32),
        action=np.stack(actions),
        episode=np.repeat(np.arange(len(about)), lengths),
        frame=np.concatenate([np.arange(length) for length in lengths]),
        bounds=np.stack([bounds[:-1], bounds[1:]], axis=1),
        train_episodes=tuple(range(len(about))),
        held_out_episodes=(),
        cameras={CAMERA: CAMERA},
    )
    layout_of, delay_of, colour_of = zip(*about, strict=True)
    return ColourTask(task, torch.from_numpy(np.stack(pictures)), colour_of, delay_of, layout_of)


def normalization() -> Normalization:
    """Actions and state are at unit scale already."""

    def unit(names: list[str]) -> dict[str, list[Any]]:
        n = len(names)
        return {"names": names, "mean": [0.0] * n, "std": [1.0] * n, "min": [-1.0] * n, "max": [1.0] * n, "count": [1]}

    return Normalization("joint", {OBS_STATE: unit(["state"]), ACTION: unit(["x", "y"])})


def build(settings: Settings, folder: Path) -> tuple[SmolVLAMemoryPolicy, Any]:
    """The policy with seeded new weights, or those of its twin, and its preprocessor. `folder` keeps both."""
    vlm = make_tiny_vlm(
        folder / f"vlm_{settings.hidden}_{settings.layers}_{settings.seed}",
        text_hidden=settings.hidden,
        text_layers=settings.layers,
        head_dim=16,
        vision_hidden=settings.hidden,
        vision_layers=1,
        image_size=SIZE,
        patch_size=16,
        seed=settings.seed,
        corpus=[INSTRUCTION],
    )
    at_start, at_end = LAYOUTS[settings.layout]
    torch.manual_seed(settings.seed)
    config = SmolVLAMemoryConfig(
        vlm_model_name=str(vlm),
        load_vlm_weights=True,
        device="cpu",
        **features([CAMERA], image=SIZE, state=1, actions=2),
        resize_imgs_with_padding=(SIZE, SIZE),
        tokenizer_max_length=8,
        chunk_size=1,
        n_action_steps=1,
        max_state_dim=4,
        max_action_dim=4,
        num_vlm_layers=settings.layers,
        freeze_vision_encoder=settings.frozen_vlm,
        train_expert_only=settings.frozen_vlm,
        num_mem_tokens=settings.tokens,
        mem_at_start=at_start,
        mem_at_end=at_end,
        mem_update=settings.update,
        mem_backprop_depth=settings.depth,
        mem_growth=settings.growth,
    )
    policy = SmolVLAMemoryPolicy(config)
    if settings.twin_steps:
        policy.load_state_dict(_twin(settings, folder), strict=False)  # all but the memory
        if policy.model.memory is not None:
            policy.model.memory.weigh_as(settings.weight / (at_start + at_end))
    freeze(policy, FROZEN if settings.frozen_vlm else [])
    preprocessor, _ = make_pre_post_processors(config, dataset_stats=normalization().for_lerobot())
    return policy, preprocessor


def _twin(settings: Settings, folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a policy of these settings, trained without memory: now, unless `folder` has them."""
    path = folder / f"twin_{settings.hidden}_{settings.layers}_{settings.seed}_{settings.twin_steps}.pt"
    if not path.exists():
        steps = settings.twin_steps
        twin = replace(settings, tokens=0, steps=steps, short_steps=0, twin_steps=0, stop_at=None)
        torch.save(train(twin, folder)[0].state_dict(), path)
    return torch.load(path)


def train(settings: Settings, folder: Path) -> tuple[SmolVLAMemoryPolicy, Any, float, int]:
    """Policy, preprocessor, and the CPU seconds and steps that training took."""
    policy, preprocessor = build(settings, folder)
    training = TrainingConfig(
        epochs=1,
        lr=settings.lr,
        warmup_steps=min(50, settings.steps // 4),
        decay_steps=settings.steps,
        batch_size=settings.batch_size,
        decay_lr=settings.lr / 20,
        log_every=settings.steps,
        save_every=settings.steps,
    )
    learner = Learner.of(policy, preprocessor, training, accelerator=Accelerator(cpu=True), steps=settings.steps)
    progress = Progress()

    class Evaluated(TrainerHooks):
        def __init__(self, delays: Sequence[int]):
            self.delays = delays

        def epoch_done(self, step: int, epoch: int) -> Decision:
            if settings.stop_at is None:
                return Decision(loss=0.0)
            found = decide(settings, policy, preprocessor, self.delays)
            return Decision(loss=0.0, stop="learnt" if found["on"] >= settings.stop_at * found["n"] else None)

    every = settings.steps if settings.stop_at is None else EVALUATE_EVERY
    began = time.process_time()
    for longest, until in ((SHORT_DELAY, settings.short_steps), (settings.longest_delay, settings.steps)):
        delays = range(1, min(longest, settings.longest_delay) + 1)
        data = colour_task(delays, range(settings.training_layouts))
        order, learner.recurrence = _order(settings, data.task, policy)
        timetable = Timetable(epochs=settings.steps // every + 1, steps_per_epoch=every, max_steps=until)
        progress = Trainer(
            learner,
            Batches(data.dataset(), order, current=data.task.name),
            Limits(timetable, validate_every=1, log_every=settings.steps, save_every=settings.steps, result="last"),
            Evaluated(delays),
            description=_name(settings),
        ).run(progress)
    return policy, preprocessor, time.process_time() - began, progress.step


def _order(settings: Settings, task: Task, policy: SmolVLAMemoryPolicy) -> tuple[Order, Recurrence]:
    about: dict[str, Any] = {"seed": settings.seed, "stage": 1, "tasks": [task], "shares": {task.name: 1.0}}
    if settings.tokens == 0 or settings.depth == 0:
        return SampleOrder(batch_size=settings.batch_size, **about), NoRecurrence()
    order = ClipOrder(batch_size=settings.batch_size, depth=settings.depth, stride=1, **about)
    assert policy.model.memory is not None
    return order, CarriedMemory(policy.model.memory.initial(order.stream_count))


def decide(settings: Settings, policy: SmolVLAMemoryPolicy, preprocessor: Any, delays: Sequence[int]) -> dict[str, Any]:
    """Held-out decisions after these delays: per intervention how many follow the colour that the memory is of.

    `swapped` counts the decisions that follow the donor, an episode of the next colour in the same layout;
    `probe` how often a linear classifier reads the colour from the memory just before the decision.
    """
    first = settings.training_layouts
    data = colour_task(delays, range(first, first + settings.held_out_layouts))
    fitted = colour_task(delays, range(settings.training_layouts))
    probe = MemoryProbe(policy, data.dataset(), preprocessor)
    walk = probe.walk([probe.queries_of(0, episode) for episode in data.task.train_episodes])
    last = [delay + 1 for delay in data.delays]
    colours = np.array(data.colours)
    donors = [episode - colour + (colour + 1) % len(COLOURS) for episode, colour in enumerate(data.colours)]
    questions = [draws[query] for draws, query in zip(walk.episodes, last, strict=True)]
    noise = seeded_noise(policy, list(zip(data.layouts, data.delays, strict=True)))
    references = np.tile(TARGETS[None, :, None, :], (len(last), 1, 1, 1))
    result: dict[str, Any] = {"n": len(last)}
    memories = probe.intervened(walk, last, [0] * len(last), donors)
    for intervention, memory in memories.items():
        predicted = probe.predict(questions, memory, noise)
        chosen = nearest(predicted, references, np.ones(predicted.shape, bool))
        expected = colours[donors] if intervention == "swapped" else colours
        result[intervention] = int((chosen == expected).sum())
    if walk.states is not None:
        fit = MemoryProbe(policy, fitted.dataset(), preprocessor)
        fit_walk = fit.walk([fit.queries_of(0, episode) for episode in fitted.task.train_episodes])
        known, asked = fit_walk.before([delay + 1 for delay in fitted.delays]), memories["on"]
        assert known is not None
        assert asked is not None
        tokens = [memory.tokens.flatten(1).numpy() for memory in (known, asked)]
        read = linear_probe(tokens[0], np.array(fitted.colours), tokens[1])
        result["probe"] = int((read == colours).sum())
    return result


def run(settings: Settings, folder: Path) -> dict[str, Any]:
    """Train and evaluate: a record for the JSON file."""
    policy, preprocessor, seconds, steps = train(settings, folder)
    longest = settings.longest_delay
    return {
        "settings": asdict(settings),
        "cpu_seconds": round(seconds, 1),
        "steps": steps,
        "trained_delays": decide(settings, policy, preprocessor, range(1, longest + 1)),
        "longer_delays": decide(settings, policy, preprocessor, range(longest + 1, 2 * longest + 1)),
    }


def table(records: Sequence[dict[str, Any]]) -> str:
    """Seeds of the same settings pooled; accuracy with its 95 % Wilson interval."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault(_name(replace(Settings(**record["settings"]), seed=0)), []).append(record)
    columns = ("on", "reset", "frozen", "swapped", "probe")
    head = ["run", "seeds", "steps", "CPU s", "trained delays", "longer delays", *columns[1:]]
    rows = [head]
    for name, runs in groups.items():
        seeds = ",".join(str(record["settings"]["seed"]) for record in runs)
        seconds = f"{np.mean([record['cpu_seconds'] for record in runs]):.0f}"
        steps = ",".join(str(record["steps"]) for record in runs)
        rows.append(
            [name, seeds, steps, seconds, *(_pooled(runs, part, "on") for part in ("trained_delays", "longer_delays"))]
        )
        rows[-1] += [_pooled(runs, "trained_delays", column) for column in columns[1:]]
    return "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], ["---"] * len(head), *rows[1:]])


def _pooled(runs: Sequence[dict[str, Any]], part: str, column: str) -> str:
    if any(column not in record[part] for record in runs):
        return "–"
    n = sum(record[part]["n"] for record in runs)
    found = wilson(sum(record[part][column] for record in runs), n)
    each = "/".join(f"{record[part][column] / record[part]['n']:.2f}" for record in runs) if len(runs) > 1 else ""
    return f"{found.estimate:.2f} [{found.low:.2f}, {found.high:.2f}]" + (f" ({each})" if each else "") + f" n={n}"


def _name(settings: Settings) -> str:
    if settings.tokens == 0:
        name = "no memory"
    else:
        name = f"K={settings.depth} {settings.layout} {settings.update} M={settings.tokens}"
    changed = [
        f"{field.name}={getattr(settings, field.name)}"
        for field in fields(settings)
        if field.name not in ("tokens", "depth", "layout", "update", "seed")
        and getattr(settings, field.name) != field.default
    ]
    return " ".join([name, *changed])


def parse(words: Sequence[str]) -> tuple[list[Settings], Path]:
    """Every combination of the values given, and where the JSON goes. Raises ValueError naming key and value."""
    known = {field.name: float if field.name == "stop_at" else type(field.default) for field in fields(Settings)}
    given: dict[str, list[Any]] = {}
    output = Path("outputs/benchmarks/remember_colour.json")
    for word in words:
        key, equals, text = word.partition("=")
        if key == "output" and equals:
            output = Path(text)
        elif key in known and equals:
            given[key] = [_value(key, item, known[key]) for item in text.split(",")]
        else:
            raise ValueError(f"arguments are key=value with a key of output, {', '.join(known)}, got {word!r}")
    if not given:
        given = {"tokens": [0, 4]}
    return [Settings(**dict(zip(given, values, strict=True))) for values in itertools.product(*given.values())], output


def _value(key: str, text: str, kind: type) -> Any:
    try:
        return {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{key} must be a {kind.__name__}, got {text!r}") from error


def main(words: Sequence[str]) -> int:
    if {"-h", "--help", "help"} & set(words):
        print(__doc__)
        return 0
    try:
        todo, output = parse(words)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    output.parent.mkdir(parents=True, exist_ok=True)
    records = json.loads(output.read_text()) if output.is_file() else []
    with tempfile.TemporaryDirectory() as folder:
        for settings in todo:
            records = [record for record in records if record["settings"] != asdict(settings)]
            records.append(run(settings, Path(folder)))
            write_json(output, records)
            print(table(records[-1:]).splitlines()[-1], flush=True)
    print(f"\n{table(records)}\n\n{output}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
