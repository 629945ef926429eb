"""Cutting long text where tokenisation can't notice.

A cut is safe when encoding both sides apart gives the ids of encoding them together. Encoding
piece by piece then bounds memory and lets progress be told, and changes nothing else.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise

PIECE_CHARACTERS = 1 << 16

# A cut rule gives the first safe cut at or after a position, or the text's length.
CutRule = Callable[[str, int], int]


def no_cut(text: str, start: int) -> int:
    """The rule for tokenizers of which no safe cut is known: the text stays whole."""
    return len(text)


def pieces(text: str, rule: CutRule, size: int | None = None) -> Iterator[str]:
    """Cut ``text`` by ``rule`` into pieces of about ``size`` characters."""
    size = size or PIECE_CHARACTERS
    start = 0
    while start < len(text):
        end = rule(text, start + size) if start + size < len(text) else len(text)
        yield text[start:end]
        start = end


# ---- Vocabularies behind a splitting pattern -----------------------------------------------------
#
# Byte-pair encoding then works inside each match of the pattern, so a cut is safe where matches
# always end. Three such places hold for every alternative below: before a space that follows a
# visible character, after a lone newline before a word, and between a kana or Chinese character and
# full-width punctuation. No alternative matches across them. The look-ahead of ``\s+(?!\S)`` sees
# the cut only after a lone newline, which is one match by itself with or without it.
_WORD_CUT = re.compile(r"(?<=\S)(?= )|(?<=\S\n)(?=\w)|(?<=[ぁ-ゖァ-ヺ一-龥])(?=[，。！？；：、])")

_CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LETTERS = frozenset(
    {
        r" ?\p{L}+",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+(?i:{_CONTRACTIONS})?",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*(?i:{_CONTRACTIONS})?",
    }
)
_SPACES = r"\s+"
_OTHERS = frozenset(_CONTRACTIONS.split("|")) | {
    f"(?i:{_CONTRACTIONS})",
    r"'(?:[sdmt]|ll|ve|re)",
    r"'(?i:[sdmt]|ll|ve|re)",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+""",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r" ?\p{N}+",
    r"\p{N}",
    r"\p{N}+",
    r"\p{N}{1,3}",
    r" ?[^\s\p{L}\p{N}]+",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
    r" ?[\p{P}\p{S}]+[\r\n]*",
    r"\s*[\r\n]+",
    r"\s*[\r\n]",
    r"\s+(?!\S)",
}


def after_words(text: str, start: int) -> int:
    """The cut rule for splitting patterns made of the known alternatives."""
    match = _WORD_CUT.search(text, start)
    return match.start() if match else len(text)


def never_crosses_cuts(pattern: str) -> bool:
    """Whether no match of the splitting ``pattern`` reaches across a cut of ``after_words``."""
    return _alternatives(pattern) <= _LETTERS | _OTHERS | {_SPACES}


def always_cuts(pattern: str) -> bool:
    """Whether ``pattern`` itself splits text at every cut of ``after_words``.

    It does when it matches all letters and all white space, so that no unmatched stretch of text
    reaches across a cut either.
    """
    alternatives = _alternatives(pattern)
    return (
        never_crosses_cuts(pattern)
        and _SPACES in alternatives
        and not alternatives.isdisjoint(_LETTERS)
    )


def _alternatives(pattern: str) -> frozenset[str]:
    """The alternatives at the top level of a regular expression."""
    found, depth, in_class, start = [], 0, False, 0
    for match in re.finditer(r"\\.|.", pattern, re.DOTALL):
        token = match.group()
        if in_class:
            in_class = token != "]"
        elif token == "[":
            in_class = True
        elif token in "()":
            depth += 1 if token == "(" else -1
        elif token == "|" and depth == 0:
            found.append(pattern[start : match.start()])
            start = match.end()
    return frozenset([*found, pattern[start:]])


# ---- Vocabularies that merge across the whole text -----------------------------------------------
#
# Byte-pair encoding never joins two neighbours that no token of the vocabulary holds side by side,
# so what is merged left of such a place and right of it is independent. Both neighbours must be in
# the vocabulary by themselves, as runs of unknown characters may be fused into one token.

SPACE = "\u2581"  # SentencePiece writes a space so


class MergeCuts:
    """The cut rule for byte-pair encoding without a splitting pattern."""

    def __init__(self, tokens: Iterable[str]):
        self._characters: set[str] = set()
        self._neighbours: set[str] = set()
        for token in tokens:
            if len(token) == 1:
                self._characters.add(token)
            self._neighbours.update(map("".join, pairwise(token)))

    def __call__(self, text: str, start: int) -> int:
        """The first place at or after ``start`` across which nothing can be merged."""
        left = _visible(text[start - 1])
        for position in range(start, len(text)):
            right = _visible(text[position])
            if self._independent(left, right):
                return position
            left = right
        return len(text)

    def before_space(self, text: str, start: int) -> int:
        """The same, only at spaces."""
        position = text.find(" ", start)
        while position > 0 and not self._independent(_visible(text[position - 1]), SPACE):
            position = text.find(" ", position + 1)
        return position if position > 0 else len(text)

    def _independent(self, left: str, right: str) -> bool:
        return (
            left + right not in self._neighbours
            and left in self._characters
            and right in self._characters
        )


def _visible(character: str) -> str:
    return SPACE if character == " " else character
