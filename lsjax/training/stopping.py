"""Ending between two steps when the system asks for it."""

import signal
from types import FrameType

from lsjax.hosts import greatest

_ASKING = (signal.SIGTERM, signal.SIGINT)


class Stop:
    """A context within which SIGTERM and SIGINT are asked for, instead of ending the process.

    A second one ends it at once.
    """

    def __init__(self):
        self._received = 0

    def __enter__(self) -> "Stop":
        self._before = {number: signal.signal(number, self._receive) for number in _ASKING}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def asked(self) -> int:
        """The signal that this process or another of the run has had; 0 for none."""
        return greatest(self._received)

    def _receive(self, number: int, _: FrameType | None) -> None:
        self._received = number
        for each, handler in self._before.items():
            signal.signal(each, handler)
