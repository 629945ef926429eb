"""Prompts as a program or a notebook gives them: texts, files, token ids, chats."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lsjax.errors import UserError
from lsjax.files import STDIN, check_characters, parse_json, read_lines, read_text

Message = dict[str, Any]
Prompt = str | Sequence[int]


def as_prompts(prompts: Any) -> list[Prompt]:
    """A text or a list of ids, or several of them -> a list of prompts.

    Raises:
      UserError: something that is neither.
    """
    if isinstance(prompts, str) or (_are_ids(prompts) and len(prompts)):
        prompts = [prompts]
    if isinstance(prompts, (bytes, Mapping)) or not hasattr(prompts, "__iter__"):
        raise UserError(
            f"a prompt is a text or a list of token ids, not {type(prompts).__name__}; give one "
            "or a list of them."
        )
    prompts = list(prompts)
    for i, prompt in enumerate(prompts):
        if not (isinstance(prompt, str) or _are_ids(prompt)):
            raise UserError(
                f"prompt {i} is neither a text nor a list of token ids, which are whole numbers: "
                f"{str(prompt)[:60]!r}."
            )
    return [p if isinstance(p, str) else [int(i) for i in p] for p in prompts]


def _are_ids(value: Any) -> bool:
    """Whether a value is a list of whole numbers; one without any may be one of prompts as well."""
    if isinstance(value, (str, bytes, Mapping)) or not hasattr(value, "__iter__"):
        return False
    if hasattr(value, "dtype") and hasattr(value, "ndim"):
        return value.ndim == 1 and np.issubdtype(value.dtype, np.integer)
    return isinstance(value, Sequence) and all(
        isinstance(i, (int, np.integer)) and not isinstance(i, bool) for i in value
    )


def as_rows(token_ids: Any) -> np.ndarray:
    """[batch, length] or [length] ids -> [batch, length] int64.

    Raises:
      UserError: rows of several lengths, or something that is not a whole number.
    """
    try:
        found = np.atleast_2d(np.asarray(token_ids))
    except ValueError:
        raise UserError(
            "token_ids has rows of several lengths; give rows of one length, or one row at a time."
        ) from None
    if found.ndim != 2 or not found.size or not np.issubdtype(found.dtype, np.integer):
        raise UserError(
            f"token_ids must be whole numbers of shape [length] or [batch, length], not "
            f"{found.dtype} of shape {list(found.shape)}."
        )
    return found.astype(np.int64)


def read_texts(values: Sequence[str]) -> list[str]:
    """Each value is a text, the path of a UTF-8 file or pipe that holds one, or - for stdin.

    Raises:
      UserError: an empty text; a value that looks like a path and leads to no file; text that is
        not UTF-8; stdin twice.
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
    """Whether a value leads to something to read: a file, a pipe, a terminal."""
    try:
        return os.path.exists(value) and not os.path.isdir(value)
    except ValueError:  # a text with a null byte
        return False


def _looks_like_a_path(value: str) -> bool:
    """What a shell's user would take for a path; letters beyond ASCII make it a text."""
    if any(c.isspace() for c in value) or len(value) > 4096 or not value.isascii():
        return False
    extension = os.path.splitext(value)[1][1:]
    return os.sep in value or (
        1 <= len(extension) <= 5 and extension.isalnum() and not extension.isdecimal()
    )


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
    """A text as a user's only message."""
    return [{"role": "user", "content": text}]


def read_chat_template(value: str) -> str:
    """A Jinja chat template, or the path of a file that holds one."""
    return read_text(value) if _is_file(value) else value


def read_chat_template_kwargs(value: str) -> dict[str, Any]:
    """The JSON object of what else a chat template is given, as in {"enable_thinking": false}.

    Raises:
      UserError: it is not one.
    """
    found = parse_json(value, "chat_template_kwargs")
    if not isinstance(found, dict):
        raise UserError(
            "chat_template_kwargs must be a JSON object, as in '{\"enable_thinking\": false}'."
        )
    return found
