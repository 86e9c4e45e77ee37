"""What n past queries saw, kept as it was seen: the memory of `mem_frames`. Tensors in, tensors out, as memory.py.

The vision encoder's tokens of a query, averaged down to a few per camera, are a *frame*. A rule says which queries of
an episode are kept. It is a function of how many there have been, so that count is all that is carried beside the
frames, every element of a batch has its own, and nothing is drawn:

    even      the multiples of a stride, the smallest power of 2 for which they fit: n/2 to n of them, spread evenly
              over the whole episode, its first query always among them
    recent    in slot k the latest odd multiple of 2^k, in the last slot the latest multiple of its power of 2: the
              farther back, the sparser, and the first query stays for 2^(n − 1) queries

Both keep only what they kept before or the query just made, which is why n slots are enough.

Letters: B batch, n frames, C cameras, p tokens of a frame, N tokens of a camera, H hidden size.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RMS_EPS = 1e-6
PLACE_STD = 0.3  # keeps tokens of like content distinct without drowning the contents (RMS 1)
AGE_WAVES = 16
LONGEST_WAVE = 10_000.0  # Vaswani et al. 2017, arXiv 1706.03762
HIGHEST_POWER = 40  # of 2: more queries than any episode has


def even(queries: Tensor, slots: int) -> Tensor:
    """[B] queries so far → [B, n] the numbers of those that are kept, counted from 0; −1 for an empty slot."""
    strides = 2 ** torch.arange(HIGHEST_POWER, device=queries.device)
    doublings = (queries[:, None] > slots * strides).sum(dim=1)
    times = torch.arange(slots, device=queries.device) * strides[doublings][:, None]
    return times.masked_fill(times >= queries[:, None], -1)


def recent(queries: Tensor, slots: int) -> Tensor:
    """As `even`."""
    powers = 2 ** torch.arange(slots, device=queries.device).clamp(max=HIGHEST_POWER)
    multiples = (queries[:, None] - 1).div(powers, rounding_mode="floor")
    multiples[:, :-1] -= 1 - multiples[:, :-1] % 2
    return (multiples * powers).clamp(min=-1)


SAMPLINGS: dict[str, Callable[[Tensor, int], Tensor]] = {"even": even, "recent": recent}


def frame_side(tokens: int, cameras: int, available: int) -> int:
    """Tokens per side of a camera's part of a frame, a square: of all `cameras` together at most `tokens`, of one at
    most the `available` tokens that it has."""
    return min(math.isqrt(tokens // cameras), math.isqrt(available))


class PastFrames(nn.Module):
    """n frames of p = C × side² tokens: which are kept, and how they are read.

    Read, a frame is normalised, goes through a linear map of its own, which starts as the identity, and is told how
    many queries ago it was, which changes nothing at first. An empty slot shows a learnt embedding in place of each
    token. H² + (33 + p) H parameters.

    Args:
        count: n.
        cameras: C.
        side: tokens per side of what is kept of a camera.
        sampling: "even" or "recent".
    """

    def __init__(self, count: int, cameras: int, side: int, hidden_size: int, *, sampling: str):
        super().__init__()
        self.count, self.side = count, side
        self.kept = SAMPLINGS[sampling]
        self.map = nn.Linear(hidden_size, hidden_size, bias=False)
        self.age = nn.Linear(2 * AGE_WAVES, hidden_size, bias=False)
        self.nothing = nn.Parameter(torch.zeros(hidden_size))
        self.places = nn.Parameter(torch.randn(cameras * side**2, hidden_size) * PLACE_STD)
        nn.init.eye_(self.map.weight)
        nn.init.zeros_(self.age.weight)

    @property
    def size(self) -> int:
        """n · p, the tokens that reading makes."""
        return self.count * len(self.places)

    def empty(self, batch_size: int) -> tuple[Tensor, Tensor]:
        """Before an episode's first query: frames [B, n, p, H], and [B] how many queries there have been."""
        frames = self.places.new_zeros(batch_size, self.count, *self.places.shape)
        return frames, torch.zeros(batch_size, dtype=torch.long, device=frames.device)

    def frame(self, cameras: Sequence[Tensor], there: Sequence[Tensor]) -> Tensor:
        """Tokens [B, N, H] of each camera, and [B] whether it is there → the query's frame [B, p, H], float32.

        The tokens of a camera are a square grid, row by row; cells of the coarser one are means. A camera that is not
        there is 0, as are those that fewer than C leave out, which LeRobot puts last.
        """
        parts = []
        for tokens, is_there in zip(cameras, there, strict=True):
            grid = tokens.float().transpose(1, 2).unflatten(2, (math.isqrt(tokens.shape[1]), -1))
            coarse = F.adaptive_avg_pool2d(grid, self.side).flatten(2).transpose(1, 2)
            parts.append(coarse * is_there[:, None, None])
        frame = torch.cat(parts, dim=1)
        return F.pad(frame, (0, 0, 0, len(self.places) - frame.shape[1]))

    def remember(self, frames: Tensor, queries: Tensor, frame: Tensor) -> tuple[Tensor, Tensor]:
        """What is carried after a query that saw `frame` [B, p, H], by what was before: see `empty`."""
        times, times_after = (self.kept(each, self.count) for each in (queries, queries + 1))
        times = torch.cat([times, queries[:, None]], dim=1)
        source = (times_after[:, :, None] == times[:, None]).int().argmax(dim=2)
        rows = torch.arange(len(queries), device=queries.device)[:, None]
        found = torch.cat([frames, frame[:, None].to(frames.dtype)], dim=1)[rows, source]
        return found * (times_after >= 0)[..., None, None], queries + 1

    def forward(self, frames: Tensor, queries: Tensor) -> Tensor:
        """frames [B, n, p, H], queries [B] → tokens [B, n · p, H]."""
        times = self.kept(queries, self.count)
        tokens = self.map(F.rms_norm(frames, frames.shape[-1:], eps=RMS_EPS))
        tokens = tokens + self.age(_waves(queries[:, None] - times))[:, :, None]
        filled = (times >= 0)[..., None, None]
        return (torch.where(filled, tokens, self.nothing) + self.places).flatten(1, 2)


def _waves(ages: Tensor) -> Tensor:
    """[B, n] queries → [B, n, 2 · AGE_WAVES] sines and cosines, of wavelengths from 2π queries on."""
    exponents = torch.arange(AGE_WAVES, device=ages.device) / AGE_WAVES
    angles = ages[..., None].float() / LONGEST_WAVE**exponents
    return torch.cat([angles.sin(), angles.cos()], dim=-1)
