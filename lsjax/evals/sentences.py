"""Ordinary short sentences from a small grammar.

They have no digits and no question marks, so that only the pass key and the question have them.
"""

import random
from collections.abc import Callable

_PEOPLE = (
    "Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Ida", "Jonas", "Karen",
    "Leo", "Maria", "Nora", "Oscar", "Paula", "Quentin", "Ruth", "Simon", "Tessa", "Victor",
    "The teacher", "The baker", "The doctor", "The old man", "The girl", "The driver", "My brother",
    "My aunt", "Our neighbour", "The painter", "The farmer", "A stranger", "The captain",
)  # fmt: skip
_ACTS = (
    "bought", "sold", "found", "lost", "painted", "carried", "cleaned", "opened", "moved", "saw",
    "wanted", "liked", "borrowed", "repaired", "forgot", "brought", "counted", "hid", "kept",
    "washed", "described", "dropped", "picked up", "looked at", "talked about", "paid for",
)  # fmt: skip
_THINGS = (
    "apple", "book", "basket", "bottle", "box", "bread", "bridge", "candle", "chair", "clock",
    "coat", "cup", "door", "engine", "fence", "flower", "garden", "hammer", "hat", "horse",
    "jacket", "kettle", "ladder", "lamp", "letter", "map", "mirror", "newspaper", "orange", "piano",
    "plate", "quilt", "radio", "rope", "ship", "spoon", "stone", "table", "ticket", "tree",
    "umbrella", "vase", "violin", "wagon", "wall", "window", "yellow boat", "zebra",
)  # fmt: skip
_LOOKS = (
    "red", "blue", "green", "old", "new", "small", "large", "heavy", "light", "quiet", "bright",
    "dark", "cheap", "clean", "round", "broken", "empty", "warm", "cold", "wet", "dry", "smooth",
    "tired", "famous", "simple", "strange", "very nice", "quite long", "too short",
)  # fmt: skip
_PLACES = (
    "in the kitchen", "at the station", "near the river", "by the sea", "in the village",
    "on the hill", "behind the house", "at school", "in the market", "under the bridge",
    "across the street", "in the forest", "at work", "in town", "on the roof", "next door",
    "at the airport", "in the library", "on the island", "down the road",
)  # fmt: skip
_TIMES = (
    "yesterday", "last week", "in the morning", "at noon", "every day", "on Sunday", "in winter",
    "before lunch", "after dinner", "once a year", "late at night", "all summer", "on Friday",
    "a long time ago", "this evening", "in June", "again", "for hours",
)  # fmt: skip
_MOVES = (
    "walked", "ran", "slept", "waited", "worked", "sang", "danced", "sat", "stood", "lived",
    "played", "read", "cooked", "swam", "laughed", "stayed", "wrote", "travelled",
)  # fmt: skip
_WEATHER = ("rained", "snowed", "was sunny", "was windy", "was cold", "was foggy", "got dark")

_FORMS: tuple[Callable[[Callable], str], ...] = (
    lambda a: f"{a(_PEOPLE)} {a(_ACTS)} the {a(_THINGS)}.",
    lambda a: f"{a(_PEOPLE)} {a(_ACTS)} the {a(_LOOKS)} {a(_THINGS)}.",
    lambda a: f"{a(_PEOPLE)} {a(_ACTS)} the {a(_THINGS)} {a(_TIMES)}.",
    lambda a: f"{a(_PEOPLE)} {a(_MOVES)} {a(_PLACES)}.",
    lambda a: f"{a(_PEOPLE)} {a(_MOVES)} {a(_PLACES)} {a(_TIMES)}.",
    lambda a: f"{a(_PEOPLE)} was {a(_LOOKS)}, and so was the {a(_THINGS)}.",
    lambda a: f"The {a(_THINGS)} is {a(_LOOKS)}.",
    lambda a: f"The {a(_THINGS)} {a(_PLACES)} is {a(_LOOKS)} and {a(_LOOKS)}.",
    lambda a: f"The {a(_LOOKS)} {a(_THINGS)} was {a(_PLACES)}.",
    lambda a: f"Nobody knows why the {a(_THINGS)} is {a(_LOOKS)}.",
    lambda a: f"We asked what {a(_PEOPLE[:21])} did {a(_PLACES)}.",
    lambda a: f"It {a(_WEATHER)} {a(_TIMES)}.",
)


def sentence(rng: random.Random) -> str:
    """Returns one sentence, such as "Clara sold the old piano."."""
    return rng.choice(_FORMS)(rng.choice)


def sentences(rng: random.Random, length: int) -> list[str]:
    """Returns sentences of `length` characters in all, counting one separator after each.

    Raises:
      ValueError: `length` is not 0, but too small for a sentence.
    """
    shortest = 28  # any length from 28 to 56 is common enough to be drawn soon
    if length and length < shortest:
        raise ValueError(f"no sentences fill {length} characters; {shortest} are the fewest.")
    found: list[str] = []
    while length:
        candidate = sentence(rng)
        rest = length - len(candidate) - 1
        if rest == 0 or rest >= shortest:
            found.append(candidate)
            length = rest
    return found
