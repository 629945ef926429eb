"""Reads text and JSON files with clear errors, and writes files atomically."""

import json
import os
import sys
import tempfile
from typing import Any

from lsjax.runtime.errors import UserError
from lsjax.runtime.primary import is_primary

STDIN = "-"


def read_text(path: str | os.PathLike[str]) -> str:
    """Reads a UTF-8 text file, without its byte order mark; "-" is standard input.

    Raises:
      UserError: the file cannot be read, or is not UTF-8; the message says where.
    """
    path = os.fspath(path)
    return decode(_bytes_of(path), path)


def read_lines(path: str | os.PathLike[str]) -> list[str]:
    """Reads a text file as `read_text` does, and splits it into lines.

    Only line feeds (or CR LF) end a line, since JSON strings may contain other line separators.
    """
    return [line.removesuffix("\r") for line in read_text(path).split("\n")]


def read_json(path: str | os.PathLike[str]) -> Any:
    """Reads a JSON file.

    Raises:
      FileNotFoundError: the file does not exist.
      UserError: the file cannot be read, or is not JSON in UTF-8; the message says where.
    """
    path = os.fspath(path)
    if not os.path.exists(path):
        raise FileNotFoundError(path)
    return parse_json(read_text(path), path)


def parse_json(text: str, where: str) -> Any:
    """Parses JSON; error messages begin with `where`.

    Raises:
      UserError: the text is not JSON, is nested too deeply, or contains half of a surrogate pair.
    """
    try:
        found = json.loads(text)
    except ValueError as error:
        raise UserError(f"{where} is not valid JSON: {error}.") from None
    except RecursionError:
        raise UserError(f"{where} is JSON that is nested too deeply.") from None
    # Lone surrogates can only come from escapes, because the text itself is UTF-8.
    if "\\u" in text:
        check_characters(json.dumps(found, ensure_ascii=False), where)
    return found


def check_characters(text: str, where: str) -> None:
    """Checks that text can be encoded in UTF-8; error messages begin with `where`.

    Raises:
      UserError: the text contains half of a surrogate pair, or a byte that was not UTF-8.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        what = (
            f"the byte 0x{code - 0xDC00:02x}, which is not UTF-8"
            if 0xDC80 <= code <= 0xDCFF
            else f"\\u{code:04x} alone, which is half of a character"
        )
        raise UserError(f"{where} holds {what}; write the text in UTF-8.") from None


def _bytes_of(path: str) -> bytes:
    try:
        if path == STDIN:
            return sys.stdin.buffer.read()
        with open(path, "rb") as f:
            return f.read()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None


def decode(content: bytes, where: str) -> str:
    """Decodes UTF-8 without its byte order mark; error messages begin with `where`.

    Raises:
      UserError: the content is not UTF-8.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where} is not UTF-8 text: byte {error.start} is 0x{error.object[error.start]:02x}; "
            "convert it to UTF-8."
        ) from None


def write_atomically(path: str, text: str) -> None:
    """Writes UTF-8 text to a file, which never holds only a part of it.

    If several processes run one model, only the primary process writes.

    Raises:
      UserError: the file cannot be written.
    """
    if not is_primary():
        return
    folder = os.path.dirname(os.path.abspath(path))
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=folder, prefix=".incomplete-", delete=False
        ) as f:
            temporary = f.name
            f.write(text)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}.") from None


def check_writable(path: str) -> None:
    """Checks that a file can be written, before the work that produces its content.

    Raises:
      UserError: the path is a folder, or its parent folder is missing or not writable.
    """
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise UserError(f"{path} cannot be written: {folder} is not a folder to write in.")
    if os.path.isdir(path):
        raise UserError(f"{path} is a folder; give the path of a file.")
