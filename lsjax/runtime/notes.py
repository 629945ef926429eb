"""Notes: single lines that a user should know although nothing is wrong.

Programs print each note once, as a `note` line; see lsjax.cli.program. Elsewhere notes are warnings
of the logger "lsjax".
"""

import logging
from collections.abc import Callable

_LOGGER = logging.getLogger("lsjax")


def note(text: str) -> None:
    """Logs a note, such as that an option has no effect or an unexpected one."""
    _LOGGER.warning("%s", text)


class NotePrinter(logging.Handler):
    """A log handler that prints notes for a program, each once."""

    def __init__(self, say: Callable[[str], None]):
        super().__init__()
        self._say, self._said = say, set()

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if text not in self._said:
            self._said.add(text)
            self._say(f"note       {text}")
