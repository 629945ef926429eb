"""Converts token ids back to text, all at once or as the ids arrive."""

import codecs
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    return "\ufffd" * (error.end - error.start), error.end


REPLACE = "replace"
REPLACE_EACH_BYTE = "lsjax.replace_each_byte"
codecs.register_error(REPLACE_EACH_BYTE, _replace_each_byte)


@dataclass(frozen=True)
class Detokenizer:
    """Converts a vocabulary's ids to text.

    ``token_bytes`` returns an id's UTF-8 bytes, and none for an id outside the vocabulary (models
    pad their embeddings, so they can produce such ids). ``errors`` names the handler for bytes that
    are not UTF-8: byte-level vocabularies write one U+FFFD per broken character, vocabularies with
    byte fallback one per byte. ``leading_spaces`` is the number of spaces to drop, at most, from
    the start of the first token, because the encoder added them to the text.
    """

    token_bytes: Callable[[int], bytes]
    special_ids: frozenset[int]
    errors: str = REPLACE
    leading_spaces: int = 0

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Returns the text of ``ids``."""
        stream = StreamDecoder(self, skip_special_tokens=skip_special_tokens)
        return stream.push(ids) + stream.flush()


class StreamDecoder:
    """Converts ids to text as they arrive, and holds back the bytes of incomplete characters.

    The texts that ``push`` and a final ``flush`` return, joined, equal the decoding of all ids at
    once.
    """

    def __init__(self, detokenizer: Detokenizer, *, skip_special_tokens: bool = True):
        self._detokenizer = detokenizer
        self._skipped = detokenizer.special_ids if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")(detokenizer.errors)
        self._at_start = True

    def push(self, ids: Iterable[int]) -> str:
        """Takes the next ids and returns the text that they complete."""
        return self._utf8.decode(b"".join(self._bytes(ids)))

    def flush(self) -> str:
        """Returns the text that is still held back, and resets the decoder."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        self._at_start = True
        return text

    def _bytes(self, ids: Iterable[int]) -> Iterator[bytes]:
        for token_id in ids:
            if token_id in self._skipped:
                continue
            token = self._detokenizer.token_bytes(token_id)
            if token and self._at_start:
                self._at_start = False
                spaces = len(token) - len(token.lstrip(b" "))
                token = token[min(spaces, self._detokenizer.leading_spaces) :]
            yield token
