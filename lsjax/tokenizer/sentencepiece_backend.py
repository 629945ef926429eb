"""Loads tokenizer.model files that are SentencePiece models."""

from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from lsjax.runtime.errors import TokenizerError
from lsjax.tokenizer.added_tokens import AddedTokenFinder
from lsjax.tokenizer.base import Progress, Tokenizer
from lsjax.tokenizer.config import AddedToken, TokenizerConfig
from lsjax.tokenizer.detokenizer import REPLACE_EACH_BYTE, Detokenizer
from lsjax.tokenizer.pieces import SPACE, CutRule, MergeCuts, no_cut, pieces
from lsjax.tokenizer.sentencepiece_spec import SentencePieceSpec, read_spec

# Appended to a serialized model, this sets its normalizer_spec.add_dummy_prefix to false.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"

# Tokenizer classes that put bos before a prompt only if add_bos_token is set.
_WITHOUT_BOS = frozenset({"BaichuanTokenizer"})


@dataclass(frozen=True, kw_only=True)
class SentencePieceTokenizer(Tokenizer):
    """A tokenizer that uses the sentencepiece library.

    SentencePiece puts a space before a text. ``starts`` does so, ``continues`` doesn't. With
    ``legacy``, text after an added token counts as the start of a text.
    """

    starts: SentencePieceProcessor
    continues: SentencePieceProcessor
    spec: SentencePieceSpec
    legacy: bool
    added_tokens: AddedTokenFinder

    @cached_property
    def _rule(self) -> CutRule:
        if not self.spec.merges_plain_text:
            return no_cut
        return MergeCuts(map(self.starts.id_to_piece, range(self.starts.get_piece_size())))

    def _encode_text(self, text: str, progress: Progress) -> list[int]:
        ids: list[int] = []
        done = 0
        for section, end, token_id in self.added_tokens.sections(text):
            processor = self.starts if self.legacy or done == 0 else self.continues
            for piece in pieces(section, lambda text, start: self._rule(text, start)):
                ids += processor.encode(piece)
                processor = self.continues
                progress(len(piece))
                done += len(piece)
            if token_id is not None:
                ids.append(token_id)
            progress(end - done)
            done = end
        return ids


def load(path: Path, content: bytes, config: TokenizerConfig) -> SentencePieceTokenizer:
    """Builds a tokenizer from the ``content`` of a SentencePiece model."""
    try:
        spec = read_spec(content)
        processor = SentencePieceProcessor(model_proto=content)
        continues = SentencePieceProcessor(model_proto=content + _NO_DUMMY_PREFIX)
        size = processor.get_piece_size()
        pieces_by_id = [processor.id_to_piece(i) for i in range(size)]
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        raise TokenizerError(
            f"{path} isn't a SentencePiece model that can be read ({error}); the file is damaged "
            "or cut short, fetch it again."
        ) from error
    named = {
        name: pieces_by_id[token_id]
        for name, token_id in (
            ("bos_token", processor.bos_id()),
            ("eos_token", processor.eos_id()),
            ("unk_token", processor.unk_id()),
        )
        if token_id >= 0
    } | dict(config.named_tokens)

    by_text = {token.content: token for token in config.added_tokens}
    ids = {text: i for i, text in enumerate(pieces_by_id)} | {
        text: token.id for text, token in by_text.items()
    }
    for text in (*named.values(), *config.extra_special_tokens):
        if text in ids:
            found = by_text.get(text) or AddedToken(ids[text], text)
            by_text[text] = replace(found, special=True)
    special_ids = frozenset(token.id for token in by_text.values() if token.special)

    def named_id(name: str) -> int | None:
        text = named.get(name)
        if text is not None and text not in ids:
            raise TokenizerError(
                f"{path} has no token {text!r}, which tokenizer_config.json names as {name}; "
                "restore both files from the model's original release."
            )
        return None if text is None else ids[text]

    added_bytes = {token.id: token.content.encode() for token in by_text.values()}

    @cache
    def token_bytes(token_id: int) -> bytes:
        if token_id in added_bytes:
            return added_bytes[token_id]
        if not 0 <= token_id < size:
            return b""
        piece = pieces_by_id[token_id]
        if processor.is_byte(token_id):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(SPACE, " ").encode()

    bos_id, eos_id = named_id("bos_token"), named_id("eos_token")
    add_bos = config.add_bos_token
    if add_bos is None:
        add_bos = config.tokenizer_class not in _WITHOUT_BOS
    return SentencePieceTokenizer(
        vocab_size=max([size - 1, *added_bytes]) + 1,
        bos_id=bos_id,
        eos_ids=() if eos_id is None else (eos_id,),
        chat_template=config.chat_template,
        named_tokens=named,
        prefix=(bos_id,) if add_bos and bos_id is not None else (),
        suffix=(eos_id,) if config.add_eos_token and eos_id is not None else (),
        detokenizer=Detokenizer(
            token_bytes,
            special_ids | {i for i in range(size) if processor.is_control(i)},
            errors=REPLACE_EACH_BYTE,
            leading_spaces=int(spec.add_dummy_prefix),
        ),
        starts=processor,
        continues=continues,
        spec=spec,
        legacy=config.legacy,
        added_tokens=AddedTokenFinder(by_text.values()),
    )
