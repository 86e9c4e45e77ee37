"""Closed loop: a policy drives a robot in any gymnasium environment, episode by episode.

    environment = Environment("kuavo_sim:kuavo_sim/Weighing-v0", "weighing", {"image_size": 64})
    rollouts = roll_out(policy, environment, evaluation_seeds(50))
    rollouts.successes, rollouts.trials

The policy is what a robot process would hold (`SmolVLAPolicyWrapper`): the same processors, the same queues, and its
memory reset where an episode begins. One query serves several robots. An episode is a function of the
checkpoint, the environment and its seed, wherever in the batch it is played, up to the rounding of batched arithmetic.

Environments observe `{"pixels": {camera: [H, W, 3] uint8}, "agent_pos": [S]}`, LeRobot's convention, and report success
as `info["is_success"]`. What else kuavo_sim reports is taken where it is there: sub-goals, progress, cue, choice, and
the episode's own instruction. One that can step without drawing (`draws`) does so where the policy does not look.
"""

import io
from collections import deque
from collections.abc import Mapping, Sequence

import numpy as np
from lerobot.utils.constants import OBS_IMAGES, OBS_STATE
from PIL import Image
from tqdm import tqdm

from kuavo_train.evaluation.delayed import Delayed
from kuavo_train.evaluation.environment import Environment
from kuavo_train.evaluation.environment_pool import STEP_TIMEOUT, Act, Begin, Failure, Robots, Seen
from kuavo_train.evaluation.episodes import Episode, Rollouts, Trace
from kuavo_train.evaluation.robot_policy import Policy
from kuavo_train.evaluation.smoothness import HELD, smoothness
from kuavo_train.wrapper.policy.robot_io import Observation


def roll_out(
    policy: Policy,
    environment: Environment,
    seeds: Sequence[int],
    *,
    parallel: int = 8,
    workers: int | None = None,
    names: Sequence[str] | None = None,
    traces: bool = False,
    replayable: bool = False,
    progress: bool = True,
    timeout: float = STEP_TIMEOUT,
) -> Rollouts:
    """Let `policy` play an episode for every seed.

    Args:
        parallel: robots at a time, the batch of the policy.
        workers: processes that their environments are spread over; None for one per CPU.
        names: of the action's dimensions, by which smoothness is told apart; None measures none.
        traces: keep what was seen, done and remembered, of all episodes.
        replayable: keep the same without the pictures, which takes little room.
        timeout: seconds after which an environment that does not answer has failed.

    An episode whose environment fails is reported with the reason; the others go on. What the policy raises is raised.
    """
    places = range(min(parallel, len(seeds)))
    waiting, playing, ended = deque(seeds), dict[int, _Game](), dict[int, Episode]()
    policy.reset(seeds=[0 for _ in places])
    bar = tqdm(total=len(seeds), desc=f"rolling out {environment.name}", unit="episode", disable=not progress)
    with Robots(environment, places=len(places), workers=workers, timeout=timeout) as robots, bar:

        def carry_out(orders: Mapping[int, Begin | Act]) -> None:
            for place, answer in robots.advance(orders).items():
                playing[place].take(answer)
                if playing[place].over:
                    game = playing.pop(place)
                    ended[game.seed] = game.episode()
                    bar.set_postfix_str(
                        f"{sum(episode.success for episode in ended.values())} succeeded", refresh=False
                    )
                    bar.update()

        while waiting or playing:
            begun = {place: waiting.popleft() for place in places if place not in playing and waiting}
            playing |= {
                place: _Game(seed, environment.max_steps, names, traced=traces or replayable, pictured=traces)
                for place, seed in begun.items()
            }
            policy.reset(list(begun), seeds=list(begun.values()))
            carry_out({place: Begin(seed) for place, seed in begun.items()})
            if not playing:
                continue
            anyone = next(iter(playing.values()))  # the batch keeps its size: what idle places see does not matter
            observation = observation_of([playing.get(place, anyone).seen for place in places], environment.task)
            actions = policy.select_action(observation)
            norms = policy.memory_norms() if traces or replayable else None
            chunks = policy.chunks() if isinstance(policy, Delayed) else None
            for place, game in playing.items():
                chunk = game.steps // policy.n_action_steps if chunks is None else chunks[place]
                game.note(actions[place], None if norms is None else norms[place], chunk)
            looking = set(places) if traces else set(policy.due())
            carry_out({place: Act(actions[place], looks=place in looking) for place in playing})
    return Rollouts(environment, policy.n_action_steps, tuple(ended[seed] for seed in seeds))


class _Game:
    """An episode being played."""

    def __init__(self, seed: int, max_steps: int | None, names: Sequence[str] | None, *, traced: bool, pictured: bool):
        self.seed, self._max_steps, self._names = seed, max_steps, names
        self._traced, self._pictured = traced, pictured
        self._pictures: list[dict[str, bytes]] = []
        self._norms: list[np.ndarray] = []
        self._actions: list[np.ndarray] = []
        self._chunks: list[int] = []
        self._rewards: list[float] = []
        self._subgoals: dict[str, int | None] = {}
        self._chosen_at: int | None = None
        self._seen: Seen | None = None
        self._error: str | None = None

    @property
    def seen(self) -> Seen:
        assert self._seen is not None, "it has begun"
        return self._seen

    @property
    def over(self) -> bool:
        timed_out = self._max_steps is not None and len(self._rewards) >= self._max_steps
        return self._error is not None or self.seen.ended or timed_out

    @property
    def steps(self) -> int:
        return len(self._rewards)

    def note(self, action: np.ndarray, memory_norms: np.ndarray | None, chunk: int) -> None:
        """What the policy does next, and the number of the chunk that it is of."""
        self._actions.append(action)
        self._chunks.append(chunk)
        if self._pictured:
            self._pictures.append({camera: _jpeg(picture) for camera, picture in self.seen.pictures.items()})
        if memory_norms is not None:
            self._norms.append(memory_norms)

    def take(self, answer: Seen | Failure) -> None:
        """What comes of it; first, what the episode begins with."""
        if isinstance(answer, Failure):
            self._error = answer.reason
            return
        if self._seen is not None:
            self._rewards.append(answer.reward)
        self._seen = answer
        if self._chosen_at is None and answer.info.get("choice") is not None:
            self._chosen_at = len(self._rewards)
        for name, reached in answer.info.get("subgoals", {}).items():
            if self._subgoals.get(name) is None:
                self._subgoals[name] = len(self._rewards) if reached else None

    def episode(self) -> Episode:
        info = {} if self._seen is None else self._seen.info
        success = bool(info.get("is_success", False))
        return Episode(
            seed=self.seed,
            success=success,
            progress=float(info.get("progress", success)),
            reward=sum(self._rewards),
            steps=len(self._rewards),
            subgoals=self._subgoals,
            cue=info.get("cue"),
            choice=info.get("choice"),
            roughness=_roughness(self._actions),
            smoothness=smoothness(np.stack(self._actions), self._chunks, self._names)
            if self._names and self._actions
            else {},
            held=self._chunks.count(HELD),
            chosen_at=self._chosen_at,
            error=self._error,
            trace=Trace(self._pictures, self._norms, self._actions, info.get("instruction")) if self._traced else None,
        )


def _jpeg(picture: np.ndarray) -> bytes:
    """[H, W, 3] uint8, hardly changed: for eyes, not for policies."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "jpeg", quality=95, subsampling=0)
    return file.getvalue()


def _roughness(actions: Sequence[np.ndarray]) -> float:
    """T of [A] → mean of |a(t+1) − 2 a(t) + a(t−1)|; 0 for fewer than three actions."""
    return float(np.abs(np.diff(np.stack(actions), 2, axis=0)).mean()) if len(actions) > 2 else 0.0


def observation_of(seen: Sequence[Seen], task: str) -> Observation:
    """What the policy is shown, of B robots: each camera [B, H, W, 3], the state [B, S], and what each is told.

    Args:
        task: the instruction where an environment has no words of its own for an episode (`info["instruction"]`).
    """
    cameras = {
        f"{OBS_IMAGES}.{camera}": np.stack([each.pictures[camera] for each in seen]) for camera in seen[0].pictures
    }
    own = [each.info.get("instruction", task) for each in seen]
    told = own if any("instruction" in each.info for each in seen) else task
    return {**cameras, OBS_STATE: np.stack([each.state for each in seen]), "task": told}
