"""Passages of ordinary sentences with a pass key among them and a question at the end."""

import dataclasses
import random

from lsjax.shipped.sentences import sentences

QUESTION = "What is the pass key?"


@dataclasses.dataclass(frozen=True)
class Passage:
    """A text and what comes after it.

    Attributes:
      prompt: ends with the question and a space or a newline.
      answer: the pass key, five digits.
    """

    prompt: str
    answer: str


def make_passage(seed: int | str, length: int, depth: float | None = None) -> Passage:
    """A passage that depends on the arguments alone.

    Args:
      seed: of everything that is random in it.
      length: of the prompt in characters, which are the shipped model's tokens.
      depth: where the pass key stands: 0 at the start, 1 just before the question. Random if None.
    """
    rng = random.Random(seed)
    answer = f"{rng.randrange(100_000):05d}"
    statement = f"The pass key is {answer}."
    found = sentences(rng, length - len(statement) - len(QUESTION) - 2)
    depth = rng.random() if depth is None else depth
    found.insert(round(depth * len(found)), statement)
    # One character parts two sentences: mostly a space, at the end of a paragraph a newline.
    text = "".join(s + ("\n" if rng.random() < 0.1 else " ") for s in found)
    return Passage(text + QUESTION + rng.choice("\n "), answer)
