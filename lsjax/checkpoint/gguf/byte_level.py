"""Writes tokenizer.json for a byte-level BPE vocabulary, which GGUF files call gpt2.

A GGUF file names the rule that splits text into words. The rules here are those of the
tokenizer.json that each model family publishes.
"""

import dataclasses
import json
from typing import Any

import tokenizers
from gguf import TokenType

from lsjax.checkpoint.gguf.metadata import Metadata
from lsjax.checkpoint.gguf.vocabulary import PREFIX, Vocabulary
from lsjax.runtime.errors import UserError

_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
_WORDS = _BYTES | {"use_regex": True}  # splits as GPT-2 does
_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclasses.dataclass(frozen=True)
class _Rule:
    """How a family splits text.

    Attributes:
      steps: steps of its pre-tokenizer.
      normalizer: kind of its normalizer.
      ignore_merges: whether a word that is a token is not built from merges.
      add_bos: whether bos comes before a prompt where the file does not say.
      prefix: tokens that come before every prompt, whatever the file says.
    """

    steps: tuple[dict[str, Any], ...]
    normalizer: str | None = None
    ignore_merges: bool = False
    add_bos: bool = False
    prefix: tuple[str, ...] = ()


def _split(pattern: str) -> dict[str, Any]:
    return {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }


_GPT2 = _Rule((_WORDS,))
_SMOLLM = _Rule(({"type": "Digits", "individual_digits": True}, _WORDS))
_THREE_DIGITS = (_split(_PATTERN.format(digits=r"\p{N}{1,3}")), _BYTES)
_LLAMA3 = _Rule(_THREE_DIGITS, ignore_merges=True, add_bos=True)
_GLM4 = _Rule(_THREE_DIGITS, ignore_merges=True, prefix=("[gMASK]", "<sop>"))
_QWEN2 = _Rule((_split(_PATTERN.format(digits=r"\p{N}")), _BYTES), normalizer="NFC")
_RULES = {
    "default": _GPT2,
    "gpt-2": _GPT2,
    "smollm": _SMOLLM,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama-bpe": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "glm4": _GLM4,
    "chatglm-bpe": _GLM4,
}


def byte_level_files(metadata: Metadata, vocabulary: Vocabulary) -> dict[str, Any]:
    """Returns the tokenizer files by name.

    Raises:
      UserError: the file does not say how it splits text or says a way that is not known, or its
        tokens and merges do not fit together.
    """
    name = metadata.get(PREFIX + "pre", str)
    if name not in _RULES:
        raise UserError(
            f"{metadata.path} splits text as {name!r} does ({PREFIX}pre), which is not supported; "
            f"supported are {', '.join(_RULES)}."
        )
    rule = _RULES[name]
    metadata.expect(PREFIX + "add_space_prefix", False)
    metadata.expect(PREFIX + "remove_extra_whitespaces", False)
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": vocabulary.added_tokens(),
        "normalizer": rule.normalizer and {"type": rule.normalizer},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": list(rule.steps)},
        "post_processor": _around_prompts(metadata, vocabulary, rule),
        "decoder": _WORDS | {"add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": rule.ignore_merges,
            # Unused tokens fill the embedding up to its size.
            "vocab": {
                token: i
                for i, token in enumerate(vocabulary.tokens)
                if vocabulary.types[i] != TokenType.UNUSED
            },
            "merges": [_pair(merge) for merge in metadata.array(PREFIX + "merges", str)],
        },
    }
    content = json.dumps(tokenizer, ensure_ascii=False)
    try:
        tokenizers.Tokenizer.from_str(content)
    except Exception as error:  # the library raises bare Exceptions
        raise UserError(
            f"{metadata.path}: its tokens and merges do not fit together ({error}); download it "
            "again."
        ) from None
    config = {"tokenizer_class": "PreTrainedTokenizerFast"} | vocabulary.tokenizer_config()
    return {
        "tokenizer.json": content.encode(),
        "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False).encode(),
    }


def _pair(merge: str) -> list[str]:
    """Splits a merge at the space between its two tokens, the first of which may be a space."""
    at = merge.find(" ", 1)
    return [merge[:at], merge[at + 1 :]]


def _around_prompts(
    metadata: Metadata, vocabulary: Vocabulary, rule: _Rule
) -> dict[str, Any] | None:
    """Returns the post-processor that puts tokens around a prompt, None if there are none."""
    named, tokens = vocabulary.named, vocabulary.tokens
    add_bos = metadata.get(PREFIX + "add_bos_token", bool, rule.add_bos)
    add_eos = metadata.get(PREFIX + "add_eos_token", bool, False)
    prefix = [token for token in rule.prefix if token in tokens]
    if not prefix and add_bos and "bos_token" in named:
        prefix = [tokens[named["bos_token"]]]
    suffix = [tokens[named["eos_token"]]] if add_eos and "eos_token" in named else []
    if not prefix and not suffix:
        return None

    def special(token: str, type_id: int) -> dict[str, Any]:
        return {"SpecialToken": {"id": token, "type_id": type_id}}

    def around(name: str, type_id: int) -> list[dict[str, Any]]:
        return [
            *(special(token, type_id) for token in prefix),
            {"Sequence": {"id": name, "type_id": type_id}},
            *(special(token, type_id) for token in suffix),
        ]

    return {
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": around("A", 0) + around("B", 1),
        "special_tokens": {
            token: {"id": token, "ids": [tokens.index(token)], "tokens": [token]}
            for token in (*prefix, *suffix)
        },
    }
