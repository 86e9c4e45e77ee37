"""The episodes of the suite's tasks, drawn: cue, clutter, mark.

A *layout* is everything of an episode but its cue: delay, clutter, pixel noise, state. Its *variants* are the episodes
that differ in the cue alone, one for every answer, so that cues are balanced in every layout. At a decision pictures
and state of all variants are the same, byte for byte; before it nothing moves: the demonstrated action is 0.

A query of the policy is `FRAMES_PER_QUERY` frames, the profile's n_action_steps, which show one drawing (moving cups
excepted) under pixel noise of their own. A *delay* is counted in queries, from the end of the cue to the mark.

Letters: V variants, Q queries, F frames of a query, S side of a picture, A action dimensions.
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

FRAMES_PER_QUERY = 8
SIDE = 32  # pixels
STATE = ("noise_0", "noise_1", "noise_2", "noise_3")
ACTION = ("x", "y")
PIXEL_NOISE = 12  # of 255, standard deviation
GREY, WHITE, DARK, LIT = 110, 250, 40, (255, 235, 120)
COLOURS = ((210, 40, 40), (40, 180, 60), (50, 70, 220), (220, 200, 40))
BALL, CUP = (20, 60, 255), (255, 150, 0)
CORNERS = np.array([[1, 1], [1, -1], [-1, -1], [-1, 1]], np.float32)
SIDES = np.array([[-1, 0], [1, 0]], np.float32)
PLACES = np.array([[-1, 0], [0, 1], [1, 0]], np.float32)
PARTS = ("training", "trained", "twice", "curve")
"""Sets of layouts, disjoint: those trained on; held out at trained delays, at twice the longest; of the curve."""


@dataclass(frozen=True)
class Query:
    """What one query sees and does.

    Attributes:
        drawings: [V or 1, F or 1, S, S, 3] uint8, 1 where all variants or frames are alike.
        actions: [V, A]; None is 0.
    """

    drawings: np.ndarray
    actions: np.ndarray | None = None


@dataclass(frozen=True)
class Decision:
    """Where memory alone can know what to do.

    Attributes:
        query: that of the mark. cue_ends: the last one before it that the answer depends on.
        answers: of each variant, a place in the task's targets; each once.
    """

    query: int
    cue_ends: int
    answers: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """
    Attributes:
        key: what noise is a function of, beside the frame.
    """

    key: tuple[int, ...]
    queries: Sequence[Query]
    decisions: Sequence[Decision]

    @property
    def variants(self) -> int:
        return len(self.decisions[0].answers)

    @property
    def length(self) -> int:
        """Frames."""
        return len(self.queries) * FRAMES_PER_QUERY

    def picture(self, variant: int, frame: int) -> np.ndarray:
        """[S, S, 3] uint8."""
        query, place = divmod(frame, FRAMES_PER_QUERY)
        drawings = self.queries[query].drawings
        drawing = drawings[min(variant, len(drawings) - 1), min(place, drawings.shape[1] - 1)]
        noise = np.random.default_rng([*self.key, frame, 0]).normal(0, PIXEL_NOISE, drawing.shape)
        return np.clip(drawing + noise, 0, 255).astype(np.uint8)

    def state(self, frame: int) -> np.ndarray:
        """[4] float32, of no meaning; the same in all variants."""
        return np.random.default_rng([*self.key, frame, 1]).normal(size=len(STATE)).astype(np.float32)

    def actions(self, variant: int) -> np.ndarray:
        """[length, A] float32."""
        rest = np.zeros(len(ACTION), np.float32)
        each = [rest if query.actions is None else query.actions[variant] for query in self.queries]
        return np.repeat(np.stack(each), FRAMES_PER_QUERY, axis=0)

    def check(self) -> None:
        """Raises `AssertionError` where a decision could be made by anything but memory, or not by it."""
        for decision in self.decisions:
            assert sorted(decision.answers) == list(range(self.variants)), f"answers of {self.key}: {decision.answers}"
            assert decision.cue_ends < decision.query, f"the cue of {self.key} must end before {decision}"
            for frame in range(decision.query * FRAMES_PER_QUERY, (decision.query + 1) * FRAMES_PER_QUERY):
                seen = {self.picture(variant, frame).tobytes() for variant in range(self.variants)}
                assert len(seen) == 1, f"pictures of {self.key} must be identical at {decision}"
            done = {tuple(self.actions(variant)[frame]) for variant in range(self.variants)}
            assert len(done) == self.variants, f"actions of {self.key} must differ at {decision}"


Draw = Callable[[np.random.Generator, int], tuple[list[Query], list[Decision]]]
"""Of a layout's own random numbers and its delay, what its variants see and do."""


@dataclass(frozen=True)
class Kind:
    """A task of the suite.

    Attributes:
        instruction: the sentence that the dataset says.
        answers: how many there are; chance is one of them.
        delays: trained ones, in queries.
    """

    draw: Draw
    instruction: str
    answers: int
    delays: range

    @property
    def chance(self) -> float:
        return 1 / self.answers

    def layouts(self, task: str, part: str, count: int) -> list[Layout]:
        """So many, their delays spread evenly over those of the part."""
        twice = 2 * self.delays[-1]
        delays = range(twice, twice + 1) if part == "twice" else self.delays
        found = []
        for number in range(count):
            key = (zlib.crc32(task.encode()), PARTS.index(part), number)
            queries, decisions = self.draw(np.random.default_rng(key), delays[number * len(delays) // count])
            found.append(Layout(key, queries, decisions))
        return found


def plain(*shades: int | tuple[int, int, int]) -> np.ndarray:
    """[V, 1, S, S, 3] pictures of one colour."""
    picture = np.empty((len(shades), 1, SIDE, SIDE, 3), np.uint8)
    for place, shade in enumerate(shades):
        picture[place] = shade
    return picture


def clutter(random: np.random.Generator) -> np.ndarray:
    """[1, 1, S, S, 3] grey, with three rectangles of other greys."""
    picture = plain(GREY)
    for _ in range(3):
        top, left, height, width = *random.integers(0, 24, 2), *random.integers(4, 12, 2)
        picture[..., top : top + height, left : left + width, :] = random.integers(60, 200)
    return picture


def _cluttered(random: np.random.Generator, count: int) -> list[Query]:
    return [Query(clutter(random)) for _ in range(count)]


def colour(random: np.random.Generator, delay: int) -> tuple[list[Query], list[Decision]]:
    """One of four colours in the first query, a corner of a square to go to at the white mark."""
    queries = [Query(plain(*COLOURS)), *_cluttered(random, delay - 1), Query(plain(WHITE), CORNERS)]
    return queries, [Decision(delay, 0, (0, 1, 2, 3))]


def _lamps(background: np.ndarray, lit: Sequence[int | None]) -> np.ndarray:
    """[V, 1, S, S, 3] a drawing with two lamps; of each variant, which is lit."""
    pictures = np.repeat(background, len(lit), axis=0)
    rows, columns = np.mgrid[:SIDE, :SIDE]
    for side, centre in enumerate((8, 24)):
        disc = (rows - 16) ** 2 + (columns - centre) ** 2 <= 36
        for variant, which in enumerate(lit):
            pictures[variant, 0, disc] = LIT if which == side else DARK
    return pictures


def order(random: np.random.Generator, delay: int) -> tuple[list[Query], list[Decision]]:
    """Two lamps flash, one to three queries apart; the side of the one that came first is where to go."""
    gap = int(random.integers(1, 4))
    flashes: dict[int, Sequence[int | None]] = {0: (0, 1), gap: (1, 0)}
    queries = [Query(_lamps(clutter(random), flashes.get(query, (None,)))) for query in range(gap + delay)]
    return [*queries, Query(plain(WHITE), SIDES)], [Decision(gap + delay, gap, (0, 1))]


def count(random: np.random.Generator, delay: int) -> tuple[list[Query], list[Decision]]:
    """One to four flashes, at any of four times, then a corner for their number."""
    times = (0, 2, 4, 6)
    at = [set(random.choice(times, number, replace=False).tolist()) for number in (1, 2, 3, 4)]
    queries = []
    for query in range(times[-1] + delay):
        background = clutter(random)
        lit = [0 if query in flashes else None for flashes in at] if query in times else [None]
        queries.append(Query(_lamps(background, lit)))
    return [*queries, Query(plain(WHITE), CORNERS)], [Decision(times[-1] + delay, times[-1], (0, 1, 2, 3))]


CUPS = (6, 16, 26)  # columns of their middles


def _cups(background: np.ndarray, middles: Sequence[tuple[float, float]], ball: tuple[int, int] | None) -> np.ndarray:
    """[S, S, 3] a drawing with cups, by (row, column) of their middles, and perhaps the ball."""
    picture = background.copy()
    for row, column in middles:
        top, left = round(row) - 4, round(column) - 3
        picture[max(0, top) : top + 8, left : left + 7] = CUP
    if ball is not None:
        rows, columns = np.mgrid[:SIDE, :SIDE]
        picture[(rows - ball[0]) ** 2 + (columns - ball[1]) ** 2 <= 16] = BALL
    return picture


def occlusion(random: np.random.Generator, delay: int) -> tuple[list[Query], list[Decision]]:
    """A ball goes under one of three cups; then one to three times two of them swap places; point at the ball's.

    A swap takes a query: the cup that goes right passes above, the other below, so that every frame of it shows which
    two they are. The delay is counted from the ball: the swaps are part of it, and the cue ends with the last one.
    """
    between = delay - 1
    swaps = set(random.choice(between, min(between, int(random.integers(1, 4))), replace=False).tolist())
    resting = [(16.0, float(column)) for column in CUPS]
    background = clutter(random)[0, 0]
    seen = np.stack(
        [[_cups(background, resting, (28 - frame, column)) for frame in range(FRAMES_PER_QUERY)] for column in CUPS]
    )
    queries, places = [Query(seen)], [0, 1, 2]  # of the ball, by variant
    for number in range(between):
        background = clutter(random)[0, 0]
        if number not in swaps:
            queries.append(Query(_cups(background, resting, None)[None, None]))
            continue
        left, right = sorted(random.choice(3, 2, replace=False).tolist())
        frames = []
        for frame in range(FRAMES_PER_QUERY):
            part = (frame + 1) / (FRAMES_PER_QUERY + 1)
            way, aside = part * (CUPS[right] - CUPS[left]), 9 * np.sin(np.pi * part)
            middles = [resting[3 - left - right], (16 - aside, CUPS[left] + way), (16 + aside, CUPS[right] - way)]
            frames.append(_cups(background, middles, None))
        queries.append(Query(np.stack(frames)[None]))
        places = [right if place == left else left if place == right else place for place in places]
    mark = Query(plain(WHITE), PLACES[places])
    return [*queries, mark], [Decision(delay, 1 + max(swaps), tuple(places))]


def _half(side: int, *shades: int | tuple[int, int, int], rest: int) -> np.ndarray:
    """[V, 1, S, S, 3] one colour on the left (side 0) or right half, another beside it."""
    pictures = np.repeat(plain(rest), len(shades), axis=0)
    columns = slice(0, SIDE // 2) if side == 0 else slice(SIDE // 2, SIDE)
    pictures[..., columns, :] = plain(*shades)[..., columns, :]
    return pictures


def two_cues(random: np.random.Generator, delay: int) -> tuple[list[Query], list[Decision]]:
    """A colour on the left, later one on the right; then a mark on either half demands that half's colour.

    Both delays are counted from the second colour; `delay` is one of them. Which mark comes first is the layout's.
    """
    second = int(random.integers(1, 4))
    other = int(random.integers(2, delay - 1)) if delay >= 4 else delay + 2  # the two are at least two queries apart
    marks = [second + each for each in random.permutation([delay, other]).tolist()]
    colours = random.permutation(4).tolist()  # of the second cue, by variant; the first one's are 0, 1, 2, 3
    queries = _cluttered(random, max(marks) + 1)
    queries[0] = Query(_half(0, *COLOURS, rest=GREY))
    queries[second] = Query(_half(1, *(COLOURS[each] for each in colours), rest=GREY))
    queries[marks[0]] = Query(_half(0, WHITE, rest=DARK), CORNERS)
    queries[marks[1]] = Query(_half(1, WHITE, rest=DARK), CORNERS[colours])
    return queries, [Decision(marks[0], 0, (0, 1, 2, 3)), Decision(marks[1], second, tuple(colours))]


TASKS = {
    "colour": Kind(colour, "Remember the colour and act on it at the white mark.", 4, range(2, 10)),
    "order": Kind(order, "Remember which lamp flashed first and go to its side at the white mark.", 2, range(2, 10)),
    "count": Kind(count, "Count the flashes and act on their number at the white mark.", 4, range(2, 10)),
    "occlusion": Kind(occlusion, "Follow the cup over the ball and point at it at the white mark.", 3, range(2, 10)),
    "two_cues": Kind(two_cues, "Remember both colours and act on each at its own mark.", 4, range(2, 10)),
    "long": Kind(colour, "Remember the colour for long and act on it at the white mark.", 4, range(2, 41)),
}
