"""Progress bars whose time estimates account for the cost of the work, and the same as JSON."""

import contextlib
import functools
import json
import math
import sys
import time
from collections.abc import Iterator
from typing import IO, Any

from tqdm.auto import tqdm  # shows notebook widgets in a notebook

from lsjax.config import ModelConfig
from lsjax.runtime.errors import UserError
from lsjax.runtime.flops import prefill_cost
from lsjax.runtime.primary import is_primary

_EVENT_SECONDS = 0.5  # between two events of a phase, at least
_events: IO[str] | None = None


@contextlib.contextmanager
def events_to(path: str | None) -> Iterator[None]:
    """Writes the progress of all bars to a file or pipe, a JSON object per line.

    An object has the phase, what is done of the total in a unit, the seconds since the phase began,
    and the estimate of the seconds that remain, or null.

    Raises:
      UserError: the file cannot be written.
    """
    global _events
    if path is None or not is_primary():
        yield
        return
    try:
        file = open(path, "w", encoding="utf-8")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}.") from None
    with file:
        _events = file
        try:
            yield
        finally:
            _events = None


class _Bar(tqdm):
    """A bar that writes events as well.

    Attributes:
      phase: name of the work.
      tokens: done and total tokens, if the bar counts their cost.
    """

    phase, tokens, _next_event = "", None, 0.0

    def update(self, n: float = 1) -> bool | None:
        shown = super().update(n)
        if _events is not None and not self.disable:
            self._write_event()
        return shown

    def _write_event(self) -> None:
        done, total = self.tokens or (self.n, self.total)
        seconds = time.time() - self.start_t
        if seconds < self._next_event and done < total:
            return
        self._next_event = seconds + _EVENT_SECONDS
        remaining = round(seconds * (self.total - self.n) / self.n, 1) if self.n else None
        event = {
            "phase": self.phase,
            "done": done,
            "total": total,
            "unit": "tokens" if self.tokens else self.unit,
            "seconds": round(seconds, 1),
            "remaining_seconds": remaining,
        }
        print(json.dumps(event), file=_events, flush=True)


class PrefillBar:
    """A bar over the cost of a prefill, labeled with tokens.

    Call it with the number of tokens of each chunk. No query sees more than `most_keys` keys.
    """

    def __init__(self, config: ModelConfig, tokens: int, most_keys: float = math.inf):
        self._cost = functools.partial(prefill_cost, config, most_keys=most_keys)
        self._tokens, self._done = tokens, 0
        self._bar = _bar(
            "prefill",
            self._cost(0, tokens),
            desc=f"prefill 0/{tokens:,} tokens",
            bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}",
        )

    def __call__(self, tokens: int) -> None:
        cost = self._cost(self._done, tokens)
        self._done += tokens
        label = f"prefill {self._done:,}/{self._tokens:,} tokens"
        self._bar.set_description_str(label, refresh=False)
        self._bar.tokens = self._done, self._tokens
        self._bar.update(cost)
        if self._done >= self._tokens:
            self._bar.close()


def byte_bar(description: str, total: int) -> _Bar:
    """Creates a bar over bytes; `bar.update` is the callback."""
    return _bar(description, total, unit="B", unit_scale=True)


def character_bar(description: str, total: int) -> _Bar:
    """Creates a bar over characters, which is shown only if the work takes over a second."""
    return _bar(description, total, unit="char", unit_scale=True, delay=1.0, leave=False)


def step_bar(steps: int, done: int) -> _Bar:
    """Creates a bar over training steps, `done` of which were done before."""
    return _bar("train", steps, unit="step", initial=done)


def _bar(phase: str, total: float, **options: Any) -> _Bar:
    """Creates a bar on stderr, in the primary process only."""
    options = {"desc": phase} | options
    bar = _Bar(total=total, file=sys.stderr, disable=not is_primary(), **options)
    bar.phase = phase
    return bar
