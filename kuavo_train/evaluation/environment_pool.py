"""Environments in processes of their own: several robots, stepped together, of which one may fail alone.

    with Robots(environment, places=8, workers=2) as robots:
        seen = robots.advance({place: Begin(seed) for place, seed in enumerate(seeds)})
        seen = robots.advance({place: Act(action) for place, action in actions.items()})

Every place holds one environment. What goes wrong in it comes back as a `Failure` in the place of what would have been
seen; a process that dies or hangs fails at all its places, and is replaced.
"""

import contextlib
import multiprocessing
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Protocol, Self, runtime_checkable

import gymnasium
import numpy as np

from kuavo_sim.children import born_deaf, follow_parent, let_children_hear
from kuavo_sim.cpus import usable_cpus
from kuavo_train.evaluation.environment import Environment
from kuavo_train.wrapper.policy.robot_io import Observation

STEP_TIMEOUT = 120.0  # seconds until a process that does not answer is given up


@dataclass(frozen=True)
class Begin:
    """A new episode, drawn from `seed`."""

    seed: int


@dataclass(frozen=True)
class Act:
    """One step with `action` [A] in robot units. What comes of it need not be drawn where nobody looks."""

    action: np.ndarray
    looks: bool = True


@dataclass(frozen=True)
class Seen:
    """What the environment answers. `pictures` are [H, W, 3] uint8 by camera, `state` is [S]."""

    pictures: dict[str, np.ndarray]
    state: np.ndarray
    info: dict[str, Any]  # what an environment adds is its own
    reward: float = 0.0
    ended: bool = False


@dataclass(frozen=True)
class Failure:
    """An environment that cannot go on, and why."""

    reason: str


@runtime_checkable
class Drawing(Protocol):
    """An environment that can do without its pictures, the dear part of a simulation; see `KuavoEnv`."""

    draws: bool


class Robots:
    """`places` environments, spread over `workers` processes (None: one per CPU)."""

    def __init__(
        self, environment: Environment, *, places: int, workers: int | None = None, timeout: float = STEP_TIMEOUT
    ):
        self._environment, self._timeout = environment, timeout
        count = min(places, workers or usable_cpus())
        self._hosts = [_Process(environment) for _ in range(count)]
        self._host_of = [place % count for place in range(places)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for host in self._hosts:
            host.stop()

    def advance(self, orders: Mapping[int, Begin | Act]) -> dict[int, Seen | Failure]:
        """Carry out an order at each of some places, all at once."""
        shares = [{p: order for p, order in orders.items() if self._host_of[p] == n} for n in range(len(self._hosts))]
        for host, share in zip(self._hosts, shares, strict=True):
            if share:
                host.order(share)
        answers: dict[int, Seen | Failure] = {}
        for number, share in enumerate(shares):
            if not share:
                continue
            try:
                answers |= self._hosts[number].answer(self._timeout)
            except (EOFError, OSError, TimeoutError) as error:
                reason = str(error) if isinstance(error, TimeoutError) else "the environment's process died"
                answers |= dict.fromkeys(share, Failure(reason))
                self._hosts[number].stop()
                self._hosts[number] = _Process(self._environment)
        return answers


class _Process:
    """A process with some of the environments, seen from outside."""

    def __init__(self, environment: Environment):
        context = multiprocessing.get_context("spawn")  # not forked: the parent may have threads
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=carry_out_orders, args=(theirs, environment), daemon=True)
        with born_deaf():
            self._process.start()
        theirs.close()  # so that its death is the end of the pipe

    def order(self, orders: Mapping[int, Begin | Act]) -> None:
        """A dead process is noticed when it does not answer."""
        try:
            self._pipe.send(orders)
        except OSError:
            return

    def answer(self, timeout: float) -> dict[int, Seen | Failure]:
        """Raises EOFError or OSError when the process has died, TimeoutError when it is silent."""
        if not self._pipe.poll(timeout):
            raise TimeoutError(f"the environment did not answer within {timeout:g} s")
        return self._pipe.recv()

    def stop(self) -> None:
        self._pipe.close()
        self._process.kill()
        self._process.join()


def carry_out_orders(pipe: Connection, environment: Environment) -> None:
    """What a process does until the other end of the pipe is closed, be it by a kill in the middle of an answer."""
    follow_parent()
    let_children_hear()  # an environment may be a program of its own
    places: dict[int, gymnasium.Env] = {}
    with contextlib.suppress(EOFError, OSError):
        while True:
            orders = pipe.recv()
            pipe.send({place: _obey(places, place, order, environment) for place, order in orders.items()})


def _obey(places: dict[int, gymnasium.Env], place: int, order: Begin | Act, environment: Environment) -> Seen | Failure:
    try:
        if isinstance(order, Begin):
            if place not in places:
                places[place] = environment.make()
            observation, info = places[place].reset(seed=order.seed)  # it is always looked at
            return seen_in(observation, info)
        _check_action(order.action, places[place])
        if isinstance(drawing := places[place].unwrapped, Drawing):
            drawing.draws = order.looks
        observation, reward, terminated, truncated, info = places[place].step(order.action)
        return seen_in(observation, info, reward=float(reward), ended=bool(terminated or truncated))
    except Exception as error:  # whatever an environment does, the others go on
        places.pop(place, None)
        return Failure(f"{type(error).__name__}: {error}")


def _check_action(action: np.ndarray, environment: gymnasium.Env) -> None:
    """Raises ValueError for one of another shape than the environment takes: some would be carried out in part."""
    wanted = getattr(getattr(environment, "action_space", None), "shape", None)
    if wanted is not None and action.shape != wanted:
        raise ValueError(f"actions must be of shape {wanted}, got {action.shape}")


def seen_in(observation: Observation, info: Mapping[str, Any], *, reward: float = 0.0, ended: bool = False) -> Seen:
    """Raises ValueError for an environment that does not observe as LeRobot's do."""
    pixels = observation.get("pixels") if isinstance(observation, Mapping) else None
    if not isinstance(pixels, Mapping) or "agent_pos" not in observation:
        got = sorted(observation) if isinstance(observation, Mapping) else f"no mapping, {type(observation).__name__}"
        raise ValueError(f'observations must be {{"pixels": {{camera: picture}}, "agent_pos": state}}, got {got}')
    pictures = {camera: np.asarray(picture) for camera, picture in pixels.items()}
    return Seen(pictures, np.asarray(observation["agent_pos"], np.float32), dict(info), reward, ended)
