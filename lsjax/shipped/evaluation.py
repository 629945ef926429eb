"""Pass keys and perplexity of the shipped models by length, for each kind of RoPE scaling."""

import dataclasses
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lsjax.attention.sparse.rule import SparsePrefill
from lsjax.evals.needle import needle_map
from lsjax.evals.passkey import Passage, make_passage
from lsjax.evals.perplexity import loss_curve
from lsjax.evals.sentences import sentences
from lsjax.shipped.model import ANSWER_TOKENS, TRAINED_LENGTH

if TYPE_CHECKING:
    from lsjax.language_model import LanguageModel

SETTINGS = ("none", "linear", "ntk", "dynamic", "yarn", "dual_chunk", "alibi")
_LOCAL = 64  # tokens of a chunk of dual chunk attention that stay exact in the next one
_TEXTS = 4  # texts that perplexity is averaged over


@dataclasses.dataclass(frozen=True)
class Cell:
    """Results of one setting at one length.

    Attributes:
      setting: one of SETTINGS, and with sparse prefill its alpha.
      length: tokens of text and answer together.
      share: share of pass keys answered correctly, from 0 to 1.
      perplexity: perplexity on ordinary sentences, over all positions of texts of this length.
      density: what these texts attended to, relative to full attention.
    """

    setting: str
    length: int
    share: float
    perplexity: float
    density: float


def scaling_for(kind: str, length: int) -> str | dict[str, Any]:
    """Returns the rope_scaling of a kind for `length` tokens: factor length / trained length.

    Dynamic scaling finds the factor by itself. Up to the trained length nothing is scaled.
    """
    if kind == "none" or length <= TRAINED_LENGTH:
        return "off"
    original = {"original_max_position_embeddings": TRAINED_LENGTH}
    if kind == "dual_chunk":
        return {"rope_type": kind, "chunk_size": TRAINED_LENGTH, "local_size": _LOCAL, **original}
    block = {"rope_type": kind, "factor": 1.0 if kind == "dynamic" else length / TRAINED_LENGTH}
    return block | (original if kind == "yarn" else {})


def held_out_passages(length: int, count: int) -> list[Passage]:
    """Makes passages that training did not see, with pass keys spread evenly over the depth.

    Args:
      length: tokens of each prompt.
      count: number of passages.
    """
    depths = np.linspace(0, 1, count)
    return [make_passage(f"held out {i}", length, depth) for i, depth in enumerate(depths)]


def measure(
    rotary: "LanguageModel",
    alibi: "LanguageModel",
    settings: Sequence[str],
    lengths: Sequence[int],
    keys: int,
    *,
    rules: Sequence[SparsePrefill | None] = (None,),
    max_batch_size: int,
    progress: Callable[[int], object] | None = None,
) -> Iterator[Cell]:
    """Measures each setting at each length, and yields each result as it comes.

    Args:
      rotary: the shipped model with RoPE.
      alibi: its twin with ALiBi.
      settings: settings from SETTINGS; "alibi" measures the twin, without scaling.
      lengths: tokens of text and answer together.
      keys: pass keys per cell, spread evenly over the depth.
      rules: settings of sparse prefill to measure each setting with; None for dense prefill.
      max_batch_size: texts answered together.
      progress: called with the number of texts answered.
    """
    depths = np.linspace(0, 1, keys).tolist()
    for length in lengths:
        text = " ".join(sentences(random.Random(f"text {length}"), _TEXTS * length))
        ids = rotary.tokenizer.encode(text)
        for setting, rule in itertools.product(settings, rules):
            if setting == "alibi":
                model = alibi
            else:
                model = rotary.with_rope_scaling(scaling_for(setting, length))
            model = model.with_sparse_prefill(rule)
            needles = needle_map(
                model,
                [length - ANSWER_TOKENS],
                depths,
                max_batch_size=max_batch_size,
                progress=progress,
            )
            curve = loss_curve(model, ids, length)
            name = named(setting, rule)
            yield Cell(name, length, needles.by_length()[0], curve.perplexity, curve.density)


def named(setting: str, rule: SparsePrefill | None) -> str:
    """Returns the name of a column: the setting, and with sparse prefill its alpha."""
    return setting if rule is None else f"{setting}, alpha {rule.alpha:g}"
