"""The typed schema of configs/.

Hydra composes YAML; compose.py turns the result into the frozen dataclasses of this room, once, in the runnable
modules. Below them there is no DictConfig. Every dataclass checks itself and names key, rule and value.

Imports of the project only errors, the limits of verdicts and the names of JSON.
"""

from kuavo_train.config.data import AugmentationConfig, DataConfig, SimulationConfig
from kuavo_train.config.engine import EngineConfig
from kuavo_train.config.folders import CONFIG_FOLDER, MODELS_FOLDER, register_resolvers
from kuavo_train.config.keeping import (
    AdaptersConfig,
    DistillConfig,
    EwcConfig,
    ForgettingConfig,
    MergeConfig,
    ReplayConfig,
)
from kuavo_train.config.run import MIXTURES_OF, RunConfig, TinyVLMConfig, WandbConfig
from kuavo_train.config.stage import FROM_DATASET, StageConfig, check_curriculum, check_shares
from kuavo_train.config.training import LoraConfig, RolloutConfig, TrainingConfig, ValidationConfig

__all__ = [
    "CONFIG_FOLDER",
    "FROM_DATASET",
    "MIXTURES_OF",
    "MODELS_FOLDER",
    "AdaptersConfig",
    "AugmentationConfig",
    "DataConfig",
    "DistillConfig",
    "EngineConfig",
    "EwcConfig",
    "ForgettingConfig",
    "LoraConfig",
    "MergeConfig",
    "ReplayConfig",
    "RolloutConfig",
    "RunConfig",
    "SimulationConfig",
    "StageConfig",
    "TinyVLMConfig",
    "TrainingConfig",
    "ValidationConfig",
    "WandbConfig",
    "check_curriculum",
    "check_shares",
]

register_resolvers()
