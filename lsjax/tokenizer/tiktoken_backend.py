"""Loads vocabularies in tiktoken's format: one base64 token and its rank per line."""

import base64
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import tiktoken

from lsjax.runtime.errors import TokenizerError
from lsjax.tokenizer.added_tokens import AddedTokenFinder
from lsjax.tokenizer.base import Progress, Tokenizer
from lsjax.tokenizer.config import AddedToken, TokenizerConfig
from lsjax.tokenizer.detokenizer import Detokenizer
from lsjax.tokenizer.pieces import after_words, pieces

_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# To find the end of a run of white space, tiktoken keeps every place where the run might end. It
# runs out of memory for these in a run of between 300,000 and 1,000,000 characters.
_LONG_RUN = re.compile(r"\s{250000}")


@dataclass(frozen=True)
class _Family:
    """Settings of a model family that its files do not give."""

    special_tokens: tuple[str, ...] = ()
    prefix: tuple[str, ...] = ()
    bos: str | None = None
    eos: tuple[str, ...] = ()


_GLM4 = _Family(prefix=("[gMASK]", "<sop>"))
_LLAMA3 = _Family(
    special_tokens=(
        "<|begin_of_text|>",
        "<|end_of_text|>",
        *(f"<|reserved_special_token_{i}|>" for i in range(4)),
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|reserved_special_token_4|>",
        "<|eot_id|>",
        *(f"<|reserved_special_token_{i}|>" for i in range(5, 251)),
    ),
    prefix=("<|begin_of_text|>",),
    bos="<|begin_of_text|>",
    eos=("<|end_of_text|>", "<|eot_id|>"),
)
_FAMILIES = {
    "ChatGLM4Tokenizer": _GLM4,
    "ChatGLMTokenizer": _GLM4,
    None: _LLAMA3,
    "PreTrainedTokenizerFast": _LLAMA3,
}


@dataclass(frozen=True, kw_only=True)
class TiktokenTokenizer(Tokenizer):
    """A tokenizer that uses the tiktoken library."""

    encoding: tiktoken.Encoding
    added_tokens: AddedTokenFinder

    def _encode_text(self, text: str, progress: Progress) -> list[int]:
        ids: list[int] = []
        done = 0
        for section, end, token_id in self.added_tokens.sections(text):
            for piece in pieces(section, after_words):
                for part in _without_long_runs(piece):
                    ids += self.encoding.encode_ordinary(part)
                progress(len(piece))
                done += len(piece)
            if token_id is not None:
                ids.append(token_id)
            progress(end - done)
            done = end
        return ids


def _without_long_runs(text: str) -> Iterator[str]:
    """Yields ``text`` in parts, cut inside runs of white space that are too long for tiktoken."""
    start = 0
    for run in _LONG_RUN.finditer(text):
        yield text[start : run.end()]
        start = run.end()
    yield text[start:]


def load(path: Path, content: bytes, config: TokenizerConfig) -> TiktokenTokenizer:
    """Builds a tokenizer from the ``content`` of a ranks file."""
    if config.tokenizer_class not in _FAMILIES:
        raise TokenizerError(
            f"{path} holds tiktoken ranks of tokenizer_class {config.tokenizer_class!r}, whose "
            "splitting rules aren't known; supported are GLM-4's and Llama 3's. Use a release of "
            "the model that has a tokenizer.json."
        )
    family = _FAMILIES[config.tokenizer_class]
    ranks = _read_ranks(path, content)
    added = config.added_tokens or tuple(
        AddedToken(len(ranks) + i, text) for i, text in enumerate(family.special_tokens)
    )
    specials = {token.content: token.id for token in added}
    taken = set(ranks.values()).intersection(specials.values())
    if taken:
        raise TokenizerError(
            f"{path} and the folder's tokenizer_config.json both define id {min(taken)}; "
            "restore both from the model's original release."
        )

    def special_id(text: str) -> int:
        if text not in specials:
            raise TokenizerError(
                f"{path}: the special token {text!r} has no id; restore tokenizer_config.json "
                "from the model's original release."
            )
        return specials[text]

    encoding = tiktoken.Encoding(
        path.name, pat_str=_PATTERN, mergeable_ranks=ranks, special_tokens=specials
    )
    known = frozenset(ranks.values()).union(specials.values())

    @cache
    def token_bytes(token_id: int) -> bytes:
        return encoding.decode_single_token_bytes(token_id) if token_id in known else b""

    named = _named_tokens(config, family)
    bos = named.get("bos_token")
    eos = family.eos if "eos_token" not in config.named_tokens else (named["eos_token"],)
    prefix = _prefix(config, family, bos)
    return TiktokenTokenizer(
        vocab_size=max(known) + 1,
        bos_id=special_id(bos) if bos is not None else None,
        eos_ids=tuple(map(special_id, eos)),
        chat_template=config.chat_template,
        named_tokens=named,
        prefix=tuple(map(special_id, prefix)),
        suffix=tuple(map(special_id, eos[:1])) if config.add_eos_token else (),
        detokenizer=Detokenizer(
            token_bytes, frozenset(token.id for token in added if token.special)
        ),
        encoding=encoding,
        added_tokens=AddedTokenFinder(added),
    )


def _named_tokens(config: TokenizerConfig, family: _Family) -> Mapping[str, str]:
    defaults = {"bos_token": family.bos, "eos_token": family.eos[0] if family.eos else None}
    return {k: v for k, v in defaults.items() if v is not None} | dict(config.named_tokens)


def _prefix(config: TokenizerConfig, family: _Family, bos: str | None) -> tuple[str, ...]:
    if config.add_bos_token is None or bos is None:
        return family.prefix
    return (bos,) if config.add_bos_token else ()


def _read_ranks(path: Path, content: bytes) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError as error:
            raise TokenizerError(
                f"{path}, line {number}: not a base64 token and its rank; the file is damaged, "
                "fetch it again."
            ) from error
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing or len(set(ranks.values())) != len(ranks):
        fault = f"byte {missing[0]:#04x} has no token" if missing else "a rank occurs twice"
        raise TokenizerError(f"{path}: {fault}; the file is damaged or cut short, fetch it again.")
    return ranks
