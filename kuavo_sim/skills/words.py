"""What a skill is asked to do, in words drawn for every episode. None of it is a job's instruction."""

import numpy as np

_FORMS = (
    "{get} {thing} {source} and {set} it {goal}",
    "{get} {thing} {source}, then {set} it {goal}",
    "{set} {thing} {source} {goal}",
    "{goal}: {set} {thing} {source} there",
)
_GET = ("Take", "Fetch", "Lift", "Get", "Collect", "Remove")
_SET = ("put", "set", "leave", "deposit", "drop")


def one_of(rng: np.random.Generator, choices: tuple[str, ...]) -> str:
    return choices[int(rng.integers(len(choices)))]


def sentence(text: str) -> str:
    """With single blanks, a capital in front and a full stop behind."""
    text = " ".join(text.split())
    return f"{text[0].upper()}{text[1:]}."


def get_and_set(rng: np.random.Generator, thing: str, source: str, goal: str) -> str:
    """As in "Fetch the red can from the bench and leave it on the green square."."""
    words = {"get": one_of(rng, _GET), "set": one_of(rng, _SET), "thing": thing, "source": source, "goal": goal}
    return sentence(one_of(rng, _FORMS).format(**words))


def named(noun: str, colour: str | None) -> str:
    return f"the {noun}" if colour is None else f"the {colour} {noun}"
