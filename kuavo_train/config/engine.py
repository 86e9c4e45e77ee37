"""What trains the cells of a study."""

from dataclasses import dataclass, field

from kuavo_train.errors import one_of, require
from kuavo_train.reading import Json


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
