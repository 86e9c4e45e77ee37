"""What the memory does: walks along episodes, and the same question again with another memory in its place.

A *walk* queries the policy as the robot does, every `n_action_steps` frames from an episode's first, and keeps the
memory before each query. A question is then one query of such a walk. Whatever might have happened to the memory
until then is a matter of which state is handed to that query:

    on        the one of the walk
    reset     the initial one: as if the memory were reset at every query
    frozen    the one after the last query that could see the cue: as if nothing were written since
    swapped   the one of another episode, the donor, before its own question

The observation, the noise and the weights are the same each time, so a difference comes from the memory alone.

Letters: E episodes, Q queries, M vectors that a memory holds, H hidden size, C chunk length, A action dimensions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.processor import PolicyProcessorPipeline
from lerobot.utils.constants import ACTION, OBS_LANGUAGE_TOKENS

from kuavo_train.data.batch import ACTION_DIM_IS_PAD, ACTION_IS_PAD, MEMORY_RESET, QUERY_IS_PAD, Prepared, preprocess
from kuavo_train.data.dataset import MixedDataset
from kuavo_train.data.policy_traits import PolicyTraits
from kuavo_train.data.sampler import Draw
from kuavo_train.probing.attention import places_in_prefix, watched_attention
from lerobot_policy_smolvla_memory.memory import MemoryState

Draws = Sequence[Draw]


@dataclass(frozen=True)
class Walk:
    """The memory along E episodes that were walked side by side.

    Attributes:
        episodes: the queries of each, in order.
        states: the memory of all E before query 0, 1, …, and after the last; an episode that has ended keeps its
            own. None where the policy has no memory.
    """

    episodes: Sequence[Draws]
    states: Sequence[MemoryState] | None

    def select(self, episodes: Sequence[int]) -> "Walk":
        """Of the episodes at these places."""
        states = None if self.states is None else [state.select(list(episodes)) for state in self.states]
        return Walk([self.episodes[place] for place in episodes], states)

    def before(self, queries: Sequence[int]) -> MemoryState | None:
        """The memory [E] of each episode before its query `queries[e]` (after its last: the number of queries)."""
        if self.states is None:
            return None
        state = self.states[0].clone()
        for episode, query in enumerate(queries):
            state = state.put([episode], self.states[query].select([episode]))
        return state

    def tokens(self, episode: int) -> np.ndarray:
        """[Q + 1, M, H] what the memory of an episode holds before each query, and after the last."""
        assert self.states is not None
        queries = range(len(self.episodes[episode]) + 1)
        return np.stack([self.states[query].vectors[episode].float().cpu().numpy() for query in queries])


@dataclass(frozen=True)
class MemoryProbe:
    """A policy with the data to walk it along."""

    policy: PreTrainedPolicy
    dataset: MixedDataset
    preprocessor: PolicyProcessorPipeline

    @property
    def has_memory(self) -> bool:
        return PolicyTraits.of(self.policy.config).has_memory

    def queries_of(self, place: int, episode: int) -> Draws:
        """The queries of an episode of the task at `place`, as on the robot."""
        rows = self.dataset.tasks[place].rows_of([episode])[:: self.policy.config.n_action_steps]
        return [Draw(place, int(row), begins=number == 0) for number, row in enumerate(rows)]

    @torch.no_grad()
    def walk(self, episodes: Sequence[Draws]) -> Walk:
        """The memory along the episodes. Nothing is denoised: the memory depends on observations only."""
        if not self.has_memory:
            return Walk(episodes, None)
        self.policy.eval()
        state = self.policy.model.memory.initial(len(episodes)).clone()
        states = [state]
        with torch.random.fork_rng(devices=_cuda_devices(self.policy)):
            for query in range(max(map(len, episodes))):
                batch = self._prepared([draws[min(query, len(draws) - 1)] for draws in episodes])
                ended = [query >= len(draws) for draws in episodes]
                batch[QUERY_IS_PAD] = torch.tensor(ended, device=state.device)
                batch[MEMORY_RESET] &= ~batch[QUERY_IS_PAD]
                _, outputs = self.policy.forward(batch, reduction="none", memory=state)
                state = outputs["memory"]
                states.append(state)
        return Walk(episodes, states)

    @torch.no_grad()
    def predict(
        self, draws: Draws, memory: MemoryState | None, noise: torch.Tensor, instruction: str | None = None
    ) -> np.ndarray:
        """The denoised chunks [E, C, A], normalized, at one query of each episode, given the memory before it.

        Args:
            instruction: what the policy reads, in place of the task's own.
        """
        self.policy.eval()
        batch = self._prepared([draw._replace(begins=False) for draw in draws], instruction)
        actions, _ = self.policy.sample_actions_with(batch, memory, noise)
        return actions.float().cpu().numpy()

    def initial(self, episodes: int) -> MemoryState | None:
        return self.policy.model.memory.initial(episodes).clone() if self.has_memory else None

    def intervened(
        self, walk: Walk, questions: Sequence[int], cue_seen: Sequence[int | None], donors: Sequence[int]
    ) -> dict[str, MemoryState | None]:
        """Intervention → the memory [E] of each episode's question.

        Args:
            questions: of each episode, the decisive query.
            cue_seen: of each episode, the last query that sees the cue, before `questions`. Where one is not known,
                memory cannot be frozen there, and that is left out.
            donors: of each episode, the place of another that gives its memory.
        """
        if not self.has_memory:
            return {"on": None}
        on = walk.before(questions)
        assert on is not None
        written = [query + 1 for query in cue_seen if query is not None]
        return {
            "on": on,
            "reset": self.initial(len(questions)),
            **({"frozen": walk.before(written)} if len(written) == len(questions) else {}),
            "swapped": on.select(list(donors)),
        }

    @torch.no_grad()
    def attention(self, draws: Draws, memory: MemoryState | None, noise: torch.Tensor) -> dict[str, float]:
        """Share of the action tokens' attention that goes to each kind of token; the shares sum to 1.

        The mean over layers, heads, action tokens, denoising steps and the queries `draws`. In the expert's
        self-attention layers a part goes to the action tokens themselves.
        """
        self.policy.eval()
        batch = self._prepared([draw._replace(begins=False) for draw in draws])
        with watched_attention(self.policy) as seen:
            self.policy.sample_actions_with(batch, memory, noise)
        places = places_in_prefix(self.policy, seen.state_place, seen.length, batch[OBS_LANGUAGE_TOKENS].shape[1])
        shares = {
            kind: float(np.mean([weights[place].sum() for weights in seen.weights])) for kind, place in places.items()
        }
        return {**shares, "actions": float(np.mean([weights[seen.length :].sum() for weights in seen.weights]))}

    def target(self, draws: Draws) -> tuple[np.ndarray, np.ndarray]:
        """The demonstrated chunks [E, C, A], normalized, and which entries count: of the task, inside the episode."""
        batch = self._prepared(draws)
        padded = batch[ACTION_IS_PAD][:, :, None] | batch[ACTION_DIM_IS_PAD][:, None, :]
        return batch[ACTION].float().cpu().numpy(), ~padded.cpu().numpy()

    def _prepared(self, draws: Draws, instruction: str | None = None) -> Prepared:
        batch = self.dataset.fetch(draws)
        if instruction is not None:
            batch = batch._replace(instructions=[instruction] * batch.size)
        return preprocess(batch, self.preprocessor, next(self.policy.parameters()).device)


def seeded_noise(policy: PreTrainedPolicy, keys: Sequence[Sequence[int]]) -> torch.Tensor:
    """[len(keys), C, max_action_dim] standard normal, each row a function of its key."""
    return policy.draw_noise([np.random.default_rng(list(key)) for key in keys])


def _cuda_devices(policy: PreTrainedPolicy) -> list[int]:
    device = next(policy.parameters()).device
    return [device.index or 0] if device.type == "cuda" else []
