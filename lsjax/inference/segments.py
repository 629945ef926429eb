"""Decode segments, one after the other, as their tokens are read."""

import concurrent.futures
from collections.abc import Callable, Iterator

import jax

from lsjax.inference.steps import DecodeState

# The chosen ids of a segment, how many of them are accepted, and the number of steps that were run.
Segment = tuple[jax.Array, jax.Array, jax.Array]
Decode = Callable[[DecodeState], tuple[DecodeState, Segment]]


def segments(decode: Decode, state: DecodeState) -> Iterator[Segment]:
    """Decodes a segment each time that one is asked for."""
    while True:
        state, found = decode(state)
        yield found


def segments_ahead(decode: Decode, state: DecodeState) -> Iterator[Segment]:
    """Decodes the segment after the one that is asked for as well, while its tokens are read.

    So a GPU does not wait for its host between segments. Rows that are done on the device take no
    more steps; a segment that nobody asks for is run and dropped. Dispatch is left to a thread,
    since a loop of unknown length may hold up whoever dispatches it until it ends.
    """
    with concurrent.futures.ThreadPoolExecutor(max_workers=1) as pool:
        ahead = pool.submit(decode, state)
        del state
        while True:
            state, found = ahead.result()
            ahead = pool.submit(decode, state)
            del state
            yield found
