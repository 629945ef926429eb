"""Cuts long text where cuts do not change its tokenization.

A cut is safe if encoding both sides separately gives the same ids as encoding them together.
Encoding piece by piece then bounds memory and makes progress visible, and changes nothing else.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise

PIECE_CHARACTERS = 1 << 16

# A cut rule returns the first safe cut at or after a position, or the text's length.
CutRule = Callable[[str, int], int]


def no_cut(text: str, start: int) -> int:
    """Leaves the text whole: the cut rule for tokenizers without a known safe cut."""
    return len(text)


def pieces(text: str, rule: CutRule, size: int | None = None) -> Iterator[str]:
    """Cuts ``text`` by ``rule`` into pieces of about ``size`` characters."""
    size = size or PIECE_CHARACTERS
    start = 0
    while start < len(text):
        end = rule(text, start + size) if start + size < len(text) else len(text)
        yield text[start:end]
        start = end


# ---- Vocabularies with a splitting pattern -------------------------------------------------------
#
# Byte-pair encoding then works inside each match of the pattern, so a cut is safe where matches
# always end. Matches of every alternative below end in three places: before a space that follows a
# visible character, after a lone newline before a word, and between a kana or Chinese character and
# full-width punctuation. No alternative matches across them. The look-ahead of ``\s+(?!\S)`` sees
# the cut only after a lone newline, which is a match by itself with or without the cut.
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
    """Returns the next cut: the cut rule for splitting patterns made of the known alternatives."""
    match = _WORD_CUT.search(text, start)
    return match.start() if match else len(text)


def never_crosses_cuts(pattern: str) -> bool:
    """Returns whether no match of the splitting ``pattern`` crosses a cut of ``after_words``."""
    return _alternatives(pattern) <= _LETTERS | _OTHERS | {_SPACES}


def always_cuts(pattern: str) -> bool:
    """Returns whether ``pattern`` itself splits text at every cut of ``after_words``.

    It does if it matches all letters and all white space, because then no unmatched stretch of text
    crosses a cut either.
    """
    alternatives = _alternatives(pattern)
    return (
        never_crosses_cuts(pattern)
        and _SPACES in alternatives
        and not alternatives.isdisjoint(_LETTERS)
    )


def _alternatives(pattern: str) -> frozenset[str]:
    """Returns the alternatives at the top level of a regular expression."""
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
# Byte-pair encoding never merges two neighbors that no token of the vocabulary holds side by side,
# so the merges left and right of such a place are independent. Both neighbors must be tokens of the
# vocabulary by themselves, because runs of unknown characters may be fused into one token.

SPACE = "\u2581"  # SentencePiece writes a space as this character


class MergeCuts:
    """A cut rule for byte-pair encoding without a splitting pattern."""

    def __init__(self, tokens: Iterable[str]):
        self._characters: set[str] = set()
        self._neighbors: set[str] = set()
        for token in tokens:
            if len(token) == 1:
                self._characters.add(token)
            self._neighbors.update(map("".join, pairwise(token)))

    def __call__(self, text: str, start: int) -> int:
        """Returns the first place at or after ``start`` that no merge can cross."""
        left = _visible(text[start - 1])
        for position in range(start, len(text)):
            right = _visible(text[position])
            if self._independent(left, right):
                return position
            left = right
        return len(text)

    def before_space(self, text: str, start: int) -> int:
        """Returns the first place before a space, from ``start`` on, that no merge can cross."""
        position = text.find(" ", start)
        while position > 0 and not self._independent(_visible(text[position - 1]), SPACE):
            position = text.find(" ", position + 1)
        return position if position > 0 else len(text)

    def _independent(self, left: str, right: str) -> bool:
        return (
            left + right not in self._neighbors
            and left in self._characters
            and right in self._characters
        )


def _visible(character: str) -> str:
    return SPACE if character == " " else character
