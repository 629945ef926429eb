"""Finds added tokens in text."""

import re
from collections.abc import Iterable, Iterator

from lsjax.tokenizer.config import AddedToken


class AddedTokenFinder:
    """Splits text at the added tokens in it."""

    def __init__(self, tokens: Iterable[AddedToken]):
        # Longest first, so that a token wins over a shorter one that it begins with.
        tokens = sorted(tokens, key=lambda token: len(token.content), reverse=True)
        self._ids = {token.content: token.id for token in tokens}
        # An alternation without groups lets the search skip to the tokens' first characters.
        self._pattern = re.compile("|".join(map(_pattern, tokens))) if tokens else None

    def sections(self, text: str) -> Iterator[tuple[str, int, int | None]]:
        """Yields each stretch of ordinary text with the added token that follows it.

        Each item holds the stretch (which may be empty), the position in ``text`` where the token
        ends, and the token's id (``None`` at the end of the text).
        """
        start = 0
        if self._pattern is not None:
            for match in self._pattern.finditer(text):
                yield text[start : match.start()], match.end(), self._id(match.group())
                start = match.end()
        yield text[start:], len(text), None

    def _id(self, found: str) -> int:
        # A match may include the white space around the token.
        return self._ids[found if found in self._ids else found.strip()]


def _pattern(token: AddedToken) -> str:
    content = re.escape(token.content)
    if token.single_word:
        content = rf"(?<!\w){content}(?!\w)"
    left = r"\s*" if token.lstrip else ""
    right = r"\s*" if token.rstrip else ""
    return left + content + right
