"""How one stage learns, and how it is measured."""

from dataclasses import dataclass, field

from kuavo_train.errors import one_of, require


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
