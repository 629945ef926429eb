"""Texts with something to be found in them, and questions about it.

Source of the tasks and of most of the wording: RULER (arXiv 2404.06654).
"""

import dataclasses
import itertools
import random
from collections import Counter
from collections.abc import Callable

from lsjax.evals.sentences import sentences

_SHORTEST = 28  # fewest characters of ordinary sentences
_KEYS, _VALUES, _CHAINS, _HOPS = 4, 4, 2, 4
_FREQUENT = 3  # words that are asked for
_SYLLABLES = ("ba", "do", "fe", "gu", "ka", "li", "mo", "nu", "pe", "ri", "so", "tu", "va", "zi")


@dataclasses.dataclass(frozen=True)
class Question:
    """A question about a text.

    Attributes:
      text: the question.
      begin: how the answer begins; it is part of the prompt.
      answers: what a right answer names, in any order.
    """

    text: str
    begin: str
    answers: tuple[str, ...]

    def score(self, answer: str) -> float:
        """Returns the share of `answers` that an answer names as whole words."""
        said = "".join(c if c.isalnum() else " " for c in answer).split()
        return sum(a in said for a in self.answers) / len(self.answers)


@dataclasses.dataclass(frozen=True)
class Case:
    """A text, and the questions about it, which may share what a model has read.

    Attributes:
      text: instruction and text.
      questions: questions about it.
    """

    text: str
    questions: tuple[Question, ...]


@dataclasses.dataclass(frozen=True)
class Task:
    """A kind of task.

    Attributes:
      make: makes a case from a source of randomness and the number of characters to fill.
      answer_tokens: tokens that an answer may have.
    """

    make: Callable[[random.Random, int], Case]
    answer_tokens: int


def single_needle(rng: random.Random, fill: int) -> Case:
    """Hides one number, and asks for it."""
    return _needles(rng, fill, keys=1, values=1)


def multi_key_needle(rng: random.Random, fill: int) -> Case:
    """Hides numbers of several keys, and asks for each."""
    return _needles(rng, fill, keys=_KEYS, values=1)


def multi_value_needle(rng: random.Random, fill: int) -> Case:
    """Hides several numbers of one key, and asks for all."""
    return _needles(rng, fill, keys=1, values=_VALUES)


def variable_tracking(rng: random.Random, fill: int) -> Case:
    """Hides chains of variables that are given each other's value, and asks for each chain."""
    names = _words(rng, _CHAINS * (_HOPS + 1), capitals=True)
    chains = [names[i::_CHAINS] for i in range(_CHAINS)]
    values = _numbers(rng, _CHAINS)
    told = [
        [f"VAR {chain[0]} = {value}."]
        + [f"VAR {new} = VAR {old}." for old, new in itertools.pairwise(chain)]
        for chain, value in zip(chains, values, strict=True)
    ]
    # Each chain is told in its order; which chain comes next is random.
    turns = [i for i, chain in enumerate(told) for _ in chain]
    rng.shuffle(turns)
    text = _hidden(rng, fill, [told[i].pop(0) for i in turns])
    return Case(
        "Memorize and track the chains of variable assignment hidden in the following text.\n"
        + text,
        tuple(
            Question(
                f"Find all variables that are assigned the value {value} in the text above.",
                f"According to the chains of variable assignment in the text above, {_HOPS + 1} "
                f"variables are assigned the value {value}, they are:",
                tuple(chain),
            )
            for chain, value in zip(chains, values, strict=True)
        ),
    )


def frequent_words(rng: random.Random, fill: int) -> Case:
    """Mixes invented words, and asks for those that come most often.

    The word of rank r comes as often as r**-2 says, in a random order.
    """
    total = max(fill // 7, 8 * _FREQUENT)  # a word has about six letters
    weights = [rank**-2.0 for rank in range(1, 51)]
    counts = [max(round(total * w / sum(weights)), 1) for w in weights]
    for rank in range(_FREQUENT, -1, -1):  # the asked ones are apart from the next
        counts[rank] = max(counts[rank], counts[rank + 1] + 1)
    words = _words(rng, len(counts))
    told = list(Counter(dict(zip(words, counts, strict=True))).elements())
    rng.shuffle(told)
    return Case(
        "Read the following coded text and track the frequency of each coded word.\n"
        + " ".join(told),
        (
            Question(
                f"What are the {_FREQUENT} most frequently appeared words in the above coded text?",
                "According to the coded text above, the "
                f"{_FREQUENT} most frequently appeared words are:",
                tuple(words[:_FREQUENT]),
            ),
        ),
    )


TASKS = {
    "single needle": Task(single_needle, 16),
    "multi-key needle": Task(multi_key_needle, 16),
    "multi-value needle": Task(multi_value_needle, 48),
    "variable tracking": Task(variable_tracking, 48),
    "frequent words": Task(frequent_words, 48),
}


def _needles(rng: random.Random, fill: int, keys: int, values: int) -> Case:
    names, numbers = _words(rng, keys), _numbers(rng, keys * values)
    held = {name: tuple(numbers[i::keys]) for i, name in enumerate(names)}
    told = [
        f"One of the special magic numbers for {name} is: {number}."
        for name, own in held.items()
        for number in own
    ]
    rng.shuffle(told)
    many = "s" if values > 1 else ""
    verb = "are" if values > 1 else "is"
    return Case(
        "Some special magic numbers are hidden within the following text. Make sure to memorize "
        f"them. I will quiz you about them afterwards.\n{_hidden(rng, fill, told)}",
        tuple(
            Question(
                f"What {verb} {'all ' if many else ''}the special magic number{many} for {name} "
                "mentioned in the provided text?",
                f"The special magic number{many} for {name} mentioned in the provided text {verb}",
                own,
            )
            for name, own in held.items()
        ),
    )


def _hidden(rng: random.Random, fill: int, told: list[str]) -> str:
    """Puts sentences, in their order, at random places among `fill` characters of others."""
    found = sentences(rng, max(fill, _SHORTEST))
    places = sorted(rng.randint(0, len(found)) for _ in told)
    for place, sentence in reversed(list(zip(places, told, strict=True))):
        found.insert(place, sentence)
    return " ".join(found)


def _words(rng: random.Random, count: int, capitals: bool = False) -> list[str]:
    """Invents different words of three syllables, as no text has them."""
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(rng.choices(_SYLLABLES, k=3))] = None
    return [word.upper() if capitals else word for word in found]


def _numbers(rng: random.Random, count: int) -> list[str]:
    return [str(n) for n in rng.sample(range(1_000_000, 10_000_000), count)]
