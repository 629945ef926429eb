"""Passages of ordinary sentences with a pass key among them and a question at the end.

Source of the task and of the question's wording: Landmark Attention (arXiv 2305.16300).
"""

import dataclasses
import random

from lsjax.evals.sentences import sentences

SHORTEST = 88  # characters of the shortest prompt: the key, one other sentence and the question
_FILLED = 60  # least characters of other sentences in a passage that repeats its key
QUESTION = "What is the pass key? The pass key is"


@dataclasses.dataclass(frozen=True)
class Passage:
    """A text that ends with a question, and the answer.

    Attributes:
      prompt: the text, ending with the question.
      answer: the pass key, five digits; it follows the prompt after a space.
    """

    prompt: str
    answer: str


def statement(answer: str) -> str:
    """Returns the sentence that states the pass key."""
    return f"The pass key is {answer}."


def make_passage(
    seed: int | str, length: int, depth: float | None = None, most_mentions: int = 1
) -> Passage:
    """Makes a passage that depends on the arguments alone.

    Args:
      seed: random seed for everything in the passage.
      length: length of the prompt in characters, which are the shipped model's tokens.
      depth: where the pass key stands: 0 at the start, 1 just before the question. Random if None.
      most_mentions: most times that the pass key is stated. Above 1 the number is random, and
        limited by `length`.
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
    # One character separates two sentences: mostly a space, but a newline after a paragraph.
    text = "".join(s + ("\n" if rng.random() < 0.1 else " ") for s in found)
    return Passage(text + QUESTION, answer)
