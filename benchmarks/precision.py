"""What bfloat16 costs where weights learn, and how little where they only act. The real commands on a tiny VLM that is
stored as SmolVLM2 is, in bfloat16.

Learning: `lerobot-train` and `python -m kuavo_train` from the same base (LeRobot's SmolVLA on that VLM, its expert
new), the VLM frozen, the same demonstrations, statistics, optimizer, constant rate, batch and number of steps, both
under bf16 autocast. LeRobot makes the expert in the VLM's bfloat16. So that nothing else is taken for its effect, it
also trains from the same weights stored in float32, below a VLM whose config says float32. Held-out loss: our
validation of what came out, the same questions to each; intervals are Student's over the seeds' differences. Changed
and moved: the expert's weights, against the base.

Acting: what a robot's wrapper answers with dtype=bfloat16 in place of float32, walking held-out episodes with memory,
beside its error against the demonstration.

What is finished in `work` is kept, and the rest done when the command is called again.
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState
from lerobot.configs import PreTrainedConfig
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from safetensors.torch import load_file

from benchmarks.end_to_end import run_command
from benchmarks.measuring import Table
from benchmarks.models import CAMERAS, features
from kuavo_train.compose import compose_run
from kuavo_train.config import RunConfig
from kuavo_train.curriculum import train_all_stages
from kuavo_train.data.images.frames import open_frames
from kuavo_train.evaluation.open_loop import walk
from kuavo_train.evaluation.validation import Validator
from kuavo_train.metrics.intervals import student_quantile
from kuavo_train.runs.files import write_text
from kuavo_train.runs.trained_run import TrainedRun
from kuavo_train.wrapper.policy.smolvla import SmolVLAPolicyWrapper
from lerobot_policy_smolvla_memory import SmolVLAMemoryConfig, SmolVLAMemoryPolicy
from lerobot_policy_smolvla_memory.tiny_vlm import make_tiny_vlm

TASK = "moving_grasp"
EXPERT = "model.vlm_with_expert.lm_expert."
DTYPES = {"bfloat16": "lerobot-train, VLM in bfloat16 (as the hub has it)", "float32": "lerobot-train, all in float32"}
OURS = "kuavo_train, VLM in bfloat16"
FROZEN = "[vision,connector,vlm_text]"


@dataclass(frozen=True)
class Settings:
    rate: tuple[float, ...] = (2e-5,)
    seed: tuple[int, ...] = (0, 1, 2)
    steps: int = 300
    episodes: int = 40  # demonstrations, recorded where there are none
    held_out: int = 8
    batch_size: int = 32
    draws: int = 8  # (noise, time) pairs per held-out frame
    image: int = 64  # pixels per side
    work: str = "outputs/precision"
    threads: int = 1


def run(settings: Settings) -> list[Table]:
    torch.set_num_threads(settings.threads)
    work = Path(settings.work).resolve()
    for seed in settings.seed:
        write_bases(work, seed, settings)
    return [*(compare(work, rate, settings) for rate in settings.rate), act(work, settings)]


# ------------------------------------------------------------------------------------------------------ what is learnt


def write_bases(work: Path, seed: int, settings: Settings) -> None:
    """LeRobot's SmolVLA on the VLM in bfloat16, as LeRobot saves it, and the same weights in float32."""
    instructions = [str(config.stage.instruction) for config in compose_run([])]
    vlms = {
        dtype: make_tiny_vlm(work / f"vlm_{dtype}", dtype=dtype, image_size=settings.image, corpus=instructions)
        for dtype in DTYPES
    }
    if (work / f"base_float32_{seed}").is_dir():
        return
    torch.manual_seed(seed)
    policy = SmolVLAPolicy(_base_config(vlms["bfloat16"], settings, load_vlm_weights=True))
    _save_whole(policy, work / f"base_bfloat16_{seed}")
    exact = SmolVLAPolicy(_base_config(vlms["float32"], settings, load_vlm_weights=False))
    exact.load_state_dict(policy.state_dict())
    _save_whole(exact, work / f"base_float32_{seed}")


def _base_config(vlm: Path, settings: Settings, *, load_vlm_weights: bool) -> SmolVLAConfig:
    return SmolVLAConfig(
        vlm_model_name=str(vlm),
        load_vlm_weights=load_vlm_weights,
        device="cpu",
        push_to_hub=False,
        **features(CAMERAS, image=settings.image, state=16, actions=16),
        resize_imgs_with_padding=(settings.image, settings.image),
        chunk_size=16,
        n_action_steps=8,
        tokenizer_max_length=96,
        num_vlm_layers=4,
    )


def _save_whole(policy: SmolVLAPolicy, folder: Path) -> None:
    partial = folder.with_name(f".{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    for part in (policy, *make_pre_post_processors(policy.config, dataset_stats={})):
        part.save_pretrained(partial)
    partial.rename(folder)


def compare(work: Path, rate: float, settings: Settings) -> Table:
    losses: dict[str, list[float]] = {name: [] for name in (*DTYPES.values(), OURS)}
    changes: dict[str, list[tuple[float, float]]] = {name: [] for name in losses}
    for seed in settings.seed:
        config = train(work, seed, rate, settings, f"ours_{rate:g}_{seed}", "policy=smolvla")
        trained = TrainedRun.open(config.run_folder)
        data = copy_for_lerobot(trained, work / "data_lerobot")
        results = {
            name: lerobot_train(work, data, trained, dtype, seed, rate, settings) for dtype, name in DTYPES.items()
        }
        results[OURS] = trained.checkpoint(trained.stages[-1]).pretrained_model
        base = load_file(work / f"base_bfloat16_{seed}" / "model.safetensors")
        for name, folder in results.items():
            losses[name].append(held_out_loss(trained, folder, settings))
            changes[name].append(changed_and_moved(base, load_file(folder / "model.safetensors")))
            print(
                f"seed {seed}, {name}: loss {losses[name][-1]:.4f}, changed and moved {changes[name][-1]}", flush=True
            )
    half = DTYPES["bfloat16"]
    rows = []
    for name, of_seeds in losses.items():
        differences = [mine - theirs for mine, theirs in zip(of_seeds, losses[half], strict=True)]
        rows.append(
            {
                "": name,
                "held-out loss": f"{mean(of_seeds):.4f}",
                **{f"seed {seed}": f"{loss:.4f}" for seed, loss in zip(settings.seed, of_seeds, strict=True)},
                "less or more than the first": None if name == half else with_interval(differences),
                "expert's weights that changed": f"{mean(changed for changed, _ in changes[name]):.1%}",
                "distance moved": mean(moved for _, moved in changes[name]),
            }
        )
    return Table(f"{settings.steps} steps of {settings.batch_size} at a rate of {rate:g}", rows)


def train(work: Path, seed: int, rate: float, settings: Settings, name: str, *more: str) -> RunConfig:
    """The stage of our command, finished now or before."""
    steps = settings.steps
    configs = compose_run(
        [
            f"run={name}",
            f"outputs={work}",
            f"data.root={work / 'data'}",
            f"learn=[{TASK}]",
            f"seed={seed}",
            f"simulation.episodes={settings.episodes}",
            f"simulation.image_size={settings.image}",
            f"data.held_out_episodes={settings.held_out}",
            "tiny_vlm=null",
            f"policy.vlm_model_name={work / 'vlm_bfloat16'}",
            f"policy.pretrained_path={work / f'base_bfloat16_{seed}'}",
            "policy.load_vlm_weights=true",
            f"policy.resize_imgs_with_padding=[{settings.image},{settings.image}]",
            f"training.freeze_first_stage={FROZEN}",
            f"training.batch_size={settings.batch_size}",
            f"training.max_steps={steps}",
            f"training.epochs={steps}",  # more than there can be: the steps decide
            "training.mixed_precision=bf16",
            f"training.lr={rate}",
            f"training.decay_lr={rate}",
            "training.warmup_steps=0",
            "training.betas=[0.9,0.95]",  # LeRobot's, as the two below
            "training.weight_decay=1e-10",
            "training.grad_clip_norm=10",
            "training.save_every=1000000",
            "validation.every_epochs=1000000",
            "validation.result=last",
            "rollout.episodes=0",
            *more,
        ]
    )
    with _one_precision():
        if train_all_stages(configs) != 0:
            raise RuntimeError(f"the run {name} did not finish; call again to go on with it")
    return configs[0]


@contextmanager
def _one_precision() -> Iterator[None]:
    """accelerate keeps the precision of a process's first run for all others."""
    AcceleratorState._reset_state()
    try:
        yield
    finally:
        AcceleratorState._reset_state()


def copy_for_lerobot(trained: TrainedRun, folder: Path) -> Path:
    """The demonstrations with our statistics, those of the training episodes, in place of those of all."""
    if not folder.is_dir():
        partial = folder.with_name(f".{folder.name}")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(trained.tasks[0].root, partial)
        path = partial / "meta" / "stats.json"
        stored = json.loads(path.read_text())
        for feature, statistics in trained.normalization.for_lerobot().items():
            stored[feature] |= {kind: values.tolist() for kind, values in statistics.items()}
        write_text(path, json.dumps(stored))
        partial.rename(folder)
    return folder


def lerobot_train(
    work: Path, data: Path, trained: TrainedRun, dtype: str, seed: int, rate: float, settings: Settings
) -> Path:
    """What LeRobot's command has saved, now or before."""
    output = work / f"lerobot_{dtype}_{rate:g}_{seed}"
    result = output / "checkpoints" / f"{settings.steps:06d}" / "pretrained_model"
    if (result / "model.safetensors").is_file():
        return result
    shutil.rmtree(output, ignore_errors=True)
    arguments = {
        "dataset.repo_id": f"local/{TASK}",
        "dataset.root": data,
        "dataset.episodes": list(trained.tasks[0].train_episodes),
        "dataset.video_backend": "pyav",
        "policy.path": work / f"base_{dtype}_{seed}",
        "policy.use_amp": "true",
        "policy.push_to_hub": "false",
        "policy.optimizer_lr": rate,
        "policy.scheduler_decay_lr": rate,
        "policy.scheduler_warmup_steps": 0,
        "batch_size": settings.batch_size,
        "num_workers": 0,
        "persistent_workers": "false",
        "seed": seed,
        "steps": settings.steps,
        "save_freq": settings.steps,
        "log_freq": 50,
        "output_dir": output,
    }
    words = [f"--{key}={value}".replace(" ", "") for key, value in arguments.items()]
    run_command(["-m", "lerobot.scripts.lerobot_train", *words], threads=settings.threads)
    return result


def held_out_loss(trained: TrainedRun, folder: Path, settings: Settings) -> float:
    """Of a policy of either command, on the held-out episodes of our run."""
    config = PreTrainedConfig.from_pretrained(str(folder))
    if not isinstance(config, SmolVLAMemoryConfig):
        config = SmolVLAMemoryConfig.from_smolvla(config, num_mem_tokens=0)
    policy = SmolVLAMemoryPolicy.from_pretrained(folder, config=config)
    checkpoint = trained.checkpoint(trained.stages[-1])
    validator = Validator(
        trained.dataset(trained.tasks, policy.config),
        trained.normalization,
        trained.policy(checkpoint)[1],
        draws=settings.draws,
        batch_size=64,
        autocast=trained.autocast,
        progress=False,
    )
    (found,) = validator.validate_all_tasks(policy, [TASK])
    return found.loss


def changed_and_moved(before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]) -> tuple[float, float]:
    """Of the expert: share of the weights that are others than before, and the Euclidean distance."""
    steps = torch.cat([(after[name].float() - before[name].float()).flatten() for name in before if EXPERT in name])
    return (steps != 0).double().mean().item(), steps.double().norm().item()


def with_interval(differences: Sequence[float]) -> str:
    if len(differences) < 2:
        return f"{differences[0]:+.4f} (one seed)"
    reach = student_quantile(0.95, len(differences) - 1) * stdev(differences) / len(differences) ** 0.5
    return f"{mean(differences):+.4f} ({mean(differences) - reach:+.4f} to {mean(differences) + reach:+.4f})"


# --------------------------------------------------------------------------------------------------------- what is done


class Recorder:
    """A wrapper, and all that it has answered."""

    def __init__(self, policy: SmolVLAPolicyWrapper):
        self.policy, self.n_action_steps, self.chunks = policy, policy.n_action_steps, list[np.ndarray]()
        self.reset, self.forget, self.select_action = policy.reset, policy.forget, policy.select_action

    def predict_chunk(self, observation: Mapping[str, Any]) -> Any:
        self.chunks.append(np.asarray(self.policy.predict_chunk(observation)))
        return self.chunks[-1]


def act(work: Path, settings: Settings) -> Table:
    memory = ("policy.num_mem_tokens=4", "policy.mem_backprop_depth=4")
    config = train(work, settings.seed[0], 1e-3, settings, "memory", *memory)
    trained = TrainedRun.open(config.run_folder)
    task, checkpoint = trained.tasks[0], trained.checkpoint(trained.stages[-1])
    frames = open_frames(task, trained.settings.data)
    answered, errors = {}, {}
    for dtype in ("float32", "bfloat16"):
        wrapper: Any = Recorder(
            SmolVLAPolicyWrapper.from_pretrained(checkpoint.folder, device="cpu", dtype=dtype, seed=0)
        )
        walked = walk(wrapper, task, task.held_out_episodes, frames, parallel=settings.held_out, progress=False)
        answered[dtype] = np.stack(wrapper.chunks)
        errors[dtype] = float(np.nanmean([of.error for of in walked.values()]))
    apart = np.abs(answered["bfloat16"] - answered["float32"])
    rows = [
        {"": dtype, "error against the demonstration": errors[dtype], "apart from float32, mean": None, "at most": None}
        for dtype in errors
    ]
    rows[1] |= {"apart from float32, mean": float(apart.mean()), "at most": float(apart.max())}
    rows[1]["in the last look of an episode, mean"] = float(apart[-1].mean())
    rows[0]["in the last look of an episode, mean"] = None
    return Table(f"wrapper, actions in rad, {len(task.held_out_episodes)} episodes, 4 memory tokens", rows)
