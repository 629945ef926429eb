"""Decode segments, one after the other, as their tokens are read."""

import concurrent.futures
from collections.abc import Callable

import jax

from lsjax.inference.steps import DecodeState

# The chosen ids of a segment, how many of them are accepted, and the number of steps that were run.
Segment = tuple[jax.Array, jax.Array, jax.Array]
Decode = Callable[[DecodeState], tuple[DecodeState, Segment]]


class Segments:
    """Decodes a segment each time that one is asked for.

    Attributes:
      state: state after the last segment that was run.
    """

    def __init__(self, decode: Decode, state: DecodeState):
        self._decode, self.state = decode, state

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def next(self) -> Segment:
        self.state, found = self._decode(self.state)
        return found


class SegmentsAhead:
    """Decodes the segment after the one that is asked for as well, while its tokens are read.

    So a GPU does not wait for its host between segments. Rows that are done on the device take no
    more steps; a segment that nobody asks for is run and dropped. Dispatch is left to a thread,
    since a loop of unknown length may hold up whoever dispatches it until it ends.
    """

    def __init__(self, decode: Decode, state: DecodeState):
        self._decode = decode
        self._pool = concurrent.futures.ThreadPoolExecutor(max_workers=1)
        self._ahead = self._pool.submit(decode, state)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._pool.shutdown()

    @property
    def state(self) -> DecodeState:
        """State after the last segment that was run."""
        return self._ahead.result()[0]

    def next(self) -> Segment:
        state, found = self._ahead.result()
        self._ahead = self._pool.submit(self._decode, state)
        return found
