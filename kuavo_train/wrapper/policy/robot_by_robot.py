"""Any policy of LeRobot's for several robots at once, each with a plan, a history and randomness of its own.

LeRobot's policies keep one queue for their whole batch: robots that begin their episodes at different times would carry
out each other's plans. Here every robot has queries of its own.
"""

from collections import deque
from collections.abc import Sequence

import numpy as np
import torch
from lerobot.policies.pretrained import PreTrainedPolicy
from torch import Tensor

from kuavo_train.data.batch import Prepared


class RobotByRobot:
    """Queried like `SmolVLAMemoryPolicy`, with `seeds`, one of each robot, in place of noise. It remembers nothing."""

    def __init__(self, policy: PreTrainedPolicy):
        self.policy, self.config = policy, policy.config
        self.frames = len(policy.config.observation_delta_indices or (0,))
        self.reset()

    def reset(self, indices: Sequence[int] | None = None) -> None:
        """A new episode begins, for all robots or for some: nothing planned, nothing seen before."""
        if indices is None:
            self._seen: list[deque[dict[str, Tensor]]] = []  # of each robot, the frames that the policy looks at
            self._planned: list[list[Tensor]] = []
            return
        for index in indices if self._seen else ():
            self._seen[index].clear()
            self._planned[index].clear()

    def forget(self) -> None:
        """There is no memory."""

    def get_memory(self) -> None:
        return None

    def draw_noise(self, generators: Sequence[np.random.Generator]) -> list[int]:
        """A seed of each robot: what the policy itself draws is a function of it."""
        return [int(generator.integers(2**63)) for generator in generators]

    def select_action(self, batch: Prepared, seeds: Sequence[int]) -> Tensor:
        """The next action [B, A], normalized, of a plan made every `n_action_steps` calls."""
        self._observe(batch, len(seeds))
        for robot, (planned, seed) in enumerate(zip(self._planned, seeds, strict=True)):
            if not planned:
                planned += self._plan(self._seen[robot], seed)[: self.config.n_action_steps]
        return torch.stack([planned.pop(0) for planned in self._planned])

    def due(self) -> list[int]:
        """Robots of the batch of which the next `select_action` looks at what it is shown."""
        return [robot for robot, planned in enumerate(self._planned) if not planned or self.frames > 1]

    def sample_actions_with(self, batch: Prepared, memory: None, seeds: Sequence[int]) -> tuple[Tensor, None]:
        """Without any hidden state: [B, T, A], normalized, of B times `frames` rows, the oldest frame first; no memory.

        See `SmolVLAMemoryPolicy.sample_actions_with`.
        """
        histories = [
            [self._row(batch, robot * self.frames + frame) for frame in range(self.frames)]
            for robot in range(len(seeds))
        ]
        return torch.stack([self._plan(seen, seed) for seen, seed in zip(histories, seeds, strict=True)]), None

    def predict_action_chunk(self, batch: Prepared, seeds: Sequence[int]) -> Tensor:
        """All that is planned from this observation, [B, T, A], normalized.

        Raises:
            ValueError: the policy looks at frames that such a walk does not show.
        """
        if self.frames > 1:
            raise ValueError(
                f"policy {self.config.type} looks at {self.frames} frames in a row: it can be queried for single "
                "actions, not for what it plans at one frame"
            )
        self._observe(batch, len(seeds))
        return torch.stack([self._plan(self._seen[robot], seed) for robot, seed in enumerate(seeds)])

    def _observe(self, batch: Prepared, robots: int) -> None:
        if not self._seen:
            self._seen = [deque(maxlen=self.frames) for _ in range(robots)]
            self._planned = [[] for _ in range(robots)]
        for robot, seen in enumerate(self._seen):
            # before an episode its first frame is repeated
            seen.extend([self._row(batch, robot)] * (1 if seen else self.frames))

    def _row(self, batch: Prepared, number: int) -> dict[str, Tensor]:
        return {name: batch[name][number : number + 1] for name in self.config.input_features}

    @torch.no_grad()
    def _plan(self, seen: Sequence[dict[str, Tensor]], seed: int) -> Tensor:
        """[T, A] of the frames that the policy looks at."""
        row = {
            name: torch.stack([each[name] for each in seen], dim=1) if self.frames > 1 else value
            for name, value in seen[-1].items()
        }
        self.policy.eval()
        self.policy.reset()  # of the robot before
        device = next(self.policy.parameters()).device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            return self.policy.predict_action_chunk(row)[0]
