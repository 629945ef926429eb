"""Writes tokenizer.model for a SentencePiece vocabulary, which GGUF files call llama."""

import json
from typing import Any

from gguf import TokenType
from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

from lsjax.checkpoint.gguf.metadata import Metadata
from lsjax.checkpoint.gguf.vocabulary import PREFIX, Vocabulary
from lsjax.runtime.errors import UserError

# llama.cpp takes these where a file does not say them.
DEFAULT_IDS = {"unk_token": 0, "bos_token": 1, "eos_token": 2}


def sentencepiece_files(metadata: Metadata, vocabulary: Vocabulary) -> dict[str, Any]:
    """Returns the tokenizer files by name.

    Raises:
      UserError: the tokens have no scores, or are no SentencePiece model.
    """
    add_bos = metadata.get(PREFIX + "add_bos_token", bool, True)
    add_eos = metadata.get(PREFIX + "add_eos_token", bool, False)
    # Some files have merges too, which say the same as the scores.
    metadata.mark_known(PREFIX + "pre", PREFIX + "merges")
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": add_bos,
        "add_eos_token": add_eos,
        "legacy": False,
        "added_tokens_decoder": {
            str(token.pop("id")): token for token in vocabulary.added_tokens()
        },
    } | vocabulary.tokenizer_config()
    return {
        "tokenizer.model": _model(metadata, vocabulary),
        "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False).encode(),
    }


def _model(metadata: Metadata, vocabulary: Vocabulary) -> bytes:
    """Returns the serialized model: a byte-pair encoding that merges by score."""
    scores = metadata.array(PREFIX + "scores", float)
    if len(scores) != len(vocabulary.tokens):
        raise UserError(
            f"{metadata.path}: {PREFIX}scores must be as many as its tokens; download it again."
        )
    model = sentencepiece_model_pb2.ModelProto()
    named = vocabulary.named
    for i, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True)):
        # A model has exactly one unknown token. The kinds have the same numbers in both formats.
        if i == named["unk_token"]:
            kind = TokenType.UNKNOWN
        elif kind == TokenType.UNKNOWN:
            kind = TokenType.CONTROL
        model.pieces.add(piece=token, score=scores[i], type=int(kind))
    trainer = model.trainer_spec
    trainer.model_type = trainer.BPE
    trainer.vocab_size = len(vocabulary.tokens)
    trainer.byte_fallback = TokenType.BYTE in vocabulary.types
    for name in ("unk", "bos", "eos", "pad"):
        token_id = named.get(f"{name}_token", -1)
        setattr(trainer, f"{name}_id", token_id)
        if token_id >= 0:
            setattr(trainer, f"{name}_piece", vocabulary.tokens[token_id])
    normalizer = model.normalizer_spec
    normalizer.name = "identity"
    normalizer.precompiled_charsmap = bytes(
        i % 256 for i in metadata.array(PREFIX + "precompiled_charsmap", int, [])
    )
    normalizer.add_dummy_prefix = metadata.get(PREFIX + "add_space_prefix", bool, True)
    normalizer.remove_extra_whitespaces = metadata.get(
        PREFIX + "remove_extra_whitespaces", bool, False
    )
    content = model.SerializeToString()
    try:
        SentencePieceProcessor(model_proto=content)
    except RuntimeError as error:
        raise UserError(
            f"{metadata.path}: its tokens are no SentencePiece model ({error}); download it again."
        ) from None
    return content
