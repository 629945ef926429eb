"""Writes the files beside the weights: tokenizer and generation settings."""

import json
from typing import Any

from lsjax.checkpoint.gguf.byte_level import byte_level_files
from lsjax.checkpoint.gguf.metadata import Metadata
from lsjax.checkpoint.gguf.sentencepiece_model import DEFAULT_IDS, sentencepiece_files
from lsjax.checkpoint.gguf.vocabulary import PREFIX, Vocabulary, read_vocabulary
from lsjax.families.generation_config import NAME as GENERATION_CONFIG
from lsjax.runtime.errors import UserError
from lsjax.runtime.notes import note

_KINDS = {"gpt2": (byte_level_files, {}), "llama": (sentencepiece_files, DEFAULT_IDS)}
# Key of what the publisher suggests for sampling -> field of generation_config.json.
_SAMPLING = {
    "temp": ("temperature", float),
    "top_k": ("top_k", int),
    "top_p": ("top_p", float),
    "min_p": ("min_p", float),
    "penalty_repeat": ("repetition_penalty", float),
}


def sidecar_files(metadata: Metadata, vocab_size: int) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Returns the tokenizer and generation files by name, and config.json's token ids.

    Args:
      metadata: metadata of the file.
      vocab_size: rows of the embedding.

    Raises:
      UserError: the tokenizer is of a kind that is not supported, or a key is missing or invalid.
    """
    kind = metadata.get(PREFIX + "model", str, "none")
    if kind == "none":
        note(f"{metadata.path} holds no tokenizer; give its model prompts as token ids.")
        return _generation(metadata, {}), {}
    if kind not in _KINDS:
        raise UserError(
            f"{metadata.path} holds a tokenizer of kind {kind!r}, which is not supported; "
            f"supported are {', '.join(_KINDS)}."
        )
    files_of, defaults = _KINDS[kind]
    vocabulary = read_vocabulary(metadata, defaults, vocab_size)
    ids = _token_ids(vocabulary)
    files = files_of(metadata, vocabulary)
    metadata.refuse_unread("tokenizer.")
    return files | _generation(metadata, ids), ids


def _token_ids(vocabulary: Vocabulary) -> dict[str, Any]:
    named = vocabulary.named
    ids: dict[str, Any] = {
        f"{name}_token_id": named[f"{name}_token"]
        for name in ("bos", "pad")
        if f"{name}_token" in named
    }
    if vocabulary.ends:
        ids["eos_token_id"] = list(vocabulary.ends) if vocabulary.ends[1:] else vocabulary.ends[0]
    return ids


def _generation(metadata: Metadata, ids: dict[str, Any]) -> dict[str, bytes]:
    prefix = "general.sampling."
    sampling = {
        field: metadata.get(prefix + key, kind)
        for key, (field, kind) in _SAMPLING.items()
        if prefix + key in metadata
    }
    left = [key for key in metadata if key.startswith(prefix) and key not in metadata.read]
    if left:
        note(f"{metadata.path}: {GENERATION_CONFIG} cannot express {', '.join(left)}.")
    content = ids | ({"do_sample": True} | sampling if sampling else {})
    return {GENERATION_CONFIG: (json.dumps(content, indent=2) + "\n").encode()} if content else {}
