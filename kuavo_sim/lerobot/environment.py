"""The four jobs as environments of LeRobot's evaluator."""

from dataclasses import dataclass
from typing import Any

import torch
from lerobot.configs import FeatureType, PipelineFeatureType, PolicyFeature, PreTrainedConfig, parser
from lerobot.envs.configs import EnvConfig
from lerobot.processor import (
    ComplementaryDataProcessorStep,
    PolicyActionProcessorStep,
    PolicyProcessorPipeline,
)
from lerobot.utils.constants import ACTION, OBS_IMAGES, OBS_STATE

from kuavo_sim import ENVIRONMENT_IDS, JOBS
from kuavo_sim.picture_size import height_and_width
from kuavo_sim.robot import BASE_NAMES, CAMERAS, FPS, STATE_NAMES

Features = dict[PipelineFeatureType, dict[str, PolicyFeature]]


@EnvConfig.register_subclass("kuavo_sim")
@dataclass
class KuavoSimEnvConfig(EnvConfig):
    """One of kuavo_sim's jobs.

    A policy that has learnt several has the dimensions of them all, arms first as in Kuavo's recordings. Those that
    this job lacks are marked in the policy's input and cut off its actions.

    Args:
        task: one of kuavo_sim's `JOBS`.
        image_size, action_dim: of the policy; by default those of the one named by `--policy.path`. The size is
            the side of square pictures, or [height, width].
        renderer, phase_visible: of the environment.
        episode_length: time limit in steps; the job's own when None.
    """

    task: str | None = "weighing"
    fps: int = FPS
    image_size: int | list[int] | None = None
    action_dim: int | None = None
    renderer: str = "rays"
    phase_visible: bool = True
    episode_length: int | None = None

    def __post_init__(self) -> None:
        if self.task not in JOBS:
            raise ValueError(f"task must be one of {', '.join(JOBS)}, got {self.task!r}")
        policy = _policy_on_the_command_line()
        cameras = policy.image_features if policy is not None else {}
        if self.image_size is None:
            self.image_size = next((list(feature.shape[-2:]) for feature in cameras.values()), 64)
        if self.action_dim is None:
            self.action_dim = self._own_dimensions if policy is None else policy.action_feature.shape[0]
        if self.action_dim < self._own_dimensions:
            raise ValueError(
                f"action_dim must be at least the {self._own_dimensions} of {self.task}, got {self.action_dim}: a "
                "policy of fewer dimensions has not learnt to do it"
            )
        shape = (*height_and_width(self.image_size), 3)
        pictures = {f"{OBS_IMAGES}.{c}": PolicyFeature(FeatureType.VISUAL, shape) for c in CAMERAS}
        self.features = {
            **pictures,
            OBS_STATE: PolicyFeature(FeatureType.STATE, (len(STATE_NAMES),)),
            ACTION: PolicyFeature(FeatureType.ACTION, (self.action_dim,)),
        }
        self.features_map = {key: key for key in self.features}

    @property
    def _own_dimensions(self) -> int:
        from kuavo_sim.tasks import TASKS  # needs MuJoCo, and who only registers this config may have none

        return len(STATE_NAMES) + (len(BASE_NAMES) if TASKS[str(self.task)].mobile else 0)

    @property
    def package_name(self) -> str:
        return "kuavo_sim"

    @property
    def gym_id(self) -> str:
        return ENVIRONMENT_IDS[str(self.task)]

    @property
    def gym_kwargs(self) -> dict[str, object]:
        known = {key: getattr(self, key) for key in ("image_size", "renderer", "phase_visible")}
        limit = {"max_episode_steps": self.episode_length}
        return {**known, **limit, "render_mode": "rgb_array"}  # rendered for the evaluator's videos

    def get_env_processors(self) -> tuple[PolicyProcessorPipeline, PolicyProcessorPipeline]:
        own = self._own_dimensions
        absent = [dimension >= own for dimension in range(self.action_dim or own)]
        return (
            PolicyProcessorPipeline(steps=[MarkAbsentDimensions(absent)]),
            PolicyProcessorPipeline(steps=[KeepOwnDimensions(own)]),
        )


def _policy_on_the_command_line() -> PreTrainedConfig | None:
    """That of `--policy.path`, as LeRobot's evaluator itself finds it; None elsewhere."""
    path = parser.get_path_arg("policy")
    return None if path is None else PreTrainedConfig.from_pretrained(path)


@dataclass
class MarkAbsentDimensions(ComplementaryDataProcessorStep):
    """Adds which dimensions the job lacks, under the key that policies of several jobs read: [B, A] bool."""

    absent: list[bool]

    # Any: as LeRobot has it, with tensors, text and indices in one dictionary.
    def complementary_data(self, complementary_data: dict[str, Any]) -> dict[str, Any]:
        rows = len(complementary_data["task"])
        return {**complementary_data, "action_dim_is_pad": torch.tensor([self.absent] * rows)}

    def transform_features(self, features: Features) -> Features:
        return features


@dataclass
class KeepOwnDimensions(PolicyActionProcessorStep):
    """Actions [B, A of the policy] → [B, A of the job]."""

    dimensions: int

    def action(self, action: torch.Tensor) -> torch.Tensor:
        return action[..., : self.dimensions]

    def transform_features(self, features: Features) -> Features:
        return features
