"""Worlds for rollouts that need no physics; importing it registers them."""

import os
import time
from typing import Any

import gymnasium
import numpy as np

CAMERAS = ("head_cam_h", "wrist_cam_l", "wrist_cam_r")  # as small_datasets, whose imports take seconds


class Counting(gymnasium.Env):
    """The state counts the steps; an episode succeeds at its goal, `3 + seed % 5` steps, if all actions were its seed.

    `fails` says what goes wrong in which episode: seed → raise, die or hang, at the second step. Its picture shows the
    number of the last step that was drawn.
    """

    draws = True

    def __init__(self, fails: dict[int, str] | None = None):
        self.fails = fails or {}
        self.action_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        super().reset(seed=seed)
        assert seed is not None
        self.seed, self.steps, self.right = seed, 0, True
        return self._observation(), self._info()

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        self.steps += 1
        if self.steps == 2 and self.seed in self.fails:
            self._fail(self.fails[self.seed])
        self.right = self.right and bool(np.all(action == self.seed))
        goal = 3 + self.seed % 5
        return self._observation(), 0.5, self.steps == goal and self.right, self.steps >= 2 * goal, self._info()

    def _fail(self, how: str) -> None:
        if how == "die":
            os._exit(1)
        if how == "hang":
            time.sleep(3600)
        raise RuntimeError("the arm fell off")

    def _observation(self) -> dict:
        if self.draws or not self.steps:
            self.picture = np.full((4, 4, 3), self.steps, np.uint8)
        return {"pixels": {"head": self.picture}, "agent_pos": np.array([self.seed, self.steps], np.float32)}

    def _info(self) -> dict:
        goal = 3 + self.seed % 5
        done = self.steps >= goal and self.right
        return {
            "is_success": done,
            "subgoals": {"under_way": self.steps >= 2, "there": done},
            "progress": ((self.steps >= 2) + done) / 2,
            "cue": self.seed % 2,
            "choice": 0 if self.steps >= 2 else None,
        }


gymnasium.register("Counting-v0", entry_point="worlds:Counting")


class Arms(gymnasium.Env):
    """Three cameras and 16 joints, as the small datasets have; over after three steps, a success in even episodes."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        super().reset(seed=seed)
        assert seed is not None
        self.seed, self.steps, self.state = seed, 0, np.zeros(16, np.float32)
        return self._observation(), {"is_success": False}

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        assert action.shape == (16,)
        self.steps, self.state = self.steps + 1, np.clip(action, -1, 1).astype(np.float32)
        return self._observation(), 0.0, self.steps == 3, False, {"is_success": self.steps == 3 and self.seed % 2 == 0}

    def _observation(self) -> dict:
        pictures = self.np_random.integers(0, 256, (len(CAMERAS), 32, 32, 3), dtype=np.uint8)
        return {"pixels": dict(zip(CAMERAS, pictures, strict=True)), "agent_pos": self.state}


gymnasium.register("Arms-v0", entry_point="worlds:Arms")
