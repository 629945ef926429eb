"""Reads the vocabulary of a GGUF file: its tokens, and which of them mean something special."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from gguf import TokenType

from lsjax.checkpoint.gguf.metadata import Metadata
from lsjax.runtime.errors import UserError

PREFIX = "tokenizer.ggml."
# Name in tokenizer_config.json -> key.
_NAMED = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
    "sep_token": "seperator_token_id",  # llama.cpp spells it so
    "cls_token": "cls_token_id",
    "mask_token": "mask_token_id",
}
# Tokens that end an answer beside eos: the end of a turn and of a message.
_MORE_ENDS = ("eot_token_id", "eom_token_id")
# Tokens that only code completion in llama.cpp's own programs uses.
_INFILL = (
    "prefix", "suffix", "middle", "fim_pre", "fim_suf", "fim_mid", "fim_pad", "fim_rep", "fim_sep",
)  # fmt: skip
_TEMPLATE, _TEMPLATES = "tokenizer.chat_template", "tokenizer.chat_templates"


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The tokens of a file and their roles.

    Attributes:
      tokens: text of each token, by id.
      types: kind of each token, by id.
      named: name in tokenizer_config.json, such as eos_token -> id.
      ends: ids that end an answer.
      chat_templates: name -> template; the usual one is called default.
    """

    tokens: tuple[str, ...]
    types: tuple[int, ...]
    named: Mapping[str, int]
    ends: tuple[int, ...]
    chat_templates: Mapping[str, str]

    def of_types(self, *types: TokenType) -> list[int]:
        """Returns the ids of the tokens that are of one of these kinds."""
        return [i for i, kind in enumerate(self.types) if kind in types]

    def added_tokens(self) -> list[dict[str, Any]]:
        """Returns the tokens that are matched as a whole in text, as tokenizer.json lists them."""
        return [
            {
                "id": i,
                "content": self.tokens[i],
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": self.types[i] != TokenType.USER_DEFINED,
            }
            for i in self.of_types(TokenType.UNKNOWN, TokenType.CONTROL, TokenType.USER_DEFINED)
        ]

    def tokenizer_config(self) -> dict[str, Any]:
        """Returns what every tokenizer_config.json says of a vocabulary."""
        config: dict[str, Any] = {name: self.tokens[i] for name, i in self.named.items()}
        if set(self.chat_templates) == {"default"}:
            config["chat_template"] = self.chat_templates["default"]
        elif self.chat_templates:
            config["chat_template"] = [
                {"name": name, "template": text} for name, text in self.chat_templates.items()
            ]
        return config | {"clean_up_tokenization_spaces": False}


def read_vocabulary(metadata: Metadata, defaults: Mapping[str, int], vocab_size: int) -> Vocabulary:
    """Reads the vocabulary of a file.

    Args:
      metadata: metadata of the file.
      defaults: ids of named tokens where the file does not say them.
      vocab_size: rows of the embedding.

    Raises:
      UserError: a key is missing or invalid.
    """
    tokens = metadata.array(PREFIX + "tokens", str)
    types = metadata.array(PREFIX + "token_type", int, [int(TokenType.NORMAL)] * len(tokens))
    metadata.expect(PREFIX + "add_sep_token", False)
    metadata.mark_known(*(f"{PREFIX}{name}_token_id" for name in _INFILL))
    if len(types) != len(tokens) or len(set(tokens)) != len(tokens):
        raise UserError(
            f"{metadata.path}: {PREFIX}tokens must be different texts, each of which has its "
            f"{PREFIX}token_type; download the file again."
        )
    if len(tokens) > vocab_size:
        raise UserError(
            f"{metadata.path} holds {len(tokens)} tokens, but its embedding has {vocab_size} rows; "
            "download it again."
        )

    def token_id(key: str, default: int | None = None) -> int | None:
        found = metadata.get(PREFIX + key, int, default)
        if found is not None and not 0 <= found < len(tokens):
            raise UserError(
                f"{metadata.path}: {PREFIX}{key} must be a token id below {len(tokens)}, not "
                f"{found}."
            )
        return found

    named = {name: token_id(key, defaults.get(name)) for name, key in _NAMED.items()}
    ends = (named["eos_token"], *map(token_id, _MORE_ENDS))
    return Vocabulary(
        tokens=tuple(tokens),
        types=tuple(types),
        named={name: i for name, i in named.items() if i is not None},
        ends=tuple(dict.fromkeys(i for i in ends if i is not None)),
        chat_templates=_chat_templates(metadata),
    )


def _chat_templates(metadata: Metadata) -> dict[str, str]:
    metadata.mark_known(_TEMPLATES)  # it lists the names of the keys below
    named = [key for key in metadata if key.startswith(_TEMPLATE + ".")]
    found = {key.removeprefix(_TEMPLATE + "."): metadata.get(key, str) for key in named}
    if _TEMPLATE in metadata:
        found = {"default": metadata.get(_TEMPLATE, str)} | found
    return found
