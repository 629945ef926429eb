"""Reading text and JSON as they are on disk, and writing a file whole or not at all."""

import json
import os
import sys
import tempfile
from typing import Any

from lsjax.errors import UserError
from lsjax.hosts import is_first

STDIN = "-"


def read_text(path: str | os.PathLike[str]) -> str:
    """A UTF-8 file's text, without a byte order mark; "-" is the standard input.

    Raises:
      UserError: it cannot be read, or is not UTF-8; says where.
    """
    path = os.fspath(path)
    return decode(_bytes_of(path), path)


def read_lines(path: str | os.PathLike[str]) -> list[str]:
    """The same, split at line feeds alone: JSON strings may hold any other line separator."""
    return [line.removesuffix("\r") for line in read_text(path).split("\n")]


def read_json(path: str | os.PathLike[str]) -> Any:
    """What a JSON file holds.

    Raises:
      FileNotFoundError: there is none.
      UserError: it cannot be read, or is not JSON in UTF-8; says where.
    """
    path = os.fspath(path)
    if not os.path.exists(path):
        raise FileNotFoundError(path)
    return parse_json(read_text(path), path)


def parse_json(text: str, where: str) -> Any:
    """JSON text -> what it says; `where` begins the sentence that refuses it.

    Raises:
      UserError: it is not JSON, is nested too deeply, or holds half of a character.
    """
    try:
        found = json.loads(text)
    except ValueError as error:
        raise UserError(f"{where} is not valid JSON: {error}.") from None
    except RecursionError:
        raise UserError(f"{where} is JSON that is nested too deeply.") from None
    # A lone surrogate can come from an escape only: the text itself is UTF-8.
    if "\\u" in text:
        check_characters(json.dumps(found, ensure_ascii=False), where)
    return found


def check_characters(text: str, where: str) -> None:
    """Refuses text that no UTF-8 can hold.

    Raises:
      UserError: half of a surrogate pair, or a byte that was not UTF-8.
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
    """UTF-8 -> text, without a byte order mark; `where` begins the sentence that refuses it."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where} is not UTF-8 text: byte {error.start} is 0x{error.object[error.start]:02x}; "
            "convert it to UTF-8."
        ) from None


def write_atomically(path: str, text: str) -> None:
    """Writes UTF-8 text; whatever happens, `path` never holds half of it.

    Of several processes that run one model, the first one writes.

    Raises:
      UserError: it cannot be written there.
    """
    if not is_first():
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
    """Refuses a path whose folder is not there, before the work that fills it.

    Raises:
      UserError: saying which folder.
    """
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise UserError(f"{path} cannot be written: {folder} is not a folder to write in.")
    if os.path.isdir(path):
        raise UserError(f"{path} is a folder; give the path of a file.")
