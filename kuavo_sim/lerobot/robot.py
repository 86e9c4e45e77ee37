"""The simulated Kuavo as one of LeRobot's robots: its commands drive it as they would drive a real one.

The job begins when the robot is connected, and every action sent is a tenth of a second of it, however long the policy
has taken. When it is over, or the robot is disconnected, the log says what became of it.
"""

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from lerobot.processor import RobotAction, RobotObservation
from lerobot.robots import Robot, RobotConfig

from kuavo_sim import EVALUATION_SEED_START
from kuavo_sim.lerobot.environment import KuavoSimEnvConfig
from kuavo_sim.picture_size import height_and_width
from kuavo_sim.robot import BASE_NAMES, CAMERAS, STATE_NAMES

if TYPE_CHECKING:
    from kuavo_sim.env import KuavoEnv

logger = logging.getLogger(__name__)


@RobotConfig.register_subclass("kuavo_sim")
@dataclass(kw_only=True)
class KuavoSimRobotConfig(RobotConfig):
    """The robot before one of the jobs.

    A policy of several jobs gets no word here of which dimensions this one lacks, as it does from the evaluator.
    Real-time chunking sends all that the policy has: the robot takes them, and leaves those beyond its own.

    Args:
        task: one of kuavo_sim's `JOBS`.
        image_size, action_dim: of the policy; by default those of the one named by `--policy.path`. The size is the
            side of square pictures, or [height, width].
        renderer, phase_visible: of the environment.
        seed: of the layout; below `EVALUATION_SEED_START` are those of demonstrations.
    """

    task: str = "weighing"
    image_size: int | list[int] | None = None
    action_dim: int | None = None
    renderer: str = "rays"
    phase_visible: bool = True
    seed: int = EVALUATION_SEED_START

    def __post_init__(self) -> None:
        super().__post_init__()
        fitted = KuavoSimEnvConfig(task=self.task, image_size=self.image_size, action_dim=self.action_dim)
        self.image_size, self.action_dim = fitted.image_size, fitted.action_dim


class KuavoSimRobot(Robot):
    """Joints and claws are features named `<name>.pos`, as LeRobot demands; rad, claws in [0, 1]."""

    config_class = KuavoSimRobotConfig
    name = "kuavo_sim"

    def __init__(self, config: KuavoSimRobotConfig):
        super().__init__(config)
        assert config.image_size is not None, "the config has filled it in"
        self.config, self._size = config, config.image_size
        self._env: KuavoEnv | None = None

    @property
    def observation_features(self) -> dict[str, type | tuple[int, ...]]:
        pictures = dict.fromkeys(CAMERAS, (*height_and_width(self._size), 3))
        return {**{_feature(name): float for name in STATE_NAMES}, **pictures}

    @property
    def action_features(self) -> dict[str, type]:
        return {_feature(name): float for name in (STATE_NAMES + BASE_NAMES)[: self.config.action_dim]}

    @property
    def is_connected(self) -> bool:
        return self._env is not None

    def connect(self, calibrate: bool = True) -> None:
        from kuavo_sim.env import KuavoEnv  # needs MuJoCo, and who only registers this robot may have none

        config = self.config
        self._env = KuavoEnv(
            config.task,
            image_size=self._size,
            renderer=config.renderer,
            phase_visible=config.phase_visible,
        )
        self._observation, self._info = self._env.reset(seed=config.seed)
        self._over = False

    def get_observation(self) -> RobotObservation:
        positions = zip(STATE_NAMES, self._observation["agent_pos"], strict=True)
        return {**{_feature(name): float(value) for name, value in positions}, **self._observation["pixels"]}

    def send_action(self, action: RobotAction) -> RobotAction:
        """A step towards the targets; a base without a target stays, and so does a robot's that has none."""
        assert self._env is not None, "connect() comes first"
        names = STATE_NAMES + (BASE_NAMES if self._env.task.mobile else ())
        targets = {_feature(name): float(action.get(_feature(name), 0.0)) for name in names}
        self._observation, _, terminated, truncated, info = self._env.step(np.array(list(targets.values())))
        if not self._over:
            self._info, self._over = info, terminated or truncated
            if self._over:
                self._log_outcome()
        return targets

    def disconnect(self) -> None:
        assert self._env is not None, "connect() comes first"
        if not self._over:
            self._log_outcome()
        self._env.close()
        self._env = None

    def _log_outcome(self) -> None:
        reached = [name for name, is_reached in self._info["subgoals"].items() if is_reached]
        outcome = "done" if self._info["success"] else "not done"
        logger.info("%s: %s, sub-goals reached: %s", self.config.task, outcome, ", ".join(reached) or "none")

    @property
    def is_calibrated(self) -> bool:
        return True

    def calibrate(self) -> None:
        pass

    def configure(self) -> None:
        pass


def _feature(name: str) -> str:
    return f"{name}.pos"
