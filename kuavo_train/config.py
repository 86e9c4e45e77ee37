"""The typed schema of configs/.

Hydra composes YAML; compose.py turns the result into the frozen dataclasses below, once, in the runnable
modules. Below them there is no DictConfig. Every dataclass checks itself and names key, rule and value.

Imports of the project only errors, the limits of verdicts and the names of JSON.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from fractions import Fraction
from pathlib import Path

from omegaconf import OmegaConf

from kuavo_train.errors import ConfigError, one_of, require
from kuavo_train.metrics.verdict import RetentionLimits
from kuavo_train.reading import Json

# Profiles scale the stage's own recipe: `${times:${stage.lr},20}`, `${share_of:${stage.epochs},0.1}`.
OmegaConf.register_new_resolver("times", lambda value, factor: float(f"{value * factor:.9g}"), replace=True)
OmegaConf.register_new_resolver("share_of", lambda whole, part: max(1, round(whole * part)), replace=True)

FROM_DATASET = "dataset"
"""`stage.instruction` that takes the dataset's own sentences."""

_INSTALLED = Path(__file__).resolve().parent / "configs"
CONFIG_FOLDER = _INSTALLED if _INSTALLED.is_dir() else _INSTALLED.parents[1] / "configs"
"""The YAML files: inside the package where that was installed from a wheel, beside it in the repository."""

MODELS_FOLDER = CONFIG_FOLDER.parent / "models"
"""Pretrained models that come with the project, beside the YAML files."""

OmegaConf.register_new_resolver("model", lambda name: str(MODELS_FOLDER / name), replace=True)


def said(error: BaseException, limit: int = 1500) -> str:
    """What an error says: its type and text, and of those it came from the last that says anything else.

    The hub's library hides the reason behind texts that are empty, or begin with an empty line.
    """
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    errors_named = [(type(each).__name__, str(each).strip()[:limit]) for each in chain]
    texts = [f"{name}: {text}" for name, text in errors_named if text]
    if not texts:
        return " from ".join(name for name, _ in errors_named)
    last = texts[-1].partition(": ")[2]
    return texts[0] if last in texts[0] else f"{texts[0]} (from {texts[-1]})"


@dataclass(frozen=True)
class SimulationConfig:
    """How kuavo_sim records the demonstrations of a task whose dataset is missing."""

    episodes: int = 60  # demonstrations per task
    seed: int = 0  # of their layouts
    image_size: int | list[int] = 64  # the side of square pictures, or [height, width]
    renderer: str = "rays"  # rays (no OpenGL, the same picture everywhere), egl (MuJoCo's, with a driver)
    phase_visible: bool = True  # whether weighing's light shows that the parcel has been weighed
    action_noise: float = 0.025  # rad, the joint noise that makes recovery demonstrations
    depth: bool = False  # record depth too, as Kuavo recordings have it

    def __post_init__(self) -> None:
        require(self.episodes >= 2, "simulation.episodes", "be at least 2 (one is held out)", self.episodes)
        sides = [self.image_size] if isinstance(self.image_size, int) else self.image_size
        valid = len(sides) <= 2 and min(sides, default=0) >= 16
        require(valid, "simulation.image_size", "be at least 16 pixels, or [height, width] of those", self.image_size)
        require(self.action_noise >= 0, "simulation.action_noise", "not be negative", self.action_noise)
        one_of("simulation.renderer", self.renderer, ("rays", "egl"))


@dataclass(frozen=True)
class StageConfig:
    """One file of configs/tasks/: a task and the recipe of the stage that learns it."""

    name: str  # of the task: folders, reports and replay shares call it so
    index: int  # place in the order of learning, from 1
    instruction: list[str] | str  # one sentence; several, of which each episode gets one; or `dataset`: its own
    epochs: int  # passes over this task's training frames
    lr: float  # learning rate at the end of the warm-up
    warmup_steps: int  # optimizer steps from 0 to lr
    decay_steps: int  # optimizer steps from lr to training.decay_lr, a cosine
    replay: dict[str, float]  # task name → share of the samples, this task included
    root: str  # folder of the LeRobot dataset
    loss_target: float = 0.7  # training loss expected at the stage's end
    final_loss_limit: float = 0.9  # held-out loss the final model should stay under
    episodes: list[int] | None = None  # [first, last] episode to use; all when absent
    cameras: dict[str, str] = field(default_factory=dict)  # name in the dataset → name in the policy
    repo_id: str | None = None  # of the dataset on the hub, fetched to `root` when it is not there
    revision: str | None = None  # of that: a branch, a tag or a commit; None: the tag of the format that LeRobot reads
    state_names: list[str] | None = None  # in place of the dataset's, where they are wrong or missing
    action_names: list[str] | None = None  # as state_names
    scale: dict[str, float] = field(default_factory=dict)  # "action.left_claw" → factor on the dataset's values
    cue_column: str | None = None  # says what memory must provide; None: `cue` where the dataset has it; "": none
    cue_visible_column: str | None = None  # true where the cue shows; None: `cue_visible` where it is there
    decision_column: str | None = None  # true where the cue must be acted on; None: `decision` where it is there
    simulation_task: str | None = None  # kuavo_sim's name of the task, when it can be simulated
    environment: str | None = None  # gymnasium's id of another environment to roll the task out in, "module:id"
    environment_settings: Json = field(default_factory=dict)  # of that environment

    def __post_init__(self) -> None:
        require(
            bool(re.fullmatch(r"[a-z0-9_]+", self.name)),
            "stage.name",
            "consist of lower-case letters, digits and _",
            self.name,
        )
        where = f"stage {self.index} ({self.name}):"
        require(self.index >= 1, f"{where} index", "be at least 1", self.index)
        self._check_instruction(f"{where} instruction")
        named = self.revision is None or self.repo_id is not None
        require(named, f"{where} revision", "come with the repo_id that it is of", self.revision)
        require(self.epochs >= 1, f"{where} epochs", "be at least 1", self.epochs)
        require(self.lr > 0, f"{where} lr", "be positive", self.lr)
        require(self.warmup_steps >= 0, f"{where} warmup_steps", "not be negative", self.warmup_steps)
        require(self.decay_steps >= 1, f"{where} decay_steps", "be at least 1", self.decay_steps)
        require(bool(self.replay), f"{where} replay", "give the task itself a share", self.replay)
        check_shares(self.replay, f"{where} replay share of task")
        require(self.replay.get(self.name, 0) > 0, f"{where} replay", "give the task itself a share", self.replay)
        if self.episodes is not None:
            valid = len(self.episodes) == 2 and 0 <= self.episodes[0] <= self.episodes[1]
            require(valid, f"{where} episodes", "be [first, last] with 0 <= first <= last", self.episodes)
        for name, factor in self.scale.items():
            valid = name.startswith(("state.", "action.")) and factor != 0
            require(valid, f"{where} scale", "give state.NAME or action.NAME a factor that is not 0", {name: factor})

    def _check_instruction(self, key: str) -> None:
        texts = [self.instruction] if isinstance(self.instruction, str) else self.instruction
        require(bool(texts) and all(text.strip() for text in texts), key, "not be empty", self.instruction)
        words = [" ".join(text.split()) for text in texts]
        require(len(set(words)) == len(words), key, "not say one sentence twice", self.instruction)
        alone = len(words) == 1 or FROM_DATASET not in words
        require(alone, key, f"be {FROM_DATASET} alone, or sentences", self.instruction)

    @property
    def folder_name(self) -> str:
        return f"stage{self.index}_{self.name}"


def check_shares(shares: Mapping[str, float], key: str) -> None:
    """Replay shares are fractions in [0, 1] whose sum is 1, compared as the decimals the user typed."""
    for task, share in shares.items():
        require(0 <= share <= 1, f"{key} {task}", "be in [0, 1]", share)
    total = sum((Fraction(str(share)) for share in shares.values()), Fraction())
    require(abs(total - 1) <= Fraction(1, 10**6), f"{key}s {', '.join(shares)}: their sum", "be 1", float(total))


@dataclass(frozen=True)
class AugmentationConfig:
    """LeRobot's random transforms of training pictures, with its names and defaults."""

    max_num_transforms: int = 3  # applied to a clip, of those in `tfs`
    random_order: bool = False  # whether they are applied in another order each time
    tfs: Json | None = None  # name → {weight, type, kwargs}; None: LeRobot's own, of colour, sharpness, place

    def __post_init__(self) -> None:
        key, count = "data.augmentation.max_num_transforms", self.max_num_transforms
        require(count >= 1, key, "be at least 1 (no augmentation: data.augmentation=null)", count)


@dataclass(frozen=True)
class DataConfig:
    root: str  # folder that holds one dataset folder per task
    cameras: list[str]  # in the order the policy sees them
    image_size: list[int] | None = None  # height, width that frames are brought to; None keeps them
    held_out_episodes: int = 20  # per task, never trained on
    split_seed: int = 0  # which episodes are held out; the same for runs that are to be compared
    normalization: str = "joint"
    claw_limits: list[float] | None = field(default_factory=lambda: [0.0, 1.0])  # None takes claws as they are
    frame_cache: bool = True
    feature_cache: bool = True
    feature_cache_limit_gib: float = 100.0
    feature_fill: str = "before"  # before training, or along: in the step that first needs them
    feature_dtype: str = "bfloat16"
    feature_stride: int = 1  # frames from one that samples are of to the next; only those are cached
    context_cache_limit_gib: float = 4.0
    replay_file: str | None = None  # of export_replay: earlier tasks are read from it in place of their datasets
    cache_root: str | None = None  # None: .cache in `root`
    augmentation: AugmentationConfig | None = None
    num_workers: int = 0  # processes that load batches; 0 loads them in the trainer
    video_backend: str = "pyav"  # pyav, or torchcodec (needs FFmpeg)
    record_workers: int | None = None

    def __post_init__(self) -> None:
        require(len(self.cameras) > 0, "data.cameras", "name at least one camera", self.cameras)
        require(len(set(self.cameras)) == len(self.cameras), "data.cameras", "not repeat a camera", self.cameras)
        require(self.held_out_episodes >= 1, "data.held_out_episodes", "be at least 1", self.held_out_episodes)
        require(self.num_workers >= 0, "data.num_workers", "not be negative", self.num_workers)
        require(self.feature_stride >= 1, "data.feature_stride", "be at least 1", self.feature_stride)
        for key in ("feature_cache_limit_gib", "context_cache_limit_gib"):
            require(getattr(self, key) >= 0, f"data.{key}", "not be negative", getattr(self, key))
        one_of("data.feature_fill", self.feature_fill, ("before", "along"))
        rule = "be before where pictures are read, not embeddings (data.feature_cache=false, or data.augmentation)"
        embedded = self.feature_cache and self.augmentation is None
        require(self.feature_fill == "before" or embedded, "data.feature_fill", rule, self.feature_fill)
        one_of("data.feature_dtype", self.feature_dtype, ("bfloat16", "int8"))
        one_of("data.normalization", self.normalization, ("joint", "first_stage", "pretrained"))
        if self.claw_limits is not None:
            valid = len(self.claw_limits) == 2 and self.claw_limits[0] < self.claw_limits[1]
            require(valid, "data.claw_limits", "be [open, closed] in ascending order, or null", self.claw_limits)
        one_of("data.video_backend", self.video_backend, ("pyav", "torchcodec"))
        if self.image_size is not None:
            valid = len(self.image_size) == 2 and min(self.image_size) >= 16
            require(valid, "data.image_size", "be [height, width], each at least 16 pixels", self.image_size)

    @property
    def cache_folder(self) -> Path:
        """Where frames and image embeddings are kept, for all runs on this data."""
        return Path(self.root) / ".cache" if self.cache_root is None else Path(self.cache_root)


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters on the action expert in place of its own weights."""

    rank: int = 64  # of the two matrices that are learnt in place of a layer's change
    alpha: int = 64  # what is learnt is scaled by alpha / rank

    def __post_init__(self) -> None:
        require(self.rank >= 1, "training.lora.rank", "be at least 1", self.rank)
        require(self.alpha > 0, "training.lora.alpha", "be positive", self.alpha)


@dataclass(frozen=True)
class TrainingConfig:
    """The recipe in force; the profiles derive epochs and rates from the stage's own."""

    epochs: int  # passes over the new task's training frames
    lr: float  # learning rate at the end of the warm-up
    warmup_steps: int  # optimizer steps from 0 to lr
    decay_steps: int  # optimizer steps from lr to decay_lr, a cosine
    batch_size: int = 64  # samples per batch, replayed ones included
    decay_lr: float = 1e-6  # learning rate that the decay ends in
    optimizer: str = "adamw"  # adamw, or muon: orthogonal steps of matrices between hidden states, AdamW for the rest
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])  # of AdamW
    eps: float = 1e-8  # of AdamW
    weight_decay: float = 5e-7  # of AdamW
    grad_clip_norm: float = 1.0  # norm that gradients are cut to
    gradient_accumulation_steps: int = 1  # batches per optimizer step
    mixed_precision: str = "no"  # no, or bf16: computes in bfloat16; what is trained stays float32
    freeze_first_stage: list[str] = field(default_factory=list)  # parameter groups held fixed while learning task 1
    freeze: list[str] = field(default_factory=list)  # and in all later stages
    lora: LoraConfig | None = None  # None: the expert's own weights are trained
    ema: float | None = None  # decay of a moving average of the trained weights, which is then the result
    max_steps: int | None = None  # an upper limit, for trials
    query_jitter: int = 0  # frames by which the queries of a recurrent policy are moved in training
    log_every: int = 20  # steps
    save_every: int = 500  # steps; a checkpoint is also written at every validation
    device: str = "auto"  # auto, cpu, cuda or mps

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "gradient_accumulation_steps", "log_every", "save_every", "decay_steps"):
            require(getattr(self, name) >= 1, f"training.{name}", "be at least 1", getattr(self, name))
        for name in ("lr", "eps", "grad_clip_norm"):
            require(getattr(self, name) > 0, f"training.{name}", "be positive", getattr(self, name))
        for name in ("decay_lr", "weight_decay", "warmup_steps", "query_jitter"):
            require(getattr(self, name) >= 0, f"training.{name}", "not be negative", getattr(self, name))
        require(self.decay_lr <= self.lr, "training.decay_lr", f"not exceed training.lr ({self.lr})", self.decay_lr)
        valid_betas = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        require(valid_betas, "training.betas", "be two numbers in [0, 1)", self.betas)
        require(self.ema is None or 0 <= self.ema < 1, "training.ema", "be a decay in [0, 1), or null", self.ema)
        one_of("training.optimizer", self.optimizer, ("adamw", "muon"))
        one_of("training.mixed_precision", self.mixed_precision, ("no", "bf16"))
        require(
            self.device in ("auto", "cpu", "cuda", "mps"),
            "training.device",
            "be auto, cpu, cuda or mps (which GPU: CUDA_VISIBLE_DEVICES)",
            self.device,
        )
        if self.max_steps is not None:
            require(self.max_steps >= 1, "training.max_steps", "be at least 1", self.max_steps)


@dataclass(frozen=True)
class ValidationConfig:
    every_epochs: int = 2  # passes between two validations; one more at a stage's end
    draws: int = 4  # (noise, time) pairs per frame, time on a stratified grid
    batch_size: int = 64  # frames at a time
    unseen_tasks: bool = True  # at stage ends; row 0 and forward transfer need them
    result: str = "best"  # what a stage ends in: best (least mean loss over all tasks seen), last
    share: float | None = 0.1  # queries of a stage's validations per training sample, at most; None: all held-out ones

    def __post_init__(self) -> None:
        one_of("validation.result", self.result, ("best", "last"))
        require(self.share is None or self.share > 0, "validation.share", "be above 0, or null", self.share)
        for item in ("every_epochs", "draws", "batch_size"):
            require(getattr(self, item) >= 1, f"validation.{item}", "be at least 1", getattr(self, item))


@dataclass(frozen=True)
class RolloutConfig:
    """Closed-loop episodes of all tasks seen, whose success enters the matrix."""

    episodes: int = 0  # per task, at a stage's end; 0: none
    every_epochs: int | None = None  # and every so many epochs; None: at the end only
    seed: int = 0  # of the layouts; the same for runs that are to be compared
    parallel: int = 8  # robots at a time
    workers: int | None = None  # processes that simulate; None: one per CPU
    max_steps: int | None = None  # time limit of an episode; None: the environment's own

    def __post_init__(self) -> None:
        require(0 <= self.episodes <= 10_000, "rollout.episodes", "be in [0, 10000]", self.episodes)
        require(self.seed >= 0, "rollout.seed", "not be negative", self.seed)
        require(self.parallel >= 1, "rollout.parallel", "be at least 1", self.parallel)
        for name in ("every_epochs", "workers", "max_steps"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"rollout.{name}", "be at least 1, or null", value)


@dataclass(frozen=True)
class ReplayConfig:
    """How much of an earlier task's training data is kept for replay, and which part of it."""

    buffer: float | None = None  # share of its training episodes that is kept; null or 1: all
    unit: str = "episode"  # what is kept: episode (whole ones), frame (single ones; the share is of frames then)
    select: str = "random"  # which are kept: random, phase (balanced over phases of the job), loss (known least)
    share: float | None = None  # of a stage's samples, all earlier tasks alike; None: the shares in the tasks' files

    def __post_init__(self) -> None:
        share = self.share
        require(share is None or 0 < share < 1, "replay.share", "be a share in (0, 1), or null", share)
        buffer = self.buffer
        require(buffer is None or 0 < buffer <= 1, "replay.buffer", "be a share in (0, 1], or null", buffer)
        one_of("replay.unit", self.unit, ("episode", "frame"))
        one_of("replay.select", self.select, ("random", "phase", "loss"))
        rule = "be random or phase with replay.unit=frame, since losses are of episodes"
        require(self.unit == "episode" or self.select != "loss", "replay.select", rule, self.select)

    @property
    def keeps_part(self) -> bool:
        """Whether anything is left out."""
        return self.buffer is not None and self.buffer < 1


@dataclass(frozen=True)
class ForgettingConfig(RetentionLimits):
    """Limits of the verdict, and the gate; change is relative to the held-out loss when the task was learnt."""

    budget: float | None = None  # change an earlier task may show for certain, at any validation; None: no gate
    on_exceed: str = "warn"  # what then: warn, stop (the stage), raise_replay (of that task)
    raise_factor: float = 2.0  # by which a raise multiplies the task's share
    raise_limit: float = 0.4  # share beyond which no task's is raised
    new_task_floor: float = 0.3  # share that the task being learnt keeps

    @property
    def limits(self) -> RetentionLimits:
        """Those of the verdict, alone."""
        return RetentionLimits(**{each.name: getattr(self, each.name) for each in fields(RetentionLimits)})

    def __post_init__(self) -> None:
        try:
            super().__post_init__()
        except ValueError as error:
            raise ConfigError(f"forgetting.{error}") from error
        if self.budget is not None:
            require(self.budget >= 0, "forgetting.budget", "not be negative", self.budget)
        one_of("forgetting.on_exceed", self.on_exceed, ("warn", "stop", "raise_replay"))
        require(self.raise_factor > 1, "forgetting.raise_factor", "be more than 1", self.raise_factor)
        for name in ("raise_limit", "new_task_floor"):
            require(0 < getattr(self, name) < 1, f"forgetting.{name}", "be in (0, 1)", getattr(self, name))


@dataclass(frozen=True)
class EwcConfig:
    """Elastic weight consolidation: a penalty on changes of the weights that earlier tasks depend on."""

    strength: float  # λ
    batches: int  # training batches of a finished stage that the Fisher information is estimated on

    def __post_init__(self) -> None:
        require(self.strength >= 0, "ewc.strength", "not be negative", self.strength)
        require(self.batches >= 1, "ewc.batches", "be at least 1", self.batches)


@dataclass(frozen=True)
class DistillConfig:
    """The policy of before a stage as its teacher: a loss on velocities that differ from the teacher's."""

    weight: float  # of that loss; the tasks' own has 1

    def __post_init__(self) -> None:
        require(self.weight >= 0, "distill.weight", "not be negative", self.weight)


@dataclass(frozen=True)
class MergeConfig:
    """After a stage, weights between its first and its last: (1 − alpha) × old + alpha × new."""

    alphas: list[float]  # those tried; kept is the one of least loss, over all tasks seen
    per_module: bool = True  # an alpha each for expert, projections and memory; false: one for all
    episodes: int | None = None  # a task, set apart from training to choose alphas on; null: as many as are held out

    def __post_init__(self) -> None:
        valid = bool(self.alphas) and all(0 <= alpha <= 1 for alpha in self.alphas)
        require(valid, "merge.alphas", "be one or more numbers in [0, 1]", self.alphas)
        valid = self.episodes is None or self.episodes >= 1
        require(valid, "merge.episodes", "be at least 1, or null", self.episodes)

    @property
    def chooses(self) -> bool:
        """Whether there is anything to choose."""
        return len(set(self.alphas)) > 1


@dataclass(frozen=True)
class AdaptersConfig:
    """A low-rank adapter for each task but the first, chosen by the instruction; all other weights stay."""

    rank: int = 16  # of the two matrices beside each layer of expert and projections
    start: str = "nearest"  # what one begins as: nearest (of the task with the most similar instructions), zero

    def __post_init__(self) -> None:
        require(self.rank >= 1, "adapters.rank", "be at least 1", self.rank)
        one_of("adapters.start", self.start, ("nearest", "zero"))


@dataclass(frozen=True)
class TinyVLMConfig:
    """The small offline SmolVLM of the embedded profile; deterministic, made on the spot."""

    text_hidden: int = 96  # width of the language model
    text_layers: int = 4  # its layers
    vision_hidden: int = 96  # width of the vision encoder
    vision_layers: int = 2  # its layers
    image_size: int = 64  # pixels that pictures are brought to
    patch_size: int = 16  # pixels a patch; smaller ones make more tokens
    scale_factor: int = 2  # patches per side that the connector joins into one token
    seed: int = 0  # of its weights
    corpus: str = "tasks"  # what its tokenizer is made from: tasks (their instructions), words (a fixed list)
    vocabulary_size: int = 512  # tokens at most

    def __post_init__(self) -> None:
        one_of("tiny_vlm.corpus", self.corpus, ("tasks", "words"))


@dataclass(frozen=True)
class WandbConfig:
    """Where Weights & Biases keeps the curves of a run that is tracked."""

    project: str = "kuavo_train"  # of Weights & Biases
    entity: str | None = None  # a user or a team; None: who is logged in

    def __post_init__(self) -> None:
        require(bool(self.project.strip()), "wandb.project", "not be empty", self.project)


@dataclass(frozen=True)
class EngineConfig:
    """What trains the cells of a study: this process, several on this machine, or jobs of a SLURM cluster."""

    name: str = "inline"  # inline (one cell after another), local (jobs at a time), slurm (a job of the cluster each)
    jobs: int = 1  # cells at a time; with slurm those of an array that may run at once
    partition: str | None = None  # of the cluster; None: its default
    gpus: int | None = None  # of a job; None: one per process that trains the cell
    cpus: int = 8  # of a job
    memory_gb: float | None = None  # of a job; None: the cluster's default
    minutes: int = 1440  # after which a job is queued again and goes on
    warning_seconds: int = 120  # before that, and before a job is preempted: time to write a checkpoint
    requeues: int = 100  # how often a job's time may run out; being preempted does not count
    setup: list[str] = field(default_factory=list)  # shell commands before a job, such as `module load cuda`
    more: Json = field(default_factory=dict)  # further options of sbatch, such as {account: robots, qos: low}

    def __post_init__(self) -> None:
        one_of("engine.name", self.name, ("inline", "local", "slurm"))
        obeyed = {"inline": ("name",), "local": ("name", "jobs")}.get(self.name, tuple(vars(self)))
        for key, value in vars(self).items():
            rule = f"be left out with engine={self.name}, which has no such setting"
            require(key in obeyed or value == getattr(EngineConfig, key, type(value)()), f"engine.{key}", rule, value)
        for key in ("jobs", "cpus", "minutes", "warning_seconds"):
            require(getattr(self, key) >= 1, f"engine.{key}", "be at least 1", getattr(self, key))
        for key in ("gpus", "requeues"):
            value = getattr(self, key)
            require(value is None or value >= 0, f"engine.{key}", "not be negative", value)
        valid = self.memory_gb is None or self.memory_gb > 0
        require(valid, "engine.memory_gb", "be positive, or null", self.memory_gb)


MIXTURES_OF = {"replay": ("replay",), "sequential": ("own_task",), "joint": ("all_tasks",), "adapters": ("own_task",)}
"""Strategy that is nothing but its samples → what `mixture` must say with it."""


@dataclass(frozen=True)
class RunConfig:
    """Everything one stage is made of."""

    run: str
    outputs: str  # folder of all runs
    profile: str  # size of model and data: embedded, smoke, study, robot
    strategy: str  # how earlier tasks are kept: replay, sequential, joint, ewc, distill, merge
    mixture: str  # what a stage's samples are from: replay (shares), own_task, all_tasks (one stage for all)
    seed: int  # of samples, noise and new weights
    resume: bool
    tracking: str
    stage: StageConfig
    data: DataConfig
    training: TrainingConfig
    validation: ValidationConfig
    forgetting: ForgettingConfig
    policy: Json  # `type`, `pretrained_path` and fields of that policy's LeRobot config
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    axes: dict[str, str] = field(default_factory=dict)  # of the study that the run is a cell of: key → value
    processes: int = 1  # that the command starts and that train together; training.batch_size is of all of them
    simulation: SimulationConfig | None = None  # None: demonstrations are given, never recorded
    tiny_vlm: TinyVLMConfig | None = None
    ewc: EwcConfig | None = None
    distill: DistillConfig | None = None
    merge: MergeConfig | None = None
    adapters: AdaptersConfig | None = None
    strategy_settings: Json = field(default_factory=dict)  # of a strategy without a section of its own
    passes: dict[str, int] = field(default_factory=dict)  # with all_tasks: task → passes over its training frames
    dealt: dict[str, float] = field(default_factory=dict)  # the stage's replay shares that `learn` leaves to the others
    learn: list[str] | None = None  # names of the tasks to learn, in order; None learns every task that has a file
    hf_endpoint: str | None = None  # a mirror of the hub, https://…; None: huggingface.co, or $HF_ENDPOINT
    offline: bool = False  # never use the hub: everything is in local folders or in its cache
    licence: str = "apache-2.0"  # of the trained weights, in their model card
    allow_random_frozen_vlm: bool = False
    base_sha256: str | None = None  # of the weights at policy.pretrained_path; None: whatever is there
    data_only: bool = False  # record missing demonstrations and stop
    tasks_dir: str | None = None  # folder of the tasks' files, in place of configs/tasks
    config_dir: str | None = None  # folder of groups and tasks beside those of configs

    def __post_init__(self) -> None:
        valid = bool(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.run))
        require(valid, "run", "be a folder name of letters, digits and . _ -", self.run)
        require(self.seed >= 0, "seed", "not be negative", self.seed)
        require(bool(self.strategy), "strategy", "be the name of a strategy, or module:Class", self.strategy)
        one_of("mixture", self.mixture, ("replay", "own_task", "all_tasks"))
        self._check_strategy()
        self._check_processes()
        if self.hf_endpoint is not None:
            valid = bool(re.fullmatch(r"https?://[^/\s]+(/\S*)?", self.hf_endpoint))
            require(valid, "hf_endpoint", "be an address like https://hf-mirror.com, or null", self.hf_endpoint)
        one_of("tracking", self.tracking, ("off", "offline", "online"))
        require("type" in self.policy, "policy", "have a `type`", self.policy)

    @property
    def run_folder(self) -> Path:
        return Path(self.outputs) / self.run

    @property
    def choosing_episodes(self) -> int:
        """Of each task, those set apart from training to choose the coefficients of merged weights on."""
        if self.merge is None or not self.merge.chooses:
            return 0
        return self.data.held_out_episodes if self.merge.episodes is None else self.merge.episodes

    @property
    def batch_of_process(self) -> int:
        """Samples of a batch that one process takes."""
        return self.training.batch_size // self.processes

    def _check_processes(self) -> None:
        require(self.processes >= 1, "processes", "be at least 1", self.processes)
        samples, rule = self.training.batch_size, f"be divisible by processes={self.processes}"
        require(samples % self.processes == 0, "training.batch_size", rule, samples)
        remembers = any(self.policy.get(key) for key in ("num_mem_tokens", "mem_frames"))
        depth = self.policy.get("mem_backprop_depth") if remembers else None
        if depth and samples % depth == 0:
            clips = f"clips of policy.mem_backprop_depth={depth} queries"
            rule = f"be so many {clips} that processes={self.processes} divides their number"
            require(samples // depth % self.processes == 0, "training.batch_size", rule, samples)

    def _check_adapters(self) -> None:
        """They leave nothing to forget, so what keeps earlier tasks otherwise has nothing to do."""
        require(self.mixture == "own_task", "mixture", "be own_task with adapters", self.mixture)
        for key in ("ewc", "distill", "merge"):
            value = getattr(self, key)
            require(value is None, key, "be null with adapters, which change no weight of an earlier task", value)
        lora, rule = self.training.lora, "be null with adapters, which are low-rank adapters of single tasks"
        require(lora is None, "training.lora", rule, lora)
        kind, compiled = self.policy.get("type"), self.policy.get("compile_model", False)
        require(kind == "smolvla_memory", "policy.type", "be smolvla_memory with adapters", kind)
        rule = "be false with adapters: which one takes part differs by row"
        require(not compiled, "policy.compile_model", rule, compiled)

    def _check_strategy(self) -> None:
        joint, allowed = self.strategy == "joint", MIXTURES_OF.get(self.strategy, ("replay", "own_task"))
        rule = f"be {' or '.join(allowed)} with strategy={self.strategy}"
        require(self.mixture in allowed, "mixture", rule, self.mixture)
        for key in ("ewc", "distill", "merge", "adapters"):
            value = getattr(self, key)
            require(not joint or value is None, key, "be null with strategy=joint, which has nothing to keep", value)
            require(self.strategy != key or value is not None, key, f"have settings with strategy={key}", value)
        # Adapters are other parameters in every stage, and their importance would say nothing later.
        lora, rule = self.training.lora, "be null with ewc, which holds weights in place"
        require(self.ewc is None or lora is None, "training.lora", rule, lora)
        if self.adapters is not None:
            self._check_adapters()
        if self.distill is not None:
            kind, fast = self.policy.get("type"), self.policy.get("fast_forward", True)
            require(kind == "smolvla_memory", "policy.type", "be smolvla_memory with distill, for its velocities", kind)
            require(fast, "policy.fast_forward", "be true with distill: LeRobot's forward shows no velocities", fast)
        rule = f"be null or 1 where nothing is replayed (strategy={self.strategy}, mixture={self.mixture})"
        require(self.mixture == "replay" or not self.replay.keeps_part, "replay.buffer", rule, self.replay.buffer)
        rule = f"be null where nothing is replayed (strategy={self.strategy}, mixture={self.mixture})"
        require(self.mixture == "replay" or self.replay.share is None, "replay.share", rule, self.replay.share)
        if self.forgetting.budget is None:
            return
        episodes = self.data.held_out_episodes  # one gives no interval, and so no lower end that could exceed anything
        require(episodes >= 2, "data.held_out_episodes", "be at least 2 with a forgetting.budget", episodes)
        if self.forgetting.on_exceed == "raise_replay":
            require(
                self.mixture == "replay",
                "forgetting.on_exceed",
                f"be warn or stop where nothing is replayed (strategy={self.strategy})",
                self.forgetting.on_exceed,
            )


def check_curriculum(tasks: list[StageConfig]) -> None:
    """Replay names only tasks learnt before."""
    names = [task.name for task in tasks]
    for place, task in enumerate(tasks):
        for replayed in (name for name, share in task.replay.items() if share > 0):
            require(
                replayed in names[: place + 1],
                f"stage {task.index} ({task.name}): replay",
                f"name only tasks learnt by then ({', '.join(names[: place + 1])})",
                replayed,
            )
