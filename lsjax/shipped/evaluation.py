"""What scaling does to the shipped models: pass keys and perplexity by length, for each kind."""

import dataclasses
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from lsjax.evals.needle import needle_map
from lsjax.evals.perplexity import loss_curve
from lsjax.language_model import load
from lsjax.shipped import shipped_model_path
from lsjax.shipped.model import ANSWER_TOKENS, TRAINED_LENGTH
from lsjax.shipped.passages import Passage, make_passage
from lsjax.shipped.sentences import sentences

SETTINGS = ("none", "linear", "ntk", "dynamic", "yarn", "alibi")
_TEXTS = 4  # that perplexity is an average over


@dataclasses.dataclass(frozen=True)
class Cell:
    """What one setting reaches at one length.

    Attributes:
      setting: one of SETTINGS.
      length: tokens of text and answer.
      share: of pass keys read right, from 0 to 1.
      perplexity: of sentences, over all positions of texts of that length.
    """

    setting: str
    length: int
    share: float
    perplexity: float


def scaling_for(kind: str, length: int) -> str | dict[str, Any]:
    """The rope_scaling of a kind that serves `length` tokens: factor length / trained length.

    Dynamic scaling finds the factor by itself; up to the trained length nothing is scaled.
    """
    if kind == "none" or length <= TRAINED_LENGTH:
        return "off"
    block = {"rope_type": kind, "factor": 1.0 if kind == "dynamic" else length / TRAINED_LENGTH}
    return block | ({"original_max_position_embeddings": TRAINED_LENGTH} if kind == "yarn" else {})


def held_out_passages(length: int, count: int) -> list[Passage]:
    """Passages that training did not see, their pass keys spread evenly over the depth.

    Args:
      length: of each prompt, in tokens.
      count: how many.
    """
    depths = np.linspace(0, 1, count)
    return [make_passage(f"held out {i}", length, depth) for i, depth in enumerate(depths)]


def measure(
    settings: Sequence[str],
    lengths: Sequence[int],
    keys: int,
    *,
    max_batch_size: int,
    progress: Callable[[int], object] | None = None,
) -> Iterator[Cell]:
    """Each setting at each length, as they are measured.

    Args:
      settings: of SETTINGS; alibi is the twin, which nothing scales.
      lengths: tokens of text and answer.
      keys: pass keys for each cell, spread evenly over the depth.
      max_batch_size: texts answered together.
      progress: called with the number of texts answered.
    """
    rotary, alibi = load(), load(shipped_model_path("alibi"))
    depths = np.linspace(0, 1, keys).tolist()
    for length in lengths:
        text = " ".join(sentences(random.Random(f"text {length}"), _TEXTS * length))
        ids = rotary.tokenizer.encode(text)
        for setting in settings:
            if setting == "alibi":
                model = alibi
            else:
                model = rotary.with_rope_scaling(scaling_for(setting, length))
            needles = needle_map(
                model,
                [length - ANSWER_TOKENS],
                depths,
                max_batch_size=max_batch_size,
                progress=progress,
            )
            perplexity = loss_curve(model, ids, length).perplexity
            yield Cell(setting, length, needles.by_length()[0], perplexity)
