"""Pictures of the scene. "rays": one ray per pixel by `mj_multiRay`, shaded in numpy; needs no OpenGL and no display.

The three renderers give different pictures of the same scene, so the choice is explicit and is written into a
dataset's recording.json; none of them ever stands in for another.
"""

import os
from collections.abc import Callable
from typing import Protocol

import mujoco
import numpy as np

from kuavo_sim.picture_size import ImageSize, height_and_width

RENDERERS = ("rays", "egl", "none")

_TO_LIGHT = np.array([-0.35, 0.25, 0.9]) / np.linalg.norm([-0.35, 0.25, 0.9])
_AMBIENT, _DIFFUSE = 0.5, 0.5
_BACKGROUND = np.array([168, 186, 204], np.float32)
_FAR = 6.0  # m; rays end here
_HIDDEN_GROUP = 3  # geoms that collide but are not drawn
_LEVELS_PER_M = 100.0


def depth_picture(depth: np.ndarray) -> np.ndarray:
    """Distances [H, W] in m → [H, W] uint8 in cm; 255 is 2.55 m and farther."""
    return np.clip(np.rint(depth * _LEVELS_PER_M), 0, 255).astype(np.uint8)


class Renderer(Protocol):
    """Draws one camera of the scene it was made for."""

    def render(self, data: mujoco.MjData, camera: str) -> np.ndarray:
        """The picture [H, W, 3] uint8 that `camera` takes now."""
        ...

    def close(self) -> None: ...


class RayRenderer:
    """One ray per pixel, a fixed light, no shadows: the same picture on every machine."""

    def __init__(self, model: mujoco.MjModel, size: ImageSize):
        self._model, self._size = model, height_and_width(size)
        self._groups = np.ones(6, np.uint8)
        self._groups[_HIDDEN_GROUP] = 0
        self._rays = {
            model.camera(i).name: _pixel_rays(float(model.cam_fovy[i]), *self._size) for i in range(model.ncam)
        }
        n = self._size[0] * self._size[1]
        self._geoms = np.empty(n, np.int32)
        self._distances = np.empty(n)
        self._normals = np.empty(3 * n)

    def render(self, data: mujoco.MjData, camera: str) -> np.ndarray:
        return self.render_with_depth(data, camera)[0]

    def render_with_depth(self, data: mujoco.MjData, camera: str) -> tuple[np.ndarray, np.ndarray]:
        """The picture, and for each of its pixels [H, W] the distance in m along the camera's axis, or inf."""
        camera_id = self._model.camera(camera).id
        directions = self._rays[camera] @ data.cam_xmat[camera_id].reshape(3, 3).T
        mujoco.mj_multiRay(
            self._model,
            data,
            data.cam_xpos[camera_id],
            directions.ravel(),
            self._groups,
            True,
            -1,
            self._geoms,
            self._distances,
            self._normals,
            len(self._geoms),
            _FAR,
        )
        colours = np.empty((self._model.ngeom + 1, 3), np.float32)
        colours[:-1] = self._model.geom_rgba[:, :3] * 255.0
        colours[-1] = _BACKGROUND  # geom −1: the ray hit nothing
        light = np.clip(self._normals.reshape(-1, 3) @ _TO_LIGHT, 0.0, 1.0)
        light = np.where(self._geoms < 0, 1.0, _AMBIENT + _DIFFUSE * light).astype(np.float32)
        picture = colours[self._geoms] * light[:, None]
        along_axis = -self._rays[camera][:, 2]
        depth = np.where(self._geoms < 0, np.inf, self._distances * along_axis)
        return np.rint(picture).astype(np.uint8).reshape(*self._size, 3), depth.reshape(self._size)

    def close(self) -> None:
        """Nothing to give back."""


class EglRenderer:
    """MuJoCo's own OpenGL renderer on an EGL device."""

    def __init__(self, model: mujoco.MjModel, size: ImageSize):
        # MuJoCo reads the variable when it is first imported, so it cannot be set for the user here.
        if (chosen := os.environ.get("MUJOCO_GL")) != "egl":
            raise RuntimeError(f'renderer="egl" needs MUJOCO_GL=egl in the environment of the process, got {chosen!r}')
        try:
            self._renderer = mujoco.Renderer(model, *height_and_width(size))
        except Exception as error:  # what is raised depends on the driver
            raise RuntimeError(
                f'renderer="egl" could not open an EGL device ({error!r}). Install a driver with EGL, or choose '
                'renderer="rays", which needs none.'
            ) from error

    def render(self, data: mujoco.MjData, camera: str) -> np.ndarray:
        self._renderer.update_scene(data, camera=camera)
        return self._renderer.render()

    def close(self) -> None:
        self._renderer.close()


class NoRenderer:
    """Black pictures, for runs of which only the physics matters."""

    def __init__(self, model: mujoco.MjModel, size: ImageSize):
        self._size = height_and_width(size)

    def render(self, data: mujoco.MjData, camera: str) -> np.ndarray:
        return np.zeros((*self._size, 3), np.uint8)

    def close(self) -> None:
        """Nothing to give back."""


def make_renderer(name: str, model: mujoco.MjModel, size: ImageSize) -> Renderer:
    """The renderer called `name`.

    Raises ValueError for an unknown name and RuntimeError where EGL is chosen and not available.
    """
    makers: dict[str, Callable[[mujoco.MjModel, ImageSize], Renderer]] = dict(
        zip(RENDERERS, (RayRenderer, EglRenderer, NoRenderer), strict=True)
    )
    if name not in makers:
        raise ValueError(f"renderer must be one of {', '.join(RENDERERS)}, got {name!r}")
    return makers[name](model, size)


def _pixel_rays(fovy: float, height: int, width: int) -> np.ndarray:
    """Unit directions [H·W, 3] in the camera's frame (x right, y up, looking along −z), row by row from the top.

    `fovy` in degrees is the vertical field of view; a wider picture sees more to its sides.
    """
    half = np.tan(np.deg2rad(fovy) / 2)
    across, down = ((np.arange(side) + 0.5) / side * 2 - 1 for side in (width, height))
    x, y = np.meshgrid(across * (half * (width / height)), -down * half)
    rays = np.stack([x, y, -np.ones_like(x)], axis=-1).reshape(-1, 3)
    return rays / np.linalg.norm(rays, axis=1, keepdims=True)
