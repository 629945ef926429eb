"""Prompts as the command line gives them: texts, files, token ids, chats."""

import json
import os
from collections.abc import Sequence
from typing import Any

from lsjax.errors import UserError

Message = dict[str, Any]


def read_texts(values: Sequence[str]) -> list[str]:
    """Each value is a text, or the path of a UTF-8 file that holds one.

    Raises:
      UserError: an empty text; a value that looks like a path and leads to no file; a file that
        is not UTF-8.
    """
    return [_read_text(value) for value in values]


def _read_text(value: str) -> str:
    try:
        is_file = os.path.isfile(value)
    except ValueError:  # a text with a null byte
        is_file = False
    if is_file:
        text = read_utf8(value)
        if not text:
            raise UserError(f"the file {value} is empty; a prompt needs at least one token.")
        return text
    if not value:
        raise UserError("an input text is empty; a prompt needs at least one token.")
    if _looks_like_a_path(value):
        raise UserError(
            f"{value} looks like a path, but there is no such file; give an existing file, or a "
            "text with a space in it."
        )
    return value


def _looks_like_a_path(value: str) -> bool:
    if any(c.isspace() for c in value) or len(value) > 4096:
        return False
    extension = os.path.splitext(value)[1][1:]
    return os.sep in value or (
        1 <= len(extension) <= 5 and extension.isalnum() and extension.isascii()
    )


def read_utf8(path: str) -> str:
    """A file's text.

    Raises:
      UserError: it cannot be read, or is not UTF-8; says where.
    """
    try:
        with open(path, "rb") as f:
            return f.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text: byte {error.start} is 0x{error.object[error.start]:02x}; "
            "convert it to UTF-8."
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None


def read_ids(values: Sequence[str]) -> list[tuple[int, ...]]:
    """Each value is a list of token ids, as in 1,15043,3186.

    Raises:
      UserError: something that is not a token id.
    """
    prompts = []
    for value in values:
        parts = [p.strip() for p in value.split(",") if p.strip()]
        wrong = [p for p in parts if not p.isdecimal()]
        if wrong:
            raise UserError(
                f"{wrong[0]!r} in input_ids is not a token id; write ids as 1,15043,3186."
            )
        prompts.append(tuple(int(p) for p in parts))
    return prompts


def read_chats(path: str) -> list[list[Message]]:
    """A JSON-lines file: on each line a list of messages, each with a role and a content.

    Raises:
      UserError: the file or one of its lines is wrong; says which.
    """
    chats = []
    for number, line in enumerate(read_utf8(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            chat = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number}, is not JSON: {error}.") from None
        if not isinstance(chat, list) or not chat or not all(map(_is_message, chat)):
            raise UserError(
                f"{path}, line {number}, must be a list of messages such as "
                '[{"role": "user", "content": "Hello"}].'
            )
        chats.append(chat)
    if not chats:
        raise UserError(f"{path} holds no chat; put a list of messages on each line.")
    return chats


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and "content" in value


def as_chat(text: str) -> list[Message]:
    """A text as a user's only message."""
    return [{"role": "user", "content": text}]


def read_chat_template(value: str) -> str:
    """A Jinja chat template, or the path of a file that holds one."""
    return read_utf8(value) if os.path.isfile(value) else value
