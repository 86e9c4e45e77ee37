"""The tasks as gymnasium environments: `gymnasium.make("kuavo_sim/Weighing-v0")`.

Observations follow LeRobot's convention for environments:
`{"pixels": {camera: [H, W, 3] uint8}, "agent_pos": [16] float32}`.
"""

from typing import Any, NotRequired, TypedDict

import gymnasium
import numpy as np

from kuavo_sim.picture_size import ImageSize, height_and_width
from kuavo_sim.render import RENDERERS, RayRenderer, Renderer, depth_picture, make_renderer
from kuavo_sim.repertoire import REPERTOIRE
from kuavo_sim.robot import CAMERAS, DEPTHS, FPS, STATE_NAMES, action_limits
from kuavo_sim.tasks.task import Task

_OVERVIEW_SIZE = 256
Info = dict[str, Any]
"""As gymnasium has it, for what an environment says of a step and for the options of a reset; see `KuavoEnv`."""


class Observation(TypedDict):
    pixels: dict[str, np.ndarray]
    agent_pos: np.ndarray
    depth: NotRequired[dict[str, np.ndarray]]


class KuavoEnv(gymnasium.Env):
    """One task, stepped at 10 Hz with absolute joint targets.

    An action beyond its limits is clipped to them. The reward is the change of progress, plus 1 on success.
    An episode terminates on success, or when the robot has acted on the wrong cue (then `info["failed"]`), and is
    truncated at the time limit.

    `info`: success and is_success (bool), failed (bool), subgoals (name → bool), progress (float in [0, 1]), cue and
    choice (int or None: what was demanded, what the robot did), decision_point (bool: this observation is the first
    whose right action depends on the cue); of a skill also instruction (str, of this episode).

    While `draws` is false, steps take no pictures, which is most of their time: what is observed holds the last ones.

    Args:
        task: name, of a job or a skill.
        image_size: side of square pictures in pixels, or (height, width).
        renderer: "rays", "egl" or "none" (black pictures, physics only).
        phase_visible: whether lamps show which phase the job is in (weighing: the "done" light).
        depth: whether observations also hold "depth", {name: [H, W] uint8}, in cm along the axis of each camera (255
            is 2.55 m and farther); needs the renderer "rays".
        max_episode_steps: time limit in steps; the task's own when None.
        render_mode: "rgb_array" or None. `render()` gives an outside view.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": FPS}  # noqa: RUF012

    def __init__(
        self,
        task: str,
        *,
        image_size: ImageSize = 64,
        renderer: str = "rays",
        phase_visible: bool = True,
        depth: bool = False,
        max_episode_steps: int | None = None,
        render_mode: str | None = None,
    ):
        if task not in REPERTOIRE:
            raise ValueError(f"task must be one of {', '.join(REPERTOIRE)}, got {task!r}")
        height, width = height_and_width(image_size)
        if not 8 <= min(height, width) <= max(height, width) <= 1024:
            raise ValueError(f"image_size must be in [8, 1024] pixels, got {image_size}")
        if renderer not in RENDERERS:
            raise ValueError(f"renderer must be one of {', '.join(RENDERERS)}, got {renderer!r}")
        if depth and renderer != "rays":
            raise ValueError(f"renderer must be rays with depth=True, got {renderer!r}")
        if render_mode not in (None, "rgb_array"):
            raise ValueError(f'render_mode must be "rgb_array" or None, got {render_mode!r}')
        if max_episode_steps is not None and max_episode_steps < 1:
            raise ValueError(f"max_episode_steps must be at least 1, got {max_episode_steps}")
        self.task: Task = REPERTOIRE[task](phase_visible=phase_visible)
        self.image_size, self.renderer, self.render_mode = image_size, renderer, render_mode
        self.depth, self.draws = depth, True
        self._pixels: dict[str, np.ndarray] = {}
        self._depth: dict[str, np.ndarray] = {}
        self._max_episode_steps = max_episode_steps or self.task.time_limit  # LeRobot's evaluator reads this name
        self.task_description = self.task.instruction  # and this one
        self._renderer: Renderer | None = None
        self._low, self._high = low, high = action_limits(mobile=self.task.mobile)
        self.action_space = gymnasium.spaces.Box(low, high, dtype=np.float32)
        picture = gymnasium.spaces.Box(0, 255, (height, width, 3), np.uint8)
        observed: dict[str, gymnasium.Space] = {
            "pixels": gymnasium.spaces.Dict(dict.fromkeys(CAMERAS, picture)),
            "agent_pos": gymnasium.spaces.Box(-np.pi, np.pi, (len(STATE_NAMES),), np.float32),
        }
        if depth:
            grey = gymnasium.spaces.Box(0, 255, (height, width), np.uint8)
            observed["depth"] = gymnasium.spaces.Dict(dict.fromkeys(DEPTHS, grey))
        self.observation_space = gymnasium.spaces.Dict(observed)

    def reset(self, *, seed: int | None = None, options: Info | None = None) -> tuple[Observation, Info]:
        """Begin an episode; `options={"cue": i}` demands a cue, with everything else as the seed would have it."""
        super().reset(seed=seed)
        options = options or {}
        unknown = {name for name in options if name != "cue" and not name.startswith("lerobot_")}  # its evaluator's own
        if unknown:
            raise ValueError(f"reset options may hold only 'cue', got {sorted(unknown)}")
        cue = None
        if self.task.cues:
            drawn = int(self.np_random.integers(len(self.task.cues)))
            cue = options.get("cue", drawn)
            if cue not in range(len(self.task.cues)):
                raise ValueError(f"cue of {self.task.name} must be in 0…{len(self.task.cues) - 1}, got {cue!r}")
        elif options.get("cue") is not None:
            raise ValueError(f"{self.task.name} has no cue, got {options['cue']!r}")
        self.task.reset(self.np_random, cue)
        self.task_description = self.task.instruction
        if self._renderer is not None:
            self._renderer.close()
        self._renderer = make_renderer(self.renderer, self.task.world.model, self.image_size)
        self._draw()
        return self._observation(), self._info()

    def step(self, action: np.ndarray) -> tuple[Observation, float, bool, bool, Info]:
        if self._renderer is None:
            raise RuntimeError("call reset() before step()")
        action = np.asarray(action, np.float64)
        if action.shape != self.action_space.shape:
            raise ValueError(
                f"action of {self.task.name} must have shape {self.action_space.shape}, got {action.shape}"
            )
        if not np.isfinite(action).all():
            raise ValueError(f"action must be finite, got {action}")
        before = self.task.progress
        self.task.world.step(np.clip(action, self._low, self._high))
        self.task.after_step()
        success = self.task.success
        reward = self.task.progress - before + float(success)
        terminated = success or self.task.failed
        truncated = not terminated and self.task.steps >= self._max_episode_steps
        if self.draws:
            self._draw()
        return self._observation(), reward, terminated, truncated, self._info()

    def render(self) -> np.ndarray | None:
        """The scene from outside, [256, 256, 3] uint8, with `render_mode="rgb_array"`."""
        if self.render_mode is None:
            return None
        view = make_renderer(self.renderer, self.task.world.model, _OVERVIEW_SIZE)
        try:
            return view.render(self.task.world.data, "overview")
        finally:
            view.close()

    def close(self) -> None:
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None

    def _draw(self) -> None:
        assert self._renderer is not None
        data = self.task.world.data
        if not self.depth:
            self._pixels = {camera: self._renderer.render(data, camera) for camera in CAMERAS}
            return
        assert isinstance(self._renderer, RayRenderer)
        seen = {camera: self._renderer.render_with_depth(data, camera) for camera in CAMERAS}
        self._pixels = {camera: picture for camera, (picture, _) in seen.items()}
        self._depth = {name: depth_picture(seen[camera][1]) for name, camera in DEPTHS.items()}

    def _observation(self) -> Observation:
        agent_pos = np.clip(self.task.world.state(), -np.pi, np.pi).astype(np.float32)
        seen: Observation = {"pixels": dict(self._pixels), "agent_pos": agent_pos}
        if self.depth:
            seen["depth"] = dict(self._depth)
        return seen

    def _info(self) -> Info:
        task = self.task
        own_words = {"instruction": task.instruction} if task.words_vary else {}
        return {
            **own_words,
            "success": task.success,
            "is_success": task.success,
            "failed": task.failed,
            "subgoals": dict(task.reached),
            "progress": task.progress,
            "cue": task.cue,
            "choice": task.choice,
            "decision_point": task.at_decision_point,
        }
