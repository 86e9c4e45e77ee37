"""What a policy answers to held-out queries: a loss per row and the actions it predicts.

Answers are comparable: whatever is random in them is a function of the row's key, at every stage and in any company.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from lerobot.policies.pretrained import PreTrainedPolicy

from kuavo_train.data.batch import Prepared
from lerobot_policy_smolvla_memory.memory import MemoryState

Key = Sequence[int]
"""Of a row: task, episode, frame."""


@dataclass(frozen=True)
class Answers:
    """
    Attributes:
        losses: [B] the mean over draws.
        actions: [B, C, A], normalized, from the row's own frame on; C may be shorter than the demonstrated chunk.
        memory: what the policy remembers after the query; None without memory.
    """

    losses: torch.Tensor
    actions: torch.Tensor
    memory: MemoryState | None = None


QueryFunction = Callable[[Prepared, Sequence[Key], MemoryState | None], Answers]
"""(preprocessed rows, their keys, the memory before the query) → answers."""


def query_of(policy: PreTrainedPolicy, draws: int) -> QueryFunction:
    """How this policy is queried: SmolVLA with noise and time of our choice, any other by its own loss."""
    return FlowAnswers(policy, draws) if hasattr(policy, "flow_loss") else OwnAnswers(policy, draws)


@dataclass(frozen=True)
class FlowAnswers:
    """Flow matching: noise per row and draw, time on a stratified grid of the training distribution; from the CPU."""

    policy: PreTrainedPolicy
    draws: int

    def __call__(self, rows: Prepared, keys: Sequence[Key], memory: MemoryState | None) -> Answers:
        encoded, memory = self.policy.encode(rows, memory)
        noise = self._noise(keys)
        times = torch.tensor([stratified_time(draw, self.draws) for draw in range(self.draws)])
        times = times.repeat(len(noise)).to(noise.device)
        losses = self.policy.flow_loss(encoded, rows, noise.flatten(0, 1), times, "none")
        return Answers(losses, self.policy.denoise(encoded, rows, noise[:, 0]), memory)

    def _noise(self, keys: Sequence[Key]) -> torch.Tensor:
        """[B, draws, C, max_action_dim] standard normal."""
        noise = self.policy.draw_noise([np.random.default_rng([*k, draw]) for k in keys for draw in range(self.draws)])
        return noise.unflatten(0, (len(keys), self.draws))


@dataclass(frozen=True)
class OwnAnswers:
    """LeRobot's own loss and prediction. Its loss is a mean over a batch, so every row is a batch of its own.

    What the policy draws at random comes from torch's generator, seeded with the row's key: the same on one kind of
    device.
    """

    policy: PreTrainedPolicy
    draws: int

    def __call__(self, rows: Prepared, keys: Sequence[Key], memory: MemoryState | None) -> Answers:
        self.policy.reset()  # a history of observations, left by a rollout, would be taken for this one's
        losses, actions = [], []
        for place, key in enumerate(keys):
            row = {name: value[place : place + 1] for name, value in rows.items() if isinstance(value, torch.Tensor)}
            torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))
            drawn = {name: value.repeat_interleave(self.draws, dim=0) for name, value in row.items()}
            losses.append(self.policy.forward(drawn)[0])
            actions.append(self.policy.predict_action_chunk(row))
        return Answers(torch.stack(losses), torch.cat(actions))


def stratified_time(draw: int, draws: int) -> float:
    """Middle of the `draw`-th of `draws` equally likely slices of SmolVLA's Beta(1.5, 1) training distribution."""
    quantile = (draw + 0.5) / draws
    return 0.999 * quantile ** (1 / 1.5) + 0.001
