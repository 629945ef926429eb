"""Pass keys hidden in long texts: how many are read right, by length and depth.

Source of the task: Landmark Attention (arXiv 2305.16300).
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from lsjax.errors import UserError
from lsjax.language_model import LanguageModel
from lsjax.shipped.passages import SHORTEST, Passage, make_passage
from lsjax.tokenizer import Tokenizer

_DIGITS = 5


@dataclasses.dataclass(frozen=True)
class NeedleMap:
    """Shares of pass keys read right.

    Attributes:
      lengths: tokens of prompt.
      depths: where the key stands, 0 at the start and 1 at the end.
      shares: [len(lengths)][len(depths)], from 0 to 1.
    """

    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    shares: tuple[tuple[float, ...], ...]

    def by_length(self) -> list[float]:
        """The share right at each length, over all depths."""
        return [float(np.mean(row)) for row in self.shares]


def needle_map(
    model: LanguageModel,
    lengths: Sequence[int],
    depths: Sequence[float],
    keys: int = 1,
    *,
    max_batch_size: int = 1,
    progress: Callable[[int], object] | None = None,
) -> NeedleMap:
    """Asks for `keys` pass keys at each length and depth.

    Args:
      model: to measure; answers greedily, past its trained length too.
      lengths: tokens of prompt; a prompt has that many or a few less.
      depths: from 0 to 1.
      keys: texts for each cell.
      max_batch_size: texts answered together.
      progress: called with the number of texts answered.
    """
    shares = []
    for length in lengths:
        passages = [
            passage_of(model.tokenizer, length, depth, f"needle {i} {depth}")
            for depth in depths
            for i in range(keys)
        ]
        right: list[bool] = []
        for at in range(0, len(passages), max_batch_size):
            asked = passages[at : at + max_batch_size]
            answers = model.generate(
                [passage.prompt for passage in asked],
                16,
                max_input_length=length,
                allow_untrained_length=True,
            )
            right += [_digits(a.text) == p.answer for a, p in zip(answers, asked, strict=True)]
            if progress:
                progress(len(asked))
        cells = np.array(right, float).reshape(len(depths), keys)
        shares.append(tuple(cells.mean(axis=1).tolist()))
    return NeedleMap(tuple(lengths), tuple(depths), tuple(shares))


def passage_of(tokenizer: Tokenizer, length: int, depth: float, seed: str) -> Passage:
    """A passage whose prompt has `length` tokens or, where tokens are words, a few less."""
    characters, best = max(length, SHORTEST), None
    for _ in range(12):
        passage = make_passage(seed, characters, depth)
        tokens = len(tokenizer.encode(passage.prompt))
        if tokens <= length and (best is None or tokens > best[0]):
            best = tokens, passage
        if length - 8 <= tokens <= length:
            break
        characters = max(int(characters * (length - 4) / tokens), SHORTEST)
    if best is None:
        raise UserError(f"a text with a pass key does not fit {length} tokens; ask for more.")
    return best[1]


def _digits(text: str) -> str:
    """The answer's first digits; what stands around them does not matter."""
    return "".join(c for c in text if c.isdecimal())[:_DIGITS]
