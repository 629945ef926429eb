"""Stop strings: texts that end an answer."""

from collections.abc import Sequence

from lsjax.tokenizer import Tokenizer


class TextStream:
    """Decodes an answer's ids to text incrementally, up to the first stop string.

    The results of all `push` calls and a final `flush`, joined, equal `cut` of the whole text.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self._decoder, self._stop = tokenizer.stream_decoder(), tuple(stop)
        self._held, self.stopped = "", False

    def push(self, ids: Sequence[int]) -> str:
        """Returns the text that the next ids add, without what may begin a stop string."""
        return self._take(self._decoder.push(ids), last=False)

    def flush(self) -> str:
        """Returns the text that is still held back."""
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
    """Returns the text before the first stop string in it."""
    return text[: min((at for s in stop if (at := text.find(s)) >= 0), default=len(text))]


def _begun(text: str, stop: Sequence[str]) -> int:
    """Returns how many of the last characters may be the start of a stop string."""
    longest = max(map(len, stop), default=1) - 1
    for size in range(min(longest, len(text)), 0, -1):
        if any(s.startswith(text[-size:]) for s in stop):
            return size
    return 0


class Stopper:
    """Finds the id of each row that completes a stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], rows: int):
        self._streams = [TextStream(tokenizer, stop) for _ in range(rows)]

    def stands(self, row: int, ids: Sequence[int]) -> int | None:
        """Takes a row's next ids; returns how many count if one completes a stop string, or None.

        The id that completes the stop string counts as well.
        """
        stream = self._streams[row]
        for i, token in enumerate(ids):
            stream.push([token])
            if stream.stopped:
                return i + 1
        return None
