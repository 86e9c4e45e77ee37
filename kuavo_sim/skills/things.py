"""What skills are practised on: an object to grasp, and marks, bins and boxes to put it. All of it is drawn at random.

Lengths in m, angles in rad. A `side` is +1 for the left arm and −1 for the right: what is drawn for one is mirrored for
the other.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from kuavo_sim.scene import TABLE_TOP, Colour, Graspable, World, bin_xml, box_xml
from kuavo_sim.skills.words import named, one_of
from kuavo_sim.tasks.task import near, within

COLOURS: dict[str, Colour] = {
    "red": (0.92, 0.12, 0.10),
    "blue": (0.10, 0.25, 0.92),
    "green": (0.12, 0.75, 0.22),
    "yellow": (0.96, 0.84, 0.08),
    "violet": (0.55, 0.22, 0.82),
    "orange": (0.97, 0.52, 0.08),
    "turquoise": (0.10, 0.75, 0.82),
    "pink": (0.95, 0.35, 0.65),
    "white": (0.95, 0.95, 0.95),
    "black": (0.12, 0.12, 0.14),
}
_HUE_JITTER = 0.06
_NOUNS = {
    "box": ("block", "cube", "piece", "item", "thing"),
    "cylinder": ("can", "tin", "roll", "item", "thing"),
    "bottle": ("flask", "carton", "tall piece", "item", "thing"),
}
_GOAL_NOUNS = {"mark": ("mark", "square", "tile"), "bin": ("bin", "tray", "crate"), "box": ("box", "stand", "pedestal")}
_ONTO = {"mark": "on", "bin": "in", "box": "on top of"}
_PRECISION = 0.04
_APART = 0.17  # of centres
GOAL_KINDS = tuple(_ONTO)


def some_colour(rng: np.random.Generator, without: Collection[str] = ()) -> tuple[str, Colour]:
    """A name and a shade of that colour, of none of those in `without`."""
    names = [name for name in COLOURS if name not in without]
    name = names[int(rng.integers(len(names)))]
    shade = np.clip(np.add(COLOURS[name], rng.uniform(-_HUE_JITTER, _HUE_JITTER, 3)), 0, 1)
    return name, (float(shade[0]), float(shade[1]), float(shade[2]))


@dataclass(frozen=True)
class Thing:
    """The object: its geoms in its own frame, how high its centre is above what it stands on, and what it is called."""

    geoms: str
    half_height: float
    graspable: Graspable
    colour: str
    words: str


def draw_thing(rng: np.random.Generator, kind: str | None = None) -> Thing:
    kind = kind or one_of(rng, ("box", "cylinder", "bottle"))
    name, colour = some_colour(rng)
    half = rng.uniform(0.024, 0.035)
    half_height = rng.uniform(0.052, 0.066) if kind == "bottle" else rng.uniform(0.026, 0.038)
    decoration = some_colour(rng, without=[name])[1]
    size = (half, half, half_height) if kind != "cylinder" else (half, half_height)
    shape = "cylinder" if kind == "cylinder" else "box"
    geoms = (
        f'<geom name="body" type="{shape}" size="{" ".join(f"{x:.5f}" for x in size)}" mass="0.2" '
        f'rgba="{colour[0]:.3f} {colour[1]:.3f} {colour[2]:.3f} 1"/>'
    )
    top = (0.0, 0.0, half_height)
    badge = (half * rng.uniform(0.4, 0.95), rng.uniform(0.005, 0.02), 0.001)
    geoms += box_xml("badge", top, badge, decoration, solid=False, extra='mass="0"')
    if kind == "bottle":
        geoms += (
            f'<geom name="cap" type="cylinder" pos="0 0 {half_height + 0.015:.5f}" size="{0.5 * half:.5f} 0.015" '
            f'rgba="{decoration[0]:.3f} {decoration[1]:.3f} {decoration[2]:.3f} 1" mass="0.01" contype="0" '
            'conaffinity="0"/>'
        )
    words = named(one_of(rng, _NOUNS[kind]), name)
    return Thing(geoms, half_height, Graspable(2 * half, half_length=max(0.0, half_height - 0.02)), name, words)


@dataclass(frozen=True)
class Goal:
    """
    Attributes:
        kind: mark, bin or box.
        centre: [2] in the frame of the scene's fragment that holds it.
        half: half width; of a bin, the inner one.
        top: height of what the object comes to stand on.
        reach: how far from the centre the object may stand.
    """

    name: str
    kind: str
    centre: np.ndarray
    half: float
    top: float
    colour: tuple[str, Colour]

    def xml(self) -> str:
        x, y = self.centre
        if self.kind == "bin":
            return bin_xml(self.name, self.centre, self.colour[1], half=self.half)
        height = (self.top - TABLE_TOP) / 2
        slab = box_xml(self.name, (x, y, TABLE_TOP + height), (self.half, self.half, height), self.colour[1])
        if self.kind == "box":
            return slab
        paler: Colour = (1.0, 1.0, 1.0) if sum(self.colour[1]) < 2.4 else (0.2, 0.2, 0.2)
        return (
            slab
            + box_xml(f"{self.name}_a", (x, y, self.top), (self.half / 2, 0.005, 0.0005), paler, solid=False)
            + box_xml(f"{self.name}_b", (x, y, self.top), (0.005, self.half / 2, 0.0005), paler, solid=False)
        )

    def holds(self, world: World, centre: np.ndarray) -> bool:
        """Whether the object, let go, stands here; `centre` [2] is the goal's in the world's frame."""
        place = world.object_position()
        if world.held:
            return False
        if self.kind == "bin":
            return within(place, centre, self.half) and bool(place[2] < TABLE_TOP + 0.09)
        reach = _PRECISION if self.kind == "mark" else self.half
        return near(place[:2], centre, reach) and world.touches(self.name)


def draw_goals(
    rng: np.random.Generator,
    kind: str,
    low: Sequence[float],
    high: Sequence[float],
    *,
    taken: Sequence[np.ndarray] = (),
    without: Collection[str] = (),
    second: float = 0.4,
) -> tuple[list[Goal], str]:
    """One goal between `low` [2] and `high` [2], with the chance `second` another of its kind, and what to call it.

    Args:
        taken: centres that goals keep away from.
        without: colours that no goal has.

    The first is the one that is meant. Where there are two, its colour is what tells them apart.
    """
    half = {"mark": rng.uniform(0.05, 0.075), "bin": rng.uniform(0.07, 0.09), "box": rng.uniform(0.06, 0.085)}[kind]
    top = {"mark": 0.004, "bin": 0.006, "box": rng.uniform(0.02, 0.06)}[kind] + TABLE_TOP
    goals: list[Goal] = []
    for number in range(2 if rng.random() < second else 1):
        others = [*taken, *(goal.centre for goal in goals)]
        apart = _APART if not goals else 2 * half + 0.03
        centre = free_place(rng, low, high, others, apart=max(apart, _APART))
        if centre is not None:
            colour = some_colour(rng, without=[*without, *(goal.colour[0] for goal in goals)])
            goals.append(Goal(f"goal{number}", kind, centre, half, top, colour))
    if not goals:
        raise ValueError(f"there must be room for a goal between {low} and {high} beside {len(taken)} places")
    called = goals[0].colour[0] if len(goals) > 1 or rng.random() < 0.5 else None
    return goals, onto(rng, kind, called)


def onto(rng: np.random.Generator, kind: str, colour: str | None) -> str:
    """Words for where a goal of that kind takes an object, as in "on the green tile"."""
    return f"{_ONTO[kind]} {named(one_of(rng, _GOAL_NOUNS[kind]), colour)}"


def free_place(
    rng: np.random.Generator,
    low: Sequence[float],
    high: Sequence[float],
    taken: Sequence[np.ndarray],
    *,
    apart: float,
) -> np.ndarray | None:
    """A place [2] at least `apart` from all that is taken, or None where none is found in many throws."""
    low, high = np.minimum(low, high).tolist(), np.maximum(low, high).tolist()
    for _ in range(200):
        place = rng.uniform(low, high)
        if all(np.linalg.norm(place - np.asarray(other)[:2]) >= apart for other in taken):
            return place
    return None


def clutter_xml(
    rng: np.random.Generator,
    low: Sequence[float],
    high: Sequence[float],
    taken: Sequence[np.ndarray],
    *,
    without: Collection[str],
    most: int = 3,
) -> str:
    """Up to `most` bodies that only stand in the way, clear of what is `taken`, of none of the colours in `without`."""
    xml, occupied = "", list(taken)
    for number in range(int(rng.integers(most + 1))):
        place = free_place(rng, low, high, occupied, apart=0.15)
        if place is None:
            break
        occupied.append(place)
        (_, (r, g, b)), half = some_colour(rng, without), rng.uniform(0.025, 0.05)
        if rng.random() < 0.5:
            xml += box_xml(f"clutter{number}", (*place, TABLE_TOP + half), (half * 0.7, half * 0.7, half), (r, g, b))
        else:
            xml += (
                f'<geom name="clutter{number}" type="cylinder" pos="{place[0]:.5f} {place[1]:.5f} '
                f'{TABLE_TOP + half:.5f}" size="0.024 {half:.5f}" rgba="{r:.3f} {g:.3f} {b:.3f} 1"/>'
            )
    return xml
