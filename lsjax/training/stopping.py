"""Stops training between two steps when the system asks for it."""

import signal
from types import FrameType

from lsjax.distributed.multihost import all_processes_max

_ASKING = (signal.SIGTERM, signal.SIGINT)


class StopSignal:
    """A context in which SIGTERM and SIGINT are recorded, and do not end the process.

    A second signal ends it at once.
    """

    def __init__(self):
        self._received = 0

    def __enter__(self) -> "StopSignal":
        self._before = {number: signal.signal(number, self._receive) for number in _ASKING}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def received(self) -> int:
        """Returns the signal that any process of the run has received; 0 for none."""
        return all_processes_max(self._received)

    def _receive(self, number: int, _: FrameType | None) -> None:
        self._received = number
        for each, handler in self._before.items():
            signal.signal(each, handler)
