"""Where a task is performed in closed loop, and from which layouts."""

from dataclasses import dataclass, field

import gymnasium

from kuavo_sim import ENVIRONMENT_IDS, EVALUATION_SEED_START
from kuavo_train.config import RolloutConfig, SimulationConfig, StageConfig
from kuavo_train.errors import ConfigError, one_of
from kuavo_train.reading import Json


@dataclass(frozen=True)
class Environment:
    """
    Attributes:
        id: gymnasium's, with the module that registers it: "kuavo_sim:kuavo_sim/Weighing-v0".
        task: instruction or name of a learnt task, as the policy gets it.
        settings: of the environment itself, as for `gymnasium.make`.
        max_steps: the time limit of an episode; None leaves it to the environment.
    """

    id: str
    task: str
    settings: Json = field(default_factory=dict)
    max_steps: int | None = None

    @property
    def name(self) -> str:
        """The id without the module."""
        return self.id.rpartition(":")[2]

    def make(self) -> gymnasium.Env:
        """Raises what gymnasium raises where there is no such environment."""
        return gymnasium.make(self.id, disable_env_checker=True, **self.settings)


SEEDS_PER_EVALUATION = 10_000


def evaluation_seeds(episodes: int, *, seed: int = 0) -> list[int]:
    """Seeds disjoint from all demonstrations', and from those of another evaluation's `seed`.

    Raises:
        ValueError: more episodes than one evaluation has seeds.
    """
    if not 1 <= episodes <= SEEDS_PER_EVALUATION:
        raise ValueError(f"episodes must be in [1, {SEEDS_PER_EVALUATION}], got {episodes}")
    start = EVALUATION_SEED_START + SEEDS_PER_EVALUATION * seed
    return list(range(start, start + episodes))


def environment_of(
    stage: StageConfig, instruction: str, simulation: SimulationConfig | None, rollout: RolloutConfig
) -> Environment:
    """Where a task is rolled out: the environment it names, or kuavo_sim as its demonstrations were recorded.

    Args:
        instruction: what the policy gets there.

    Raises:
        ConfigError: there is none.
    """
    where = f"stage {stage.index} ({stage.name}):"
    limit = {"max_steps": rollout.max_steps}
    if stage.environment is not None:
        return Environment(stage.environment, instruction, stage.environment_settings, **limit)
    if simulation is None or stage.simulation_task is None:
        rule = "name one to roll out in, or rollout.episodes be 0 for those who have only data"
        none = " with simulation=null, which leaves out kuavo_sim's" if stage.simulation_task is not None else ""
        raise ConfigError(f"{where} environment must {rule}, got {stage.environment!r}{none}")
    one_of(f"{where} simulation_task", stage.simulation_task, ENVIRONMENT_IDS)
    keep = ("image_size", "renderer", "phase_visible")
    settings = {key: getattr(simulation, key) for key in keep}
    return Environment(f"kuavo_sim:{ENVIRONMENT_IDS[stage.simulation_task]}", instruction, settings, **limit)
