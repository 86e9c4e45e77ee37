"""Everything one stage is made of, and which settings go together."""

import re
from dataclasses import dataclass, field
from pathlib import Path

from kuavo_train.config.data import DataConfig, SimulationConfig
from kuavo_train.config.engine import EngineConfig
from kuavo_train.config.keeping import (
    AdaptersConfig,
    DistillConfig,
    EwcConfig,
    ForgettingConfig,
    MergeConfig,
    ReplayConfig,
)
from kuavo_train.config.stage import StageConfig
from kuavo_train.config.training import RolloutConfig, TrainingConfig, ValidationConfig
from kuavo_train.errors import one_of, require
from kuavo_train.reading import Json


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
