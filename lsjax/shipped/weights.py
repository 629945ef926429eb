"""What the tokens of a passage count in training: what the text tells again, most."""

import numpy as np

from lsjax.shipped.model import tokens_of
from lsjax.shipped.passages import Passage, statement
from lsjax.training.documents import Document


def weighted(passage: Passage, answer_weight: float, other_weight: float) -> Document:
    """A passage, its answer and end as a document of training.

    Args:
      passage: its key may be told several times.
      answer_weight: a token of the answer, the end, or a key told again counts this much,
      other_weight: and any other token this much.
    """
    text, told = f"{passage.prompt} {passage.answer}", statement(passage.answer)
    ids = tokens_of(passage)
    weights = np.full(len(ids), other_weight, np.float32)
    at = text.find(told)
    while (at := text.find(told, at + 1)) >= 0:
        digits = at + told.index(passage.answer)
        weights[digits : digits + len(passage.answer)] = answer_weight
    weights[-len(passage.answer) - 1 :] = answer_weight
    return Document(ids, weights)
