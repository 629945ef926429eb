"""What a user should know though nothing is wrong: one line each, said once.

Programs print them as `note` lines, see lsjax.cli; elsewhere they are warnings of the logger
"lsjax".
"""

import logging
from collections.abc import Callable

_LOGGER = logging.getLogger("lsjax")


def note(text: str) -> None:
    """Says what has no effect, or another one than might be expected."""
    _LOGGER.warning("%s", text)


class Printed(logging.Handler):
    """Prints notes as a program does, each once."""

    def __init__(self, say: Callable[[str], None]):
        super().__init__()
        self._say, self._said = say, set()

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if text not in self._said:
            self._said.add(text)
            self._say(f"note       {text}")
