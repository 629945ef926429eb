"""Reads prompts for programs and notebooks: texts, files, token ids and chats."""

import os
from collections.abc import Sequence
from typing import Any

from lsjax.runtime.errors import UserError
from lsjax.runtime.text_files import STDIN, check_characters, parse_json, read_lines, read_text

Message = dict[str, Any]


def read_texts(values: Sequence[str]) -> list[str]:
    """Returns a text per value: the value itself, a UTF-8 file or pipe it names, or - for stdin.

    Raises:
      UserError: a text is empty or not UTF-8, a value looks like a path but names no file, or
        stdin is given twice.
    """
    if values.count(STDIN) > 1:
        raise UserError("- is the standard input, which can be read once; give it once.")
    return [_read_text(value) for value in values]


def _read_text(value: str) -> str:
    if value == STDIN or _is_file(value):
        text, named = read_text(value), "the standard input" if value == STDIN else value
        if not text:
            raise UserError(f"{named} is empty; a prompt needs at least one token.")
        return text
    check_characters(value, "an input text")
    if not value:
        raise UserError("an input text is empty; a prompt needs at least one token.")
    if _looks_like_a_path(value):
        what = (
            "is a folder"
            if os.path.isdir(value)
            else "looks like a path, but there is no such file"
        )
        raise UserError(f"{value} {what}; give an existing file, or a text with a space in it.")
    return value


def _is_file(value: str) -> bool:
    """Returns whether a value names something to read: a file, a pipe or a terminal."""
    try:
        return os.path.exists(value) and not os.path.isdir(value)
    except ValueError:  # a text with a null byte
        return False


def _looks_like_a_path(value: str) -> bool:
    """Guesses whether a value is meant as a path; anything beyond ASCII makes it a text."""
    if any(c.isspace() for c in value) or len(value) > 4096 or not value.isascii():
        return False
    extension = os.path.splitext(value)[1][1:]
    return os.sep in value or (
        1 <= len(extension) <= 5 and extension.isalnum() and not extension.isdecimal()
    )


def read_ids(values: Sequence[str]) -> list[tuple[int, ...]]:
    """Parses each value as a list of token ids, such as 1,15043,3186.

    Raises:
      UserError: an entry is not a token id.
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
    """Reads a JSON Lines file; each line is a list of messages with a role and a content.

    Raises:
      UserError: the file or one of its lines is wrong; the message says which.
    """
    chats = []
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number},"
        chat = parse_json(line, where)
        if not isinstance(chat, list) or not chat or not all(map(_is_message, chat)):
            raise UserError(
                f"{where} must be a list of messages such as "
                '[{"role": "user", "content": "Hello"}].'
            )
        chats.append(chat)
    if not chats:
        raise UserError(f"{path} holds no chat; put a list of messages on each line.")
    return chats


def _is_message(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("role"), str)
        and ("content" in value or "tool_calls" in value)
    )


def as_chat(text: str) -> list[Message]:
    """Returns a chat whose only message is the user's text."""
    return [{"role": "user", "content": text}]


def read_chat_template(value: str) -> str:
    """Returns a Jinja chat template, given as itself or as the path of its file."""
    return read_text(value) if _is_file(value) else value


def read_chat_template_kwargs(value: str) -> dict[str, Any]:
    """Parses the JSON object of a chat template's extra variables: {"enable_thinking": false}.

    Raises:
      UserError: the value is not a JSON object.
    """
    found = parse_json(value, "chat_template_kwargs")
    if not isinstance(found, dict):
        raise UserError(
            "chat_template_kwargs must be a JSON object, as in '{\"enable_thinking\": false}'."
        )
    return found
