"""What a policy learns from: demonstrations, given or recorded in the simulation."""

from dataclasses import dataclass, field
from pathlib import Path

from kuavo_train.errors import one_of, require
from kuavo_train.reading import Json


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
