"""Loads tokenizer.json, the format of the Hugging Face tokenizers library."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import tokenizers

from lsjax.runtime.errors import TokenizerError
from lsjax.tokenizer.base import Progress, Tokenizer
from lsjax.tokenizer.config import AddedToken, TokenizerConfig
from lsjax.tokenizer.detokenizer import REPLACE_EACH_BYTE, Detokenizer
from lsjax.tokenizer.json_pieces import Pieces, choose_pieces

# The library encodes the pieces of a batch in parallel. Its data about each token, beside the id,
# take far more memory than the text, so batches are small.
_BATCH = 4


@dataclass(frozen=True, kw_only=True)
class JsonTokenizer(Tokenizer):
    """A tokenizer that uses the tokenizers library."""

    backend: tokenizers.Tokenizer
    pieces: Pieces

    def _encode_text(self, text: str, progress: Progress) -> list[int]:
        ids: list[int] = []
        pieces = self.pieces(text)
        while batch := list(islice(pieces, _BATCH)):
            encoded = self.backend.encode_batch_fast(
                [piece.text for piece in batch], add_special_tokens=False
            )
            for piece, encoding in zip(batch, encoded, strict=True):
                ids += encoding.ids
                progress(piece.characters)
        return ids


def load(path: Path, content: bytes, config: TokenizerConfig) -> JsonTokenizer:
    """Builds a tokenizer from the ``content`` of a tokenizer.json."""
    try:
        spec = json.loads(content)
        backend = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises bare Exceptions
        raise TokenizerError(
            f"{path} isn't a tokenizer.json that the tokenizers library can read ({error}); the "
            "file is damaged or cut short, fetch it again."
        ) from error
    backend.no_truncation()
    backend.no_padding()
    added = _added_tokens(path, backend, config)

    def named_id(name: str) -> int | None:
        token = config.named_tokens.get(name)
        token_id = None if token is None else backend.token_to_id(token)
        if token is not None and token_id is None:
            raise TokenizerError(
                f"{path} has no token {token!r}, which tokenizer_config.json names as {name}; "
                "restore both files from the model's original release."
            )
        return token_id

    bos_id, eos_id = named_id("bos_token"), named_id("eos_token")
    prefix, suffix = _around_prompts(backend)
    # tokenizer_config.json overrides tokenizer.json, separately for prefix and suffix.
    if config.add_bos_token is not None:
        prefix = (bos_id,) if config.add_bos_token and bos_id is not None else ()
    if config.add_eos_token is not None:
        suffix = (eos_id,) if config.add_eos_token and eos_id is not None else ()
    named_texts = {*config.named_tokens.values(), *config.extra_special_tokens}
    special_ids = frozenset(t.id for t in added if t.special or t.content in named_texts)
    return JsonTokenizer(
        vocab_size=max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1,
        bos_id=bos_id,
        eos_ids=() if eos_id is None else (eos_id,),
        chat_template=config.chat_template,
        named_tokens=config.named_tokens,
        prefix=prefix,
        suffix=suffix,
        detokenizer=_detokenizer(path, spec.get("decoder"), backend, added, special_ids),
        backend=backend,
        pieces=choose_pieces(spec, added, lambda: backend.get_vocab(with_added_tokens=False)),
    )


def _added_tokens(
    path: Path, backend: tokenizers.Tokenizer, config: TokenizerConfig
) -> tuple[AddedToken, ...]:
    """Returns all added tokens, after adding those that only tokenizer_config.json has."""
    for token in config.added_tokens:
        if backend.token_to_id(token.content) is None:
            backend.add_tokens(
                [
                    tokenizers.AddedToken(
                        token.content,
                        single_word=token.single_word,
                        lstrip=token.lstrip,
                        rstrip=token.rstrip,
                        normalized=token.normalized,
                        special=token.special,
                    )
                ]
            )
        found = backend.token_to_id(token.content)
        if found != token.id:
            raise TokenizerError(
                f"{path} gives {token.content!r} the id {found}, but tokenizer_config.json says "
                f"{token.id}; restore both files from the model's original release."
            )
    return tuple(
        AddedToken(
            id=token_id,
            content=token.content,
            special=token.special,
            lstrip=token.lstrip,
            rstrip=token.rstrip,
            single_word=token.single_word,
            normalized=token.normalized,
        )
        for token_id, token in backend.get_added_tokens_decoder().items()
    )


def _around_prompts(backend: tokenizers.Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the ids that the post-processor puts before and after a text."""
    inner = backend.encode("a", add_special_tokens=False).ids
    outer = backend.encode("a", add_special_tokens=True).ids
    start = next(i for i in range(len(outer) + 1) if outer[i : i + len(inner)] == inner)
    return tuple(outer[:start]), tuple(outer[start + len(inner) :])


# ---- Decoding ------------------------------------------------------------------------------------


def _byte_characters() -> dict[str, int]:
    """Returns the printable characters that stand for bytes in byte-level vocabularies."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + i): byte for i, byte in enumerate(others)
    }


_BYTE_CHARACTERS = _byte_characters()
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _detokenizer(
    path: Path,
    decoder: Mapping[str, Any] | None,
    backend: tokenizers.Tokenizer,
    added: Sequence[AddedToken],
    special_ids: frozenset[int],
) -> Detokenizer:
    by_token = partial(_by_token, backend, {token.id: token.content.encode() for token in added})
    steps = _steps(decoder, "decoders")
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return Detokenizer(by_token(_byte_level), special_ids)
    if kinds == ["Metaspace"]:
        space = steps[0].get("replacement", "▁")
        prepends = steps[0].get("prepend_scheme", "always") != "never"
        return Detokenizer(
            by_token(lambda token: token.replace(space, " ").encode()),
            special_ids,
            errors=REPLACE_EACH_BYTE,
            # This decoder drops every space of the first token.
            leading_spaces=len(max(backend.get_vocab(), key=len, default="")) if prepends else 0,
        )
    if set(kinds) <= {"Replace", "ByteFallback", "Fuse", "Strip"} and "Fuse" in kinds:
        replacements = [
            (step["pattern"]["String"], step["content"])
            for step in steps
            if step["type"] == "Replace" and "String" in step["pattern"]
        ]
        strips = [step for step in steps if step["type"] == "Strip"]
        plain = all(step["content"] == " " and not step["stop"] for step in strips)
        if plain and len(replacements) == kinds.count("Replace"):
            return Detokenizer(
                by_token(_with_fallback(replacements, "ByteFallback" in kinds)),
                special_ids,
                errors=REPLACE_EACH_BYTE,
                leading_spaces=sum(step["start"] for step in strips),
            )
    raise TokenizerError(
        f"{path}: its decoder ({' + '.join(kinds) or 'none'}) isn't supported; supported are "
        "ByteLevel, Metaspace, and SentencePiece's Replace + ByteFallback + Fuse + Strip, which "
        "generative language models use."
    )


def _steps(component: Mapping[str, Any] | None, members: str) -> Sequence[Mapping[str, Any]]:
    """Returns a component's steps, whether it is a sequence, one step or absent."""
    if component is None:
        return []
    return component[members] if component["type"] == "Sequence" else [component]


def _by_token(
    backend: tokenizers.Tokenizer, added: Mapping[int, bytes], to_bytes: Callable[[str], bytes]
) -> Callable[[int], bytes]:
    """Returns id -> bytes: an added token as it is written, any other through ``to_bytes``."""

    @cache
    def token_bytes(token_id: int) -> bytes:
        if token_id in added:
            return added[token_id]
        token = backend.id_to_token(token_id)
        return b"" if token is None else to_bytes(token)

    return token_bytes


def _byte_level(token: str) -> bytes:
    try:
        return bytes(_BYTE_CHARACTERS[character] for character in token)
    except KeyError:  # a vocabulary may hold characters that stand for no byte
        return token.encode()


def _with_fallback(
    replacements: Sequence[tuple[str, str]], byte_fallback: bool
) -> Callable[[str], bytes]:
    def to_bytes(token: str) -> bytes:
        for old, new in replacements:
            token = token.replace(old, new)
        byte = _BYTE_TOKEN.fullmatch(token) if byte_fallback else None
        return bytes([int(byte[1], 16)]) if byte else token.encode()

    return to_bytes
