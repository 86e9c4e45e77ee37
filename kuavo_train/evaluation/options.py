"""The arguments of `python -m kuavo_train.evaluate`."""

import re
from dataclasses import dataclass, fields
from pathlib import Path

from kuavo_client import HANDOVERS
from kuavo_train.command_line import nearest, option
from kuavo_train.errors import ConfigError, one_of, require
from kuavo_train.evaluation.ablations import ABLATIONS
from kuavo_train.reading import Json

NOT_WITH_DATA = (
    *("environment", "environment_settings", "max_steps", "n_action_steps", "videos", "workers"),
    *("delay_ms", "handover"),
)


@dataclass(frozen=True)
class Options:
    """`checkpoints` are in the order given; the others are compared with the first."""

    checkpoints: dict[str, str] = option("a checkpoint by a name of yours: a folder, or a hub id", takes="NAME")
    tasks: tuple[str, ...] | None = option("by name; none: all that every checkpoint has learnt", None)
    n_episodes: int | None = option("per task, or of a dataset; none: 50 in simulation, all of a dataset", None)
    seed: int = option("of the layouts, and of the policies' noise", 0)
    output: Path = option("the JSON; page, figures and videos lie beside it", Path("evaluation_results.json"))
    parallel: int = option("robots at a time", 8)
    workers: int | None = option("processes that simulate; none: one per CPU", None)
    device: str | None = option("cpu, cuda or mps; none: a GPU where there is one", None)
    cuda_graphs: bool = option("each query as one CUDA graph", False)
    max_steps: int | None = option("time limit of an episode; none: the environment's own", None)
    n_action_steps: tuple[int, ...] = option("horizons of execution, a row each", ())
    sampling_temperature: tuple[float, ...] = option("of the noise actions are denoised from, a row each", ())
    delay_ms: tuple[float, ...] = option("from a look to its answer, while the robot goes on moving: a row each", ())
    handover: tuple[str, ...] = option(f"from chunk to chunk, a row each: {', '.join(HANDOVERS)}", ())
    ablate: tuple[str, ...] = option(f"what is taken away, a row each: {', '.join(ABLATIONS)}", ())
    videos: int = option("per checkpoint and task", 0)
    environment: str | None = option("gymnasium's module:id in place of kuavo_sim's", None)
    environment_settings: Json = option("a setting of the environment", takes="environment.KEY")
    data: Path | None = option("LeRobot dataset, or a folder of them by task, in place of a simulator", None)

    def __post_init__(self) -> None:
        if not self.checkpoints:
            raise ConfigError("arguments must name a checkpoint, NAME=outputs/<run>/stage…/checkpoints/best, got none")
        for name, checkpoint in self.checkpoints.items():
            _check_checkpoint(name, checkpoint)
        for key in ("n_episodes", "parallel", "workers", "max_steps"):
            value = getattr(self, key)
            require(value is None or value >= 1, key, "be at least 1", value)
        for key in ("seed", "videos"):
            require(getattr(self, key) >= 0, key, "not be negative", getattr(self, key))
        require(
            all(steps >= 1 for steps in self.n_action_steps), "n_action_steps", "be at least 1", self.n_action_steps
        )
        for temperature in self.sampling_temperature:
            require(0 <= temperature <= 1, "sampling_temperature", "be in [0, 1]", temperature)
        require(all(delay >= 0 for delay in self.delay_ms), "delay_ms", "not be negative", self.delay_ms)
        for kind in self.handover:
            one_of("handover", kind, HANDOVERS)
        both = bool(self.delay_ms) == bool(self.handover)
        require(both, "delay_ms and handover", "be given together", (self.delay_ms, self.handover))
        for name in self.ablate:
            one_of("ablate", name, ABLATIONS)
        require(self.output.suffix == ".json", "output", "be a .json file", str(self.output))
        for key in () if self.data is None else NOT_WITH_DATA:
            if getattr(self, key):
                raise ConfigError(f"{key} must not be given with data: demonstrations are walked, not simulated")
        if self.environment is not None:
            require(self.tasks is not None and len(self.tasks) == 1, "tasks", "be one with environment", self.tasks)


def _check_checkpoint(name: str, text: str) -> None:
    is_name = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_+-]*", name)
    is_hub_id = re.fullmatch(r"[^/\s]+/[^/\s]+", text)
    if not is_name or not (is_hub_id or Path(text).exists()):
        keys = [each.name for each in fields(Options) if not each.metadata["takes"]]
        raise ConfigError(
            f"{name} must be an option ({', '.join(keys)}, environment.KEY), or a name for a checkpoint that is there, "
            f"got {text!r}{nearest(name, keys)}"
        )
