"""What a robot asks: its observation, and what it says of its episode."""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from lerobot.utils.constants import OBS_STATE
from PIL import Image

from kuavo_train.serving.wire import unpack

LONGEST_ID = 64
OTHER_KEYS = ("task", "prompt", "reset", "seed", "session", "executed", "chunk", "delay")
LARGEST_SEED = 2**63 - 1


class RequestError(ValueError):
    """A request that cannot be answered; the text names key, rule and value. The session lives on."""


@dataclass(frozen=True)
class Request:
    """
    Attributes:
        observation: as `SmolVLAPolicyWrapper.look` takes it, but for its values, which it checks.
        reset: an episode begins.
        seed: of the episode's noise; None leaves it to the session.
        session: an id under which the robot may go on after it has lost its connection.
        executed: steps carried out since the look of the last answer; None for as many as in training.
        chunk: the number of the last answer that the robot has; None for the last one that was given.
        delay: steps that are carried out before the answer comes, which the new chunk is to begin with.
    """

    observation: Mapping[str, Any]
    reset: bool = False
    seed: int | None = None
    session: str | None = None
    executed: int | None = None
    chunk: int | None = None
    delay: int | None = None


def read_request(message: bytes, cameras: Mapping[str, tuple[int, int]], *, largest: int) -> Request:
    """
    Args:
        cameras: camera → (height, width), the largest that a picture may have.
        largest: bytes.

    Raises:
        RequestError, WireError: saying what is wrong with it.
    """
    if len(message) > largest:
        raise RequestError(f"a request must hold at most {largest} bytes, got {len(message)}; send pictures as JPEG")
    given = unpack(message)
    if not isinstance(given, dict) or not all(isinstance(key, str) for key in given):
        _refuse("a request", "be a map from text", type(given).__name__)
    unknown = [key for key in given if key not in OTHER_KEYS and not key.startswith("observation.")]
    if unknown:
        _refuse("keys", f"be observation.… or one of {', '.join(OTHER_KEYS)}", ", ".join(unknown)[:200])
    if given.get("task") is not None and given.get("prompt") is not None and given["task"] != given["prompt"]:
        _refuse("task and prompt", "be the same, or one of them be given", (given["task"], given["prompt"]))
    observation = {key: _picture(key, given.get(key), size) for key, size in cameras.items() if key in given}
    if OBS_STATE in given:
        if not isinstance(given[OBS_STATE], np.ndarray | list) or np.asarray(given[OBS_STATE]).dtype.kind not in "fiu":
            _refuse(OBS_STATE, "be an array of numbers", type(given[OBS_STATE]).__name__)
        observation[OBS_STATE] = np.asarray(given[OBS_STATE])
    task = given.get("task") if given.get("task") is not None else given.get("prompt")
    return Request(
        {**observation, "task": task},
        reset=_flag(given, "reset"),
        seed=_whole(given, "seed", LARGEST_SEED),
        session=_session(given.get("session")),
        executed=_whole(given, "executed"),
        chunk=_whole(given, "chunk"),
        delay=_whole(given, "delay"),
    )


def _picture(key: str, value: object, largest: tuple[int, int]) -> np.ndarray:
    """[H, W, 3] uint8 of an array in either order or of a JPEG, or [F, H, W, 3]."""
    if isinstance(value, bytes):
        return _decoded(key, value, largest)
    if isinstance(value, list) and value and all(isinstance(each, bytes) for each in value):
        frames = [_decoded(key, each, largest) for each in value]
        if len({frame.shape for frame in frames}) > 1:
            _refuse(key, "hold frames of one size", [frame.shape for frame in frames])
        return np.stack(frames)
    if not isinstance(value, np.ndarray) or value.dtype != np.uint8 or value.ndim not in (3, 4):
        got = f"{list(value.shape)} {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
        _refuse(key, "be [H, W, 3] or [3, H, W] uint8, or the bytes of a JPEG", got)
    if value.shape[-1] != 3 and value.shape[-3] == 3:
        return np.moveaxis(value, -3, -1)
    return value


def _decoded(key: str, data: bytes, largest: tuple[int, int]) -> np.ndarray:
    try:
        picture = Image.open(io.BytesIO(data), formats=["JPEG"])  # reads the header alone
        if picture.height > largest[0] or picture.width > largest[1]:
            size = (picture.height, picture.width)
            _refuse(key, f"be at most {largest} (height, width)", size)
        return np.asarray(picture.convert("RGB"))
    except RequestError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise RequestError(f"{key} must be a whole JPEG where it is bytes, got {len(data)} that are not") from error


def _flag(given: Mapping[str, Any], key: str) -> bool:
    value = given.get(key)
    if value is not None and not isinstance(value, bool | np.bool_):
        _refuse(key, "be true or false", value)
    return bool(value)


def _whole(given: Mapping[str, Any], key: str, largest: int = 2**31) -> int | None:
    value = given.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not 0 <= value <= largest:
        _refuse(key, f"be a whole number in [0, {largest}]", value)
    return int(value)


def _session(value: object) -> str | None:
    if value is not None and not (isinstance(value, str) and 0 < len(value) <= LONGEST_ID):
        _refuse("session", f"be text of 1 to {LONGEST_ID} characters", value)
    assert value is None or isinstance(value, str)
    return value


def _refuse(key: str, rule: str, value: object) -> NoReturn:
    raise RequestError(f"{key} must {rule}, got {value!r:.200}")
