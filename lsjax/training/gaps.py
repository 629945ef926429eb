"""Positions with a gap, which lend a short text the distances of a long one.

Source: PoSE (arXiv 2309.10400), with two chunks.
"""

import numpy as np


def gapped_positions(rng: np.random.Generator, rows: int, length: int, span: int) -> np.ndarray:
    """[rows, length] int32: from 0 on, with one gap in each row.

    What stands before the gap and what stands after it are as far apart as in a text of up to
    `span` tokens. At least one token stands before it and two after, so that one is foreseen on
    either side; fewer than three tokens have none.

    Args:
      rng: says where gaps are, and how wide.
      rows, length: the shape.
      span: positions are below it; at least `length`.
    """
    at = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    if length < 3:
        return at
    start = rng.integers(1, length - 1, (rows, 1))
    gap = rng.integers(0, span - length, (rows, 1), endpoint=True)
    return at + np.where(at >= start, gap, 0).astype(np.int32)
