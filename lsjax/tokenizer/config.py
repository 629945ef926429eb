"""Reads a tokenizer's settings beside its vocabulary: special tokens, bos/eos, chat template."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lsjax.runtime.errors import TokenizerError, UserError
from lsjax.runtime.text_files import read_json, read_text

CONFIG_NAME = "tokenizer_config.json"
NAMED_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


@dataclass(frozen=True)
class AddedToken:
    """A token that is matched as a whole in text, before the vocabulary's own rules apply."""

    id: int
    content: str
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False


@dataclass(frozen=True)
class TokenizerConfig:
    """The settings in ``tokenizer_config.json`` that matter here.

    Absent settings are ``None`` or empty; ``legacy`` is then true.
    """

    tokenizer_class: str | None = None
    named_tokens: Mapping[str, str] = field(default_factory=dict)
    extra_special_tokens: tuple[str, ...] = ()
    added_tokens: tuple[AddedToken, ...] = ()
    add_bos_token: bool | None = None
    add_eos_token: bool | None = None
    legacy: bool = True
    chat_template: str | None = None


def read_config(folder: Path) -> TokenizerConfig:
    """Reads ``tokenizer_config.json`` and the files that complete it; any may be absent.

    These are ``special_tokens_map.json``, ``added_tokens.json`` and ``chat_template.jinja``.
    """
    path = folder / CONFIG_NAME
    legacy = _read_json_object(folder / "added_tokens.json")
    # Older folders name bos and eos only in special_tokens_map.json.
    raw = {**_read_json_object(folder / "special_tokens_map.json"), **_read_json_object(path)}
    try:
        return TokenizerConfig(
            tokenizer_class=raw.get("tokenizer_class"),
            named_tokens={
                name: _content(raw[name]) for name in NAMED_TOKENS if raw.get(name) is not None
            },
            extra_special_tokens=_extra_special_tokens(raw),
            added_tokens=_added_tokens(raw.get("added_tokens_decoder") or {}, legacy),
            add_bos_token=_flag(raw, "add_bos_token"),
            add_eos_token=_flag(raw, "add_eos_token"),
            legacy=raw.get("legacy") is not False,
            chat_template=_chat_template(folder, raw.get("chat_template")),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise TokenizerError(
            f"{path}: a setting has an unexpected form ({error!r}); "
            "restore the file from the model's original release."
        ) from error


def _read_json_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = read_json(path)
    except UserError as error:
        raise TokenizerError(
            f"{str(error).rstrip('.')}; restore it from the model's original release."
        ) from error
    if not isinstance(value, dict):
        raise TokenizerError(
            f"{path} should hold a JSON object but holds a {type(value).__name__}; "
            "restore it from the model's original release."
        )
    return value


def _content(token: str | Mapping[str, Any]) -> str:
    """Returns the text of a token, which is a string or an object with the text in ``content``."""
    content = token if isinstance(token, str) else token["content"]
    if not isinstance(content, str):
        raise TypeError(f"token {token!r} isn't text")
    return content


def _extra_special_tokens(raw: Mapping[str, Any]) -> tuple[str, ...]:
    tokens = raw.get("additional_special_tokens") or raw.get("extra_special_tokens") or ()
    return tuple(map(_content, tokens.values() if isinstance(tokens, dict) else tokens))


def _flag(raw: Mapping[str, Any], name: str) -> bool | None:
    value = raw.get(name)
    if not isinstance(value, bool | None):
        raise TypeError(f"{name} is neither true nor false")
    return value


def _added_tokens(decoder: Mapping[str, Any], legacy: Mapping[str, Any]) -> tuple[AddedToken, ...]:
    """Returns the tokens of added_tokens_decoder and those that only added_tokens.json has."""
    tokens = [
        AddedToken(
            id=int(token_id),
            content=_content(token),
            special=bool(token.get("special", False)),
            lstrip=bool(token.get("lstrip", False)),
            rstrip=bool(token.get("rstrip", False)),
            single_word=bool(token.get("single_word", False)),
            normalized=bool(token.get("normalized", False)),
        )
        for token_id, token in decoder.items()
    ]
    told = {token.content for token in tokens}
    for content, token_id in legacy.items():
        if not isinstance(token_id, int) or isinstance(token_id, bool):
            raise TypeError(f"added_tokens.json gives {content!r} the id {token_id!r}")
        if content not in told:
            tokens.append(AddedToken(id=token_id, content=content, special=False))
    return tuple(sorted(tokens, key=lambda token: token.id))


def _chat_template(folder: Path, setting: str | list[dict[str, str]] | None) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return read_text(file)
    if isinstance(setting, list):
        # Other names are for special uses (tool calls, retrieval), so none replaces the default.
        return {entry["name"]: entry["template"] for entry in setting}.get("default")
    if not isinstance(setting, str | None):
        raise TypeError("chat_template is neither text nor a list of named templates")
    return setting
