"""What asking a policy costs on this machine: time per query and per action, memory of the process and of the GPU.

One robot at a time, as on the robot, from what its cameras really see; the processors are counted, the robot is not.
"""

import resource
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from time import perf_counter as clock  # in s

import numpy as np
import torch

from kuavo_train.evaluation.environment import Environment
from kuavo_train.evaluation.environment_pool import seen_in
from kuavo_train.evaluation.robot_policy import Policy
from kuavo_train.evaluation.rollout import observation_of
from kuavo_train.reading import Json
from kuavo_train.wrapper.policy.robot_io import Observation

WARM_UP, QUERIES = 3, 30
MIB = 2**20


def time_queries(policy: Policy, environment: Environment, seed: int) -> Json | None:
    """Milliseconds per query and per action, a query's shared among its chunk; None where the environment fails.

    `QUERIES` queries after a warm-up, in episodes from `seed` on.
    """
    try:
        robot = _Robot(environment, seed)
    except Exception:  # whatever an environment raises, it was reported where it was played
        return None
    policy.reset()
    queries, actions = [], []
    for _ in range(WARM_UP + QUERIES):
        spent = []
        for _ in range(policy.n_action_steps):
            observation = robot.observe()
            began = clock()
            action = policy.select_action(observation)
            spent.append(1000 * (clock() - began))
            robot.act(action[0])
        queries.append(spent[0])
        actions.append(sum(spent) / len(spent))
    policy.reset()
    robot.environment.close()
    return {
        "queries": QUERIES,
        "query_ms": _percentiles(queries[WARM_UP:]),
        "action_ms": _percentiles(actions[WARM_UP:]),
    }


class _Robot:
    """One robot that goes on with another episode where one ends; what is remembered does not change what it costs."""

    def __init__(self, environment: Environment, seed: int):
        self.environment, self._task, self._seed = environment.make(), environment.task, seed
        self._begin()

    def _begin(self) -> None:
        self._seen = seen_in(*self.environment.reset(seed=self._seed))

    def observe(self) -> Observation:
        return observation_of([self._seen], self._task)

    def act(self, action: np.ndarray) -> None:
        observation, _, terminated, truncated, info = self.environment.step(action)
        self._seen = seen_in(observation, info)
        if terminated or truncated:
            self._seed += 1
            self._begin()


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    return {f"p{level}": float(np.percentile(values, level)) for level in (50, 95)}


class PeakMemory:
    """The most memory held since this was made, in MiB.

    Outside Linux, the process's peak is that since it began: it cannot be set back there.
    """

    def __init__(self) -> None:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # see proc(5): sets the peak back to what is held now
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def record(self) -> dict[str, float | None]:
        gpu = torch.cuda.max_memory_allocated() / MIB if torch.cuda.is_available() else None
        return {"peak_rss_mib": _peak_rss(), "peak_gpu_mib": gpu}


def _peak_rss() -> float:
    if sys.platform == "linux":
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / MIB if sys.platform == "darwin" else peak / 1024
