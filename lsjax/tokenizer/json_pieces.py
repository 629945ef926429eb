"""Chooses where long text can be cut for the tokenizer in a tokenizer.json."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from lsjax.tokenizer.config import AddedToken
from lsjax.tokenizer.pieces import (
    SPACE,
    CutRule,
    MergeCuts,
    after_words,
    always_cuts,
    never_crosses_cuts,
    no_cut,
    pieces,
)


@dataclass(frozen=True)
class Piece:
    """A text to encode, and the number of characters of the whole text that it stands for."""

    text: str
    characters: int


@dataclass(frozen=True)
class Pieces:
    """Cuts text by ``rule``.

    ``drop_space`` is for tokenizers that put a space before every text. That space replaces the one
    that every piece but the first begins with.
    """

    rule: CutRule
    drop_space: bool = False

    def __call__(self, text: str) -> Iterator[Piece]:
        """Yields the pieces of ``text``."""
        for i, piece in enumerate(pieces(text, self.rule)):
            yield Piece(piece[1:] if i and self.drop_space else piece, len(piece))


def choose_pieces(
    spec: Mapping[str, Any],
    added: Sequence[AddedToken],
    vocabulary: Callable[[], Mapping[str, int]],
) -> Pieces:
    """Returns a way to cut text that is safe for ``spec``; if none is known, text stays whole."""
    whole = Pieces(no_cut)
    if any(token.lstrip or token.rstrip or token.single_word for token in added):
        return whole  # these match depending on the text around them
    if _splits_words(spec):
        chosen = Pieces(after_words)
        apart = all(_is_apart(token.content, after_words) for token in added)
        return chosen if apart else whole
    spaces = _sentencepiece_spaces(spec)
    # Tokens that are matched in normalized text see the space that is put before every text.
    if spaces is None or any(token.normalized for token in added):
        return whole
    if any(" " in token.content for token in added):
        return whole
    merge_cuts = cache(lambda: MergeCuts(vocabulary()))
    contents = tuple(token.content for token in added)
    drop_space = spaces == "prepended"

    def before_space(text: str, start: int) -> int:
        position = merge_cuts().before_space(text, start)
        # Text next to an added token gets a prepended space of its own.
        while drop_space and position < len(text) and _touches(text, position, contents):
            position = merge_cuts().before_space(text, position + 1)
        return position

    return Pieces(before_space, drop_space)


def _is_apart(content: str, rule: CutRule) -> bool:
    """Returns whether no cut can fall inside an occurrence of ``content``."""
    return rule(f"a{content}a", 2) > len(content)


def _touches(text: str, space: int, contents: tuple[str, ...]) -> bool:
    """Returns whether an added token, or the end of the text, is next to the space."""
    return (
        space + 1 == len(text)
        or text.endswith(contents, 0, space)
        or text.startswith(contents, space + 1)
    )


def _splits_words(spec: Mapping[str, Any]) -> bool:
    """Returns whether the pre-tokenizer always splits where ``after_words`` cuts."""
    if spec.get("normalizer") not in (None, {"type": "NFC"}):
        return False
    cuts = False
    steps = _members(spec.get("pre_tokenizer"), "pretokenizers")
    for i, step in enumerate(steps):
        match step:
            case {"type": "ByteLevel", "add_prefix_space": False}:
                # It replaces spaces with other characters, which later steps would see.
                return (cuts or step.get("use_regex", True)) and i == len(steps) - 1
            case {
                "type": "Split",
                "pattern": {"Regex": pattern},
                "behavior": "Isolated",
                "invert": False,
            } if never_crosses_cuts(pattern):
                cuts = cuts or always_cuts(pattern)
            case {"type": "Digits"}:
                pass
            case _:
                return False
    return cuts


def _sentencepiece_spaces(spec: Mapping[str, Any]) -> str | None:
    """Returns how a SentencePiece-like byte-pair encoding treats spaces at the start of a text.

    "prepended": a space is put before every text. "kept": a text that begins with a space stays as
    it is. ``None``: the tokenizer isn't of this kind.
    """
    model = spec.get("model") or {}
    plain = (
        model.get("type") == "BPE"
        and not model.get("dropout")
        and not model.get("continuing_subword_prefix")
        and not model.get("end_of_word_suffix")
    )
    prepend = {"type": "Prepend", "prepend": SPACE}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    normalizers = _members(spec.get("normalizer"), "normalizers")
    match _members(spec.get("pre_tokenizer"), "pretokenizers"):
        case [{"type": "Metaspace", "replacement": "▁"}] if plain and not normalizers:
            return "kept"
        # Splitting at spaces has no effect once they are replaced.
        case [] | [{"type": "Split", "pattern": {"String": " "}}] if plain:
            if normalizers == [prepend, replace]:
                return "prepended"
            if normalizers == [replace]:
                return "kept"
    return None


def _members(component: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    if component is None:
        return []
    return list(component[key]) if component["type"] == "Sequence" else [component]
