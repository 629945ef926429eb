"""Passages of ordinary sentences with a pass key among them and a question at the end.

Source of the task and of the question's wording: Landmark Attention (arXiv 2305.16300).
"""

import dataclasses
import random

from lsjax.shipped.sentences import sentences

SHORTEST = 88  # characters of prompt that a passage with a sentence beside the key takes
_FILLED = 60  # characters of other sentences, at least, where a key is told again
QUESTION = "What is the pass key? The pass key is"


@dataclasses.dataclass(frozen=True)
class Passage:
    """A text and what comes after it.

    Attributes:
      prompt: ends with the question.
      answer: the pass key, five digits; a space parts it from the prompt.
    """

    prompt: str
    answer: str


def statement(answer: str) -> str:
    """The sentence that tells the pass key."""
    return f"The pass key is {answer}."


def make_passage(
    seed: int | str, length: int, depth: float | None = None, most_mentions: int = 1
) -> Passage:
    """A passage that depends on the arguments alone.

    Args:
      seed: of everything that is random in it.
      length: of the prompt in characters, which are the shipped model's tokens.
      depth: where the pass key stands: 0 at the start, 1 just before the question. Random if None.
      most_mentions: how many times the pass key is told, at most; if above 1, the number is
        random, and as far as there is room.
    """
    rng = random.Random(seed)
    answer = f"{rng.randrange(100_000):05d}"
    told = statement(answer)
    mentions = rng.choice([1, *range(1, most_mentions + 1)]) if most_mentions > 1 else 1
    room = (length - len(QUESTION) - _FILLED) // (len(told) + 1)
    mentions = max(1, min(mentions, room))
    found = sentences(rng, length - mentions * (len(told) + 1) - len(QUESTION))
    for _ in range(mentions):
        found.insert(round((rng.random() if depth is None else depth) * len(found)), told)
    # One character parts two sentences: mostly a space, at the end of a paragraph a newline.
    text = "".join(s + ("\n" if rng.random() < 0.1 else " ") for s in found)
    return Passage(text + QUESTION, answer)
