"""What stands in for CUDA graphs where there is no GPU."""

from collections.abc import Callable

import torch
from torch import Tensor


class StandIn:
    """Records on any device: it keeps the function, and a replay runs it and leaves its answers where they lay."""

    def __init__(self, _device: torch.device):
        self.recordings = 0

    def __call__(self, function: Callable[[], dict[str, Tensor]]) -> tuple[Callable[[], None], dict[str, Tensor]]:
        self.recordings += 1
        answers = function()

        def replay() -> None:
            for name, answer in function().items():
                answers[name].copy_(answer)

        return replay, answers
