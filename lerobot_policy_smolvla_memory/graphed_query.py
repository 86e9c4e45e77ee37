"""A policy query as one CUDA graph: recorded once for tensors of the same shapes, then replayed with other values.

    use_cuda_graphs(policy)
    policy.sample_actions_with(batch, memory, noise)    # as before, and so is all that is built on it

Without graphs the host launches a query's kernels one by one: vision, prefix, memory, ten denoising steps. A graph is
launched as a whole. It reads where it read when it was recorded, so a query is copied there, and its answers are copied
out before the next. It does what was done then, whatever the values: nothing in a query may look at them on the host,
or bring a tensor from there.

Weights are read where they lie, and so may change there. Where they have moved, as with another dtype, all is recorded
anew. So it is with what a query reads of the config.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from itertools import chain

import torch
from lerobot.utils.constants import OBS_STATE
from torch import Tensor

from lerobot_policy_smolvla_memory.memory import MemoryState
from lerobot_policy_smolvla_memory.modeling_smolvla_memory import SmolVLAMemoryPolicy

Tensors = dict[str, Tensor]
Capture = Callable[[Callable[[], Tensors]], tuple[Callable[[], object], Tensors]]
"""A function that reads from fixed places → what does the same again, and where its answers lie afterwards."""

MEMORY, NOISE, ACTIONS = "memory.", "noise", "actions"
WARM_UP = 3  # runs before a recording, in which libraries choose their kernels and take their working memory
MOST_KEPT = 16  # recordings, each with memory of its own: batches and instructions come in many lengths


class CudaCapture:
    """Records CUDA graphs. They share one pool of memory, since no two of them ever run at once.

    Raises:
        ValueError: a device that has no CUDA graphs.
    """

    def __init__(self, device: torch.device):
        if device.type != "cuda":
            raise ValueError(
                f"cuda_graphs must be false on {device}, got true: only CUDA has such graphs; "
                "give a GPU as device, or leave cuda_graphs out"
            )
        self._device, self._stream = device, torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], Tensors]) -> tuple[Callable[[], object], Tensors]:
        with torch.cuda.device(self._device):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                for _ in range(WARM_UP):
                    function()
            torch.cuda.current_stream().wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            # Other threads of a robot's process may use the GPU meanwhile.
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                answers = function()
        return graph.replay, answers


@dataclass(frozen=True)
class Recording:
    """Where a recorded function reads, what does it again, and where its answers lie afterwards."""

    inputs: Tensors
    replay: Callable[[], object]
    answers: Tensors


class Recorded:
    """A function of tensors, recorded for each set of shapes and settings; the latest `MOST_KEPT` are kept."""

    def __init__(self, function: Callable[[Tensors], Tensors], capture: Capture):
        self._function, self._capture = function, capture
        self._recordings: dict[Hashable, Recording] = {}

    def __call__(self, given: Tensors, settings: Hashable) -> Tensors:
        key = (settings, *((name, each.shape, _layout(each), each.dtype, each.device) for name, each in given.items()))
        recording = self._recordings.pop(key, None) or self._record(given)
        self._recordings[key] = recording
        if len(self._recordings) > MOST_KEPT:
            del self._recordings[next(iter(self._recordings))]
        for name, tensor in given.items():
            recording.inputs[name].copy_(tensor)
        recording.replay()
        return {name: answer.clone() for name, answer in recording.answers.items()}

    def _record(self, given: Tensors) -> Recording:
        inputs = {name: tensor.clone() for name, tensor in given.items()}
        return Recording(inputs, *self._capture(lambda: self._function(inputs)))


def _layout(tensor: Tensor) -> tuple[int, ...]:
    """How a tensor lies in memory, which decides how a convolution of it is rounded; where there is one, steps say
    nothing."""
    return tuple(step for step, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1)


class GraphedQuery:
    """`SmolVLAMemoryPolicy.sample_actions_with` in CUDA graphs: the same answers.

    Args:
        capture: what records on a device.

    Raises:
        ValueError: a device without graphs, or a policy whose query depends on more than tensors.
    """

    def __init__(self, policy: SmolVLAMemoryPolicy, capture: Callable[[torch.device], Capture] = CudaCapture):
        if not policy.config.fast_forward:
            raise ValueError("cuda_graphs needs fast_forward=true, got false: LeRobot's forward looks at values")
        if policy.model.adapters is not None:
            raise ValueError(
                "cuda_graphs must be false with adapter_instructions, got true: the host reads from the instruction "
                "which adapter takes part"
            )
        self._policy, self._new_capture = policy, capture
        self._begin_anew(self._places_of_weights())

    @torch.no_grad()
    def __call__(
        self, batch: dict[str, Tensor], memory: MemoryState | None, noise: Tensor | None, **chunking: object
    ) -> tuple[Tensor, MemoryState | None]:
        """Arguments and answers as of `sample_actions_with`.

        Raises:
            ValueError: also real-time chunking, whose guidance differs from query to query.
        """
        policy, config = self._policy, self._policy.config
        if policy.rtc_processor is not None or chunking.get("prev_chunk_left_over") is not None:
            raise ValueError(
                "cuda_graphs must be false with real-time chunking, got true: the guidance of a hand-over is computed "
                "on the host; plan without one, or leave cuda_graphs out"
            )
        rows = len(batch[OBS_STATE])
        if memory is None and policy.model.memory is not None:
            memory = policy.model.memory.initial(rows).contiguous()
        if noise is None:
            shape = (rows, config.chunk_size, config.max_action_dim)
            noise = policy.model.sample_noise(shape, batch[OBS_STATE].device)
        given = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
        places = self._places_of_weights()
        if places != self._places:
            self._begin_anew(places)
        settings = (config.sampling_temperature, config.num_steps, policy.training)
        answers = self._recorded({**given, NOISE: noise, **_as_tensors(memory)}, settings)
        return answers[ACTIONS], _as_memory(answers)

    def _query(self, given: Tensors) -> Tensors:
        encoded, memory = self._policy.encode(given, _as_memory(given))
        return {ACTIONS: self._policy.denoise(encoded, given, given[NOISE]), **_as_tensors(memory)}

    def _places_of_weights(self) -> Hashable:
        held = chain(self._policy.parameters(), self._policy.buffers())
        return tuple((tensor.data_ptr(), tensor.dtype) for tensor in held)

    def _begin_anew(self, places: Hashable) -> None:
        device = next(self._policy.parameters()).device
        self._places, self._recorded = places, Recorded(self._query, self._new_capture(device))


def use_cuda_graphs(policy: SmolVLAMemoryPolicy, capture: Callable[[torch.device], Capture] = CudaCapture) -> None:
    """Compute every query of the policy in graphs from here on. Arguments and errors as of `GraphedQuery`."""
    policy.graphed = GraphedQuery(policy, capture)


def _as_tensors(memory: MemoryState | None) -> Tensors:
    return {} if memory is None else {f"{MEMORY}{name}": tensor for name, tensor in memory.tensors()}


def _as_memory(tensors: Tensors) -> MemoryState | None:
    held = {name.removeprefix(MEMORY): tensor for name, tensor in tensors.items() if name.startswith(MEMORY)}
    return MemoryState(**held) if held else None
