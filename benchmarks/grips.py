"""How far off centre a policy grips, and what becomes of the episode: where precision is lost.

    python -m benchmarks.grips checkpoint=<checkpoint> task=moving_grasp n_episodes=40

The claw of kuavo_sim holds whatever it closes on within 6 cm, where it closes on it. An object held off centre is put
down off its mark, unless the policy sees that and allows for it. For each episode the first grip is measured, from the
object's centre to the tool point, along the table; successes are counted by it. The expert's demonstrations are
measured with checkpoint=expert.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kuavo_sim.env import KuavoEnv
from kuavo_sim.expert import demonstrate
from kuavo_sim.repertoire import REPERTOIRE
from kuavo_sim.robot import SIDES
from kuavo_train.command_line import errors_in_one_line, option, parse, quieten_libraries
from kuavo_train.errors import one_of, require

BANDS = (0.01, 0.02, 0.03, 0.04, np.inf)  # m
EXPERT = "expert"


@dataclass(frozen=True)
class Options:
    checkpoint: str = option("a checkpoint, or expert")
    task: str = option("a job of kuavo_sim, or a skill")
    n_episodes: int = option("layouts", 40)
    seed: int = option("of the layouts, and of the policy's noise", 0)

    def __post_init__(self) -> None:
        one_of("task", self.task, tuple(REPERTOIRE))
        require(self.n_episodes >= 1, "n_episodes", "be at least 1", self.n_episodes)
        require(self.seed >= 0, "seed", "not be negative", self.seed)


@dataclass
class Watched:
    """An environment that remembers how the object was first gripped.

    Attributes:
        grip: [3] m from the object's centre to the tool point; None as long as nothing was.
    """

    env: KuavoEnv
    grip: np.ndarray | None = None
    success: bool = False
    ended: bool = False

    def step(self, action: np.ndarray):
        observation, reward, terminated, truncated, info = self.env.step(action)
        world = self.env.task.world
        side = next((side for side in SIDES if world.holds(side)), None)
        if self.grip is None and side is not None:
            self.grip = world.tool_position(side) - world.object_position()
        self.success, self.ended = info["success"], terminated or truncated
        return observation, reward, terminated, truncated, info


def main(words: Sequence[str]) -> int:
    return errors_in_one_line(lambda: _run(parse(Options, words, help=__doc__)))


def _run(options: Options) -> int:
    quieten_libraries()
    played = by_expert(options) if options.checkpoint == EXPERT else by_policy(options)
    print(table(played))
    return 0


def by_expert(options: Options) -> list[Watched]:
    env = KuavoEnv(options.task, renderer="none", image_size=8)
    played = []
    for seed in range(options.seed, options.seed + options.n_episodes):
        watched = Watched(env)
        demonstrate(_Stepped(env, watched), seed)  # type: ignore[arg-type]
        played.append(watched)
    return played


class _Stepped:
    """An environment whose steps are watched."""

    def __init__(self, env: KuavoEnv, watched: Watched):
        self._env, self._watched = env, watched

    def step(self, action: np.ndarray):
        return self._watched.step(action)

    def __getattr__(self, name: str):
        return getattr(self._env, name)


def by_policy(options: Options) -> list[Watched]:
    from kuavo_train.evaluation.checkpoints import Contestant
    from kuavo_train.evaluation.environment import evaluation_seeds
    from kuavo_train.evaluation.environment_pool import Seen
    from kuavo_train.evaluation.rollout import observation_of
    from kuavo_train.wrapper.policy.smolvla import SmolVLAPolicyWrapper

    folder = Contestant.open("checkpoint", options.checkpoint).folder
    policy = SmolVLAPolicyWrapper.from_pretrained(folder, seed=options.seed)
    seeds = evaluation_seeds(options.n_episodes, seed=options.seed)
    played = [Watched(KuavoEnv(options.task)) for _ in seeds]
    seen = []
    for watched, seed in zip(played, seeds, strict=True):
        observation, info = watched.env.reset(seed=seed)
        seen.append(Seen(observation["pixels"], observation["agent_pos"], info))
    policy.reset(seeds=seeds)
    while not all(watched.ended for watched in played):
        actions = policy.select_action(observation_of(seen, played[0].env.task.instruction))
        for place, watched in enumerate(played):
            if not watched.ended:
                observation, _, _, _, info = watched.step(actions[place])
                seen[place] = Seen(observation["pixels"], observation["agent_pos"], info)
    return played


def table(played: Sequence[Watched]) -> str:
    """Episodes and successes by how far off centre the first grip was."""
    offsets = np.array([np.inf if each.grip is None else np.linalg.norm(each.grip[:2]) for each in played])
    success = np.array([each.success for each in played])
    gripped = offsets[np.isfinite(offsets)]
    lines = ["| first grip off centre by | episodes | success |", "|---|---|---|"]
    low = 0.0
    for high in BANDS:
        here = (offsets >= low) & (offsets < high)
        name = f"{100 * low:.0f} to {100 * high:.0f} cm" if np.isfinite(high) else f"over {100 * low:.0f} cm"
        lines.append(f"| {name} | {here.sum()} | {success[here].sum()} |")
        low = high
    missed = ~np.isfinite(offsets)
    lines.append(f"| nothing gripped | {missed.sum()} | {success[missed].sum()} |")
    lines.append(f"| all | {len(played)} | {success.sum()} |")
    if len(gripped):
        middle, most = 100 * np.quantile(gripped, [0.5, 0.9])
        lines.append(f"\nmedian {middle:.1f} cm, 90 % within {most:.1f} cm")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
