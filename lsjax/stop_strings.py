"""Texts that end an answer where they come up."""

from collections.abc import Sequence

from lsjax.tokenizer import Tokenizer


class TextStream:
    """An answer's ids -> its text as it comes, which ends before the first stop string.

    All that `push` and a last `flush` return, joined, is `cut` of the whole answer's text.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self._decoder, self._stop = tokenizer.stream_decoder(), tuple(stop)
        self._held, self.stopped = "", False

    def push(self, ids: Sequence[int]) -> str:
        """Takes the next ids; what may be the start of a stop string is held back."""
        return self._take(self._decoder.push(ids), last=False)

    def flush(self) -> str:
        """What is still held back."""
        return self._take(self._decoder.flush(), last=True)

    def _take(self, text: str, last: bool) -> str:
        if self.stopped:
            return ""
        text = self._held + text
        whole = cut(text, self._stop)
        self.stopped = len(whole) < len(text)
        shown = len(whole)
        if not self.stopped and not last:
            shown -= _begun(text, self._stop)
        self._held = whole[shown:]
        return whole[:shown]


def cut(text: str, stop: Sequence[str]) -> str:
    """The text before the first of the stop strings in it."""
    return text[: min((at for s in stop if (at := text.find(s)) >= 0), default=len(text))]


def _begun(text: str, stop: Sequence[str]) -> int:
    """How many of the last characters may be the start of a stop string."""
    longest = max(map(len, stop), default=1) - 1
    for size in range(min(longest, len(text)), 0, -1):
        if any(s.startswith(text[-size:]) for s in stop):
            return size
    return 0


class Stopper:
    """Finds out after which id of a row its text holds a stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], rows: int):
        self._streams = [TextStream(tokenizer, stop) for _ in range(rows)]

    def stands(self, row: int, ids: Sequence[int]) -> int | None:
        """How many of a row's next ids count, up to the one that completes a stop string; None
        where none does."""
        stream = self._streams[row]
        for i, token in enumerate(ids):
            stream.push([token])
            if stream.stopped:
                return i + 1
        return None
