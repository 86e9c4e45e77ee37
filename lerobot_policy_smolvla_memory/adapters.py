"""Low-rank adapters of single tasks, beside weights that stay: which one takes part, the instruction says.

The layers of the action expert and the projections of state and actions compute W x + B A x (LoRA, Hu et al. 2021,
arXiv 2106.09685), with A and B of the task that a row's instruction belongs to. The first task has none: W is what it
was learnt with. So what is learnt of a task touches no other task's function.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Tokens = tuple[int, ...]
"""Of an instruction, without padding."""

BASE = 0
"""Place of the task that has no adapter."""


class Adapter(nn.Module):
    """A and B of every adapted layer, by the layer's name. What it computes begins at 0.

    Args:
        layers: name → layer, of H inputs and H' outputs.
        rank: r of A [r, H] and B [H', r].
    """

    def __init__(self, layers: Mapping[str, nn.Linear], rank: int):
        super().__init__()
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        for name, layer in layers.items():
            down = nn.init.kaiming_uniform_(torch.empty(rank, layer.in_features), a=math.sqrt(5))
            self.down[_key(name)] = nn.Parameter(down)
            self.up[_key(name)] = nn.Parameter(torch.zeros(layer.out_features, rank))

    def forward(self, name: str, inputs: Tensor) -> Tensor:
        down, up = self.down[_key(name)], self.up[_key(name)]
        return F.linear(F.linear(inputs.to(down.dtype), down), up)


class TaskAdapters(nn.Module):
    """The adapters of a policy, and the instructions that choose between them.

    Args:
        layers: those that are adapted; they stay where they are, with the names and the values that they have.
        instructions: of each task in the order of learning, the first of which has no adapter.
        rank: of every adapter.
    """

    def __init__(self, layers: Mapping[str, nn.Linear], instructions: Sequence[Sequence[Sequence[int]]], rank: int):
        super().__init__()
        self.instructions = [[tuple(tokens) for tokens in task] for task in instructions]
        self.of_task = nn.ModuleList(Adapter(layers, rank) for _ in self.instructions[1:])
        self._known = {tokens: task for task, each in reversed([*enumerate(self.instructions)]) for tokens in each}
        self._rows: list[int] = []
        for name, layer in layers.items():
            layer.register_forward_hook(partial(self._adapt, name))

    def choose(self, rows: Sequence[Tokens], embeddings: Tensor) -> list[int]:
        """From here on, rows are computed with the adapters of the tasks that their instructions belong to.

        An instruction that no task was learnt with takes the task of the most similar one.

        Args:
            rows: instruction of each row.
            embeddings: [V, H] of the tokens, which similarity goes by.

        Returns:
            Of each row the place of its task.
        """
        for tokens in {*rows} - self._known.keys():
            self._known[tokens] = nearest(tokens, self.instructions, embeddings)
        self._rows = [self._known[tokens] for tokens in rows]
        return self._rows

    def begin(self, embeddings: Tensor) -> int:
        """Let the last task's adapter begin as that of the earlier task with the most similar instructions.

        Returns:
            The place of that task; `BASE` where the adapter begins at 0.
        """
        *earlier, new = self.instructions
        found = nearest_task(new, earlier, embeddings)
        if found != BASE:
            self.of_task[-1].load_state_dict(self.of_task[found - 1].state_dict())
        return found

    def _adapt(self, name: str, _layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """A forward hook. Rows that the batch holds several times in a row, as draws are, are all of one task."""
        (given,) = inputs
        tasks = {*self._rows}
        if tasks <= {BASE}:
            return output
        if len(tasks) == 1:
            return output + self.of_task[tasks.pop() - 1](name, given).to(output.dtype)
        times, rest = divmod(len(given), len(self._rows))
        if rest:
            raise ValueError(f"{len(given)} rows were given to {name}, but adapters are chosen for {len(self._rows)}")
        task = torch.tensor(self._rows, device=given.device).repeat_interleave(times)
        adapted = output.clone()
        for place in tasks - {BASE}:
            mine = task == place
            adapted[mine] += self.of_task[place - 1](name, given[mine]).to(output.dtype)
        return adapted


def nearest(tokens: Tokens, instructions: Sequence[Sequence[Tokens]], embeddings: Tensor) -> int:
    """Place of the task that has the instruction most similar to this one: cosine of their tokens' mean embeddings."""
    mine = _mean(tokens, embeddings)
    similar = [
        max(float(F.cosine_similarity(mine, _mean(each, embeddings), 0)) for each in task) for task in instructions
    ]
    return max(range(len(similar)), key=similar.__getitem__)


def nearest_task(new: Sequence[Tokens], instructions: Sequence[Sequence[Tokens]], embeddings: Tensor) -> int:
    """As `nearest`, of the mean over a task's instructions."""

    def mean(task: Sequence[Tokens]) -> Tensor:
        return torch.stack([_mean(tokens, embeddings) for tokens in task]).mean(dim=0)

    mine = mean(new)
    similar = [float(F.cosine_similarity(mine, mean(task), 0)) for task in instructions]
    return max(range(len(similar)), key=similar.__getitem__)


def _mean(tokens: Tokens, embeddings: Tensor) -> Tensor:
    return embeddings[list(tokens)].detach().float().mean(dim=0)


def _key(layer: str) -> str:
    """A layer's name as that of a parameter, which may hold no dots."""
    return layer.replace(".", "/")
