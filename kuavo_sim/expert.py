"""The scripted expert: it does the jobs as their tasks say, and is disturbed on the way.

    python -m kuavo_sim.expert task=weighing episodes=100

prints how often the expert succeeds, with a 95 % Wilson interval.

Demonstrations carry noise, so that they show how to come back to the path: the *executed* action is the expert's plus
autocorrelated joint noise, faded out where precision matters; the *recorded* action is the expert's own, without the
noise. A policy thus sees disturbed states with the right answer to them.
"""

import sys
from dataclasses import dataclass, field

import numpy as np

from kuavo_sim.arguments import Arguments, Readers, parse_arguments
from kuavo_sim.env import KuavoEnv
from kuavo_sim.motions import Script, UnreachableError
from kuavo_sim.robot import ARM_SLICE, action_limits
from kuavo_sim.tasks import TASKS

_NOISE_MEMORY = 0.8  # autocorrelation of the noise from one step to the next


@dataclass(frozen=True)
class Demonstration:
    """One episode by the expert. T steps; observation t is what was seen before action t."""

    seed: int
    instruction: str
    cue: int | None
    success: bool
    states: np.ndarray  # [T, 16] float32
    actions: np.ndarray  # [T, A] float32, clean
    pictures: dict[str, np.ndarray]  # camera → [T, H, W, 3] uint8
    decision_frames: list[int]
    subgoal_frames: dict[str, int]  # sub-goal → first frame that shows it; T if only the state after the last does
    depths: dict[str, np.ndarray] = field(default_factory=dict)  # name → [T, H, W] uint8, of an environment with depth


def demonstrate(env: KuavoEnv, seed: int, *, cue: int | None = None, action_noise: float = 0.025) -> Demonstration:
    """Let the expert do one episode. `action_noise` is the standard deviation of the joint noise in rad."""
    options = {} if cue is None else {"cue": cue}
    observation, info = env.reset(seed=seed, options=options)
    noise_rng = np.random.default_rng([seed, 1])
    noise = np.zeros(16)
    states, actions, pictures, depths = [], [], [], []
    decisions: list[int] = []
    subgoals: dict[str, int] = {}

    def note(frame: int) -> None:
        if info["decision_point"]:
            decisions.append(frame)
        for name, reached in info["subgoals"].items():
            if reached:
                subgoals.setdefault(name, frame)

    note(0)
    ended = False
    task = env.task
    low, high = action_limits(mobile=task.mobile)
    try:
        mishaps = np.random.default_rng([seed, 2]) if action_noise else None
        for command in task.demonstrate(Script(task.world, lambda: task.at_decision_point, mishaps)):
            fresh = noise_rng.normal(0, action_noise, 16)
            noise = _NOISE_MEMORY * noise + np.sqrt(1 - _NOISE_MEMORY**2) * fresh
            executed = command.action + command.offset
            for arm in ARM_SLICE.values():
                executed[arm] += command.noise * noise[arm]
            states.append(observation["agent_pos"])
            pictures.append(observation["pixels"])
            depths.append(observation.get("depth", {}))
            actions.append(command.action.astype(np.float32))
            observation, _, terminated, truncated, info = env.step(np.clip(executed.astype(np.float32), low, high))
            note(len(actions))
            ended = terminated or truncated
            if ended:
                break
    except UnreachableError:
        pass  # the episode counts as failed
    return Demonstration(
        seed=seed,
        instruction=task.instruction,
        cue=info["cue"],
        success=info["success"],
        states=np.array(states, np.float32),
        actions=np.array(actions, np.float32),
        pictures=_stacked(pictures),
        decision_frames=decisions,
        subgoal_frames=subgoals,
        depths=_stacked(depths),
    )


def _stacked(frames: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """T of name → […] become name → [T, …]; nothing of nothing."""
    return {name: np.stack([frame[name] for frame in frames]) for name in (frames[0] if frames else ())}


def success_rate(
    task: str, episodes: int, action_noise: float = 0.025, seed: int = 0
) -> tuple[int, list[int], list[int]]:
    """Let the expert do `episodes` episodes; how many succeed, their lengths in steps, and the seeds that fail."""
    env = KuavoEnv(task, renderer="none", image_size=8)
    lengths, failures = [], []
    for s in range(seed, seed + episodes):
        demonstration = demonstrate(env, s, action_noise=action_noise)
        lengths.append(len(demonstration.actions))
        if not demonstration.success:
            failures.append(s)
    return episodes - len(failures), lengths, failures


def wilson_interval(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval for a success rate (Wilson 1927); 95 % with the default z."""
    rate = successes / trials
    centre = (rate + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * np.sqrt(rate * (1 - rate) / trials + z * z / (4 * trials**2))
    return max(0.0, float(centre - half)), min(1.0, float(centre + half))


def main(words: list[str]) -> int:
    types: Readers = {"task": str, "episodes": int, "action_noise": float, "seed": int}
    try:
        arguments: Arguments = {"task": "all", "episodes": 100} | parse_arguments(
            words, types, f"{__doc__}\nArguments: {', '.join(f'{key}=…' for key in types)}"
        )
        tasks = list(TASKS) if arguments["task"] == "all" else [arguments["task"]]
        if arguments["episodes"] < 1:
            raise ValueError(f"episodes must be at least 1, got {arguments['episodes']}")
        for task in tasks:
            successes, lengths, failures = success_rate(**(arguments | {"task": task}))
            low, high = wilson_interval(successes, len(lengths))
            print(
                f"{task:13} {successes}/{len(lengths)} = {successes / len(lengths):.0%}  "
                f"(95 % interval {low:.1%} to {high:.1%})  steps: mean {np.mean(lengths):.0f}, max {max(lengths)}"
                + (f"  failed seeds: {failures}" if failures else "")
            )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
