"""Positions with a gap, which give a short text the distances of a long one.

Source: PoSE (arXiv 2309.10400), with two chunks.
"""

import numpy as np


def gapped_positions(rng: np.random.Generator, rows: int, length: int, span: int) -> np.ndarray:
    """Returns [rows, length] int32 positions, which start at 0 and have one gap in each row.

    The tokens before and after the gap are as far apart as in a text of up to `span` tokens. At
    least one token stands before the gap and two after it, so that each side predicts a token.
    Rows of fewer than three tokens have no gap.

    Args:
      rng: source of where the gaps are and how wide.
      rows, length: shape of the result.
      span: upper bound of the positions, which are below it; at least `length`.
    """
    at = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    if length < 3:
        return at
    start = rng.integers(1, length - 1, (rows, 1))
    gap = rng.integers(0, span - length, (rows, 1), endpoint=True)
    return at + np.where(at >= start, gap, 0).astype(np.int32)
