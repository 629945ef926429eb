"""Pass keys hidden in long texts: the share answered correctly, by length and depth.

Source of the task: Landmark Attention (arXiv 2305.16300).
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from lsjax.evals.cells import Cells
from lsjax.evals.passkey import SHORTEST, Passage, make_passage
from lsjax.inference.sparsity import Sparsity
from lsjax.runtime.errors import UserError
from lsjax.runtime.html import grid
from lsjax.tokenizer import Tokenizer

if TYPE_CHECKING:
    from lsjax.language_model import LanguageModel

_DIGITS = 5


@dataclasses.dataclass(frozen=True)
class NeedleMap:
    """Shares of pass keys answered correctly.

    Attributes:
      lengths: prompt lengths in tokens.
      depths: where the key stands, 0 at the start and 1 at the end.
      shares: [len(lengths)][len(depths)] shares from 0 to 1.
    """

    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    shares: tuple[tuple[float, ...], ...]

    @classmethod
    def of(cls, cells: Mapping[str, bool]) -> "NeedleMap":
        """Averages the cells that needle_map keeps."""
        found: dict[tuple[int, float], list[bool]] = {}
        for name, right in cells.items():
            length, depth, _ = name.split()
            found.setdefault((int(length), float(depth)), []).append(right)
        lengths, depths = (tuple(sorted(set(values))) for values in zip(*found, strict=True))
        shares = [[found.get((n, d), [np.nan]) for d in depths] for n in lengths]
        return cls(lengths, depths, tuple(tuple(map(_mean, row)) for row in shares))

    def by_length(self) -> list[float]:
        """Returns the share of correct answers at each length, over the depths measured there."""
        return [float(np.nanmean(row)) for row in self.shares]

    def _repr_html_(self) -> str:
        """Shows the shares in a notebook, a row per length and a column per depth."""
        rows = zip(self.lengths, self.shares, strict=True)
        return grid(
            ("tokens", *(f"{depth:.0%} deep" for depth in self.depths)),
            ((f"{length:,}", *(f"{share:.0%}" for share in row)) for length, row in rows),
        )


def needle_map(
    model: "LanguageModel",
    lengths: Sequence[int],
    depths: Sequence[float],
    keys: int = 1,
    *,
    max_batch_size: int = 1,
    cells: Cells | None = None,
    progress: Callable[[int], object] | None = None,
    on_sparsity: Callable[[int, Sparsity], object] | None = None,
) -> NeedleMap:
    """Asks for `keys` pass keys at each length and depth.

    Args:
      model: the model to measure. It answers greedily, even past its trained length.
      lengths: prompt lengths in tokens; a prompt has that many tokens or a few less.
      depths: where the key stands, 0 at the start and 1 at the end.
      keys: texts per cell.
      max_batch_size: texts answered together.
      cells: keeps whether each key was read right; those that it has are not asked for again.
      progress: called with the number of texts answered.
      on_sparsity: called with the length and what a batch's prompts attended to, if that was not
        everything.
    """
    cells, asked = Cells() if cells is None else cells, []
    for length in lengths:
        names = {
            f"{length} {depth} {i}": (depth, f"needle {i} {depth}")
            for depth in depths
            for i in range(keys)
        }
        asked += names
        missing = cells.missing(names)
        if progress:
            progress(len(names) - len(missing))
        for at in range(0, len(missing), max_batch_size):
            batch = missing[at : at + max_batch_size]
            passages = [passage_of(model.tokenizer, length, *names[name]) for name in batch]
            answers = model.generate(
                [passage.prompt for passage in passages],
                16,
                max_input_length=length,
                allow_untrained_length=True,
            )
            right = [_digits(a.text) == p.answer for a, p in zip(answers, passages, strict=True)]
            cells.add(dict(zip(batch, right, strict=True)))
            if on_sparsity and (sparsity := answers[0].stats.sparsity):
                on_sparsity(length, sparsity)
            if progress:
                progress(len(batch))
    return NeedleMap.of({name: cells.values[name] for name in asked})


def passage_of(tokenizer: Tokenizer, length: int, depth: float, seed: str) -> Passage:
    """Makes a passage whose prompt has `length` tokens, or a few less if tokens are words."""
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


def _mean(right: Sequence[bool]) -> float:
    return float(np.mean(right))


def _digits(text: str) -> str:
    """Returns the first five digits of an answer, ignoring the text around them."""
    return "".join(c for c in text if c.isdecimal())[:_DIGITS]
